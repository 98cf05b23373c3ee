"""The teacher feature cache: reads return the computed maps, builds can be interrupted, and mismatched caches are
rejected by name."""

import json
import pickle
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import launcher, load_tool, start
from shared_data import shared_data
from test_distill import teacher_overrides
from test_train import SMALL, log_lines, train
from tiny_teachers import MASK2FORMER

from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings, StreamState
from pixel_sail.distillation.cache import (
    FeatureCache,
    StoredMap,
    StudentGrid,
    TeacherCacheError,
    cache_identity,
    decode_map,
    encode_map,
    image_key,
)
from pixel_sail.distillation.cache_writer import finish, plan_cache, start_folder, write_shard
from pixel_sail.distillation.choice import TeacherChoice
from pixel_sail.distillation.mask2former import mask2former
from pixel_sail.distillation.teacher import Teacher
from pixel_sail.distillation.teachers import Teachers
from pixel_sail.losses.distill import resized_features
from pixel_sail.types import DataError, Sample, Turn

TOOL = Path(__file__).resolve().parent.parent / "tools" / "cache_teacher_features.py"
GRID = StudentGrid(site="pixel_map", patch_size=8, max_long_side=64, cells_per_patch=2)
IDENTITY = cache_identity({"kind": "sampled"}, precision="fp32", grid=GRID)


def random_map(key, size=(4, 6)):
    rng = np.random.default_rng([ord(letter) for letter in key])
    return torch.from_numpy(rng.standard_normal((3, *size)).astype(np.float32))


def compute(dtype, wrong=()):
    def run(keys):
        maps = {key: encode_map(random_map(key), dtype) for key in keys if key not in wrong}
        return maps, {key: "broken" for key in wrong if key in keys}

    return run


def built(folder, *, keys="abcde", dtype="fp16", identity=IDENTITY, wrong=()):
    plan = plan_cache(list(keys), identity, dtype=dtype, images_per_shard=2)
    start_folder(folder, plan)
    for number in range(len(plan.shards)):
        write_shard(folder, plan, number, compute(dtype, wrong))
    finish(folder, plan)
    return plan


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_read_returns_what_was_written(tmp_path, dtype):
    plan = built(tmp_path, dtype=dtype)
    assert [len(shard) for shard in plan.shards] == [2, 2, 1]
    cache = FeatureCache(tmp_path, IDENTITY, where="test")
    for key in "edcba":
        stored = cache.read(key, "item", map_hw=(4, 6))
        expected = encode_map(random_map(key), dtype)
        assert torch.equal(stored.features_EYX, expected.features_EYX)
        assert stored.features_EYX.dtype == (torch.float16 if dtype == "fp16" else torch.int8)
        if dtype == "int8":
            assert torch.equal(stored.scales_E, expected.scales_E)
    assert cache.read("f", "item", map_hw=(4, 6)) is None
    assert len(cache) == 5


def test_int8_is_wrong_by_half_a_level_at_most_and_zero_maps_stay_zero():
    features = torch.randn(5, 30, 40) * torch.tensor([0.0, 1e-3, 1.0, 10.0, 1e4])[:, None, None]
    stored = encode_map(features, "int8")
    error = (decode_map(stored.features_EYX, stored.scales_E) - features).abs().amax(dim=(1, 2))
    assert (error <= features.abs().amax(dim=(1, 2)) / 254 * 1.0001).all()
    assert not stored.features_EYX[0].any()
    # A value by hand: the largest is 127 levels, half of it 63.5, rounded to the even 64.
    by_hand = encode_map(torch.tensor([[[2.0, 1.0, -2.0]]]), "int8")
    assert by_hand.features_EYX.tolist() == [[[127, 64, -127]]] and by_hand.scales_E.item() == pytest.approx(2 / 127)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_features_that_are_not_finite_are_rejected_with_the_image(dtype, bad):
    features = torch.ones(2, 3, 4)
    features[1, 2, 3] = bad
    with pytest.raises(DataError, match="image 7: found 1 of 24 teacher features that are not finite"):
        encode_map(features, dtype, "image 7")


def test_features_too_large_for_fp16_are_rejected_there_and_kept_by_int8():
    features = torch.tensor([[[65504.0, -7e4]]])
    with pytest.raises(DataError, match="image 7: found a teacher feature of magnitude 70000, expected at most 65504"):
        encode_map(features, "fp16", "image 7")
    stored = encode_map(features, "int8", "image 7")
    assert decode_map(stored.features_EYX, stored.scales_E)[0, 0, 1].item() == pytest.approx(-7e4)
    assert encode_map(features[..., :1], "fp16").features_EYX.item() == 65504


def test_an_interrupted_build_continues_to_the_same_bytes(tmp_path):
    built(tmp_path / "whole")
    plan = plan_cache(list("edcba"), IDENTITY, dtype="fp16", images_per_shard=2)
    parts = tmp_path / "parts"
    start_folder(parts, plan)
    write_shard(parts, plan, 1, compute("fp16"))

    def dies(keys):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(parts, plan, 0, dies)
    with pytest.raises(TeacherCacheError, match="let it finish"):
        FeatureCache(parts, IDENTITY, where="test")
    start_folder(parts, plan)
    for number in (2, 0):
        write_shard(parts, plan, number, compute("fp16"))
    finish(parts, plan, verify=True)
    files = sorted(path.name for path in parts.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in files:
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_folder_with_another_plan_is_not_continued(tmp_path):
    built(tmp_path)
    with pytest.raises(TeacherCacheError, match="another shards"):
        start_folder(tmp_path, plan_cache(list("abc"), IDENTITY, dtype="fp16", images_per_shard=2))
    with pytest.raises(TeacherCacheError, match="another dtype"):
        start_folder(tmp_path, plan_cache(list("abcde"), IDENTITY, dtype="int8", images_per_shard=2))


def test_images_that_cannot_be_used_are_skipped_with_their_reason(tmp_path):
    built(tmp_path, wrong=("b",))
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shards"][0]["unusable"] == {"b": "broken"}
    assert FeatureCache(tmp_path, IDENTITY, where="test").read("b", "item", map_hw=(4, 6)) is None


def test_an_unfinished_build_is_not_given_an_index(tmp_path):
    plan = plan_cache(list("abcde"), IDENTITY, dtype="fp16", images_per_shard=2)
    start_folder(tmp_path, plan)
    write_shard(tmp_path, plan, 0, compute("fp16"))
    with pytest.raises(TeacherCacheError, match=r"shard_00001\.json is absent"):
        finish(tmp_path, plan)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (cache_identity({"kind": "other"}, precision="fp32", grid=GRID), "expert"),
        (cache_identity({"kind": "sampled"}, precision="bf16", grid=GRID), "precision"),
        (
            cache_identity(
                {"kind": "sampled"},
                precision="fp32",
                grid=StudentGrid(site="pixel_map", patch_size=8, max_long_side=64, cells_per_patch=4),
            ),
            "pooled_to",
        ),
    ],
)
def test_a_cache_of_another_teacher_or_for_another_student_is_rejected(tmp_path, other, named):
    built(tmp_path)
    with pytest.raises(TeacherCacheError, match=named):
        FeatureCache(tmp_path, other, where="test")


def test_maps_of_the_teachers_own_size_serve_every_student(tmp_path):
    built(tmp_path, identity=cache_identity({"kind": "sampled"}, precision="fp32", grid=None))
    assert FeatureCache(tmp_path, IDENTITY, where="test").read("a", "item", map_hw=(99, 99)) is not None


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_a_damaged_shard_is_rejected_with_the_name_of_the_item(tmp_path):
    built(tmp_path)
    shard = tmp_path / "shard_00000.safetensors"
    damage(shard, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    cache = FeatureCache(tmp_path, IDENTITY, where="test")
    assert cache.read("a", "sample 1: one.jpg", map_hw=(4, 6)) is not None
    with pytest.raises(TeacherCacheError, match=r"sample 2: two\.jpg.*shard_00000\.safetensors is damaged"):
        cache.read("b", "sample 2: two.jpg", map_hw=(4, 6))
    with pytest.raises(TeacherCacheError, match="sha256 differs"):
        finish(tmp_path, plan_cache(list("abcde"), IDENTITY, dtype="fp16", images_per_shard=2), verify=True)


@pytest.mark.parametrize("left", [0, 5, 60, -10])
def test_a_truncated_shard_is_rejected_with_the_name_of_the_item(tmp_path, left):
    built(tmp_path)
    shard = tmp_path / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(TeacherCacheError, match="sample 1: one"):
        FeatureCache(tmp_path, IDENTITY, where="test").read("a", "sample 1: one.jpg", map_hw=(4, 6))


def test_a_shard_of_another_cache_is_rejected(tmp_path):
    built(tmp_path / "own")
    built(tmp_path / "other", identity=cache_identity({"kind": "other"}, precision="fp32", grid=GRID))
    shutil.copy(tmp_path / "other" / "shard_00000.safetensors", tmp_path / "own")
    with pytest.raises(TeacherCacheError, match="belongs to another cache"):
        FeatureCache(tmp_path / "own", IDENTITY, where="test").read("a", "item", map_hw=(4, 6))


def test_a_map_of_another_size_is_rejected(tmp_path):
    built(tmp_path)
    with pytest.raises(TeacherCacheError, match=r"item: stored map is \(4, 6\) cells, the student's is \(6, 4\)"):
        FeatureCache(tmp_path, IDENTITY, where="test").read("a", "item", map_hw=(6, 4))


def test_a_cache_can_be_sent_to_another_process(tmp_path):
    built(tmp_path)
    cache = FeatureCache(tmp_path, IDENTITY, where="test")
    cache.read("a", "item", map_hw=(4, 6))
    arrived = pickle.loads(pickle.dumps(cache))
    assert torch.equal(
        arrived.read("a", "item", map_hw=(4, 6)).features_EYX, encode_map(random_map("a"), "fp16").features_EYX
    )


class Images:
    """A source of synthetic images with one mask each."""

    def __init__(self, folder, count=6):
        rng = np.random.default_rng(0)
        self.name, self.paths = "images", []
        for index in range(count):
            path = folder / f"{index}.png"
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(path)
            self.paths.append(path)

    def __len__(self):
        return len(self.paths)

    def image_path(self, index):
        return self.paths[index]

    def get(self, index, rng):
        turn = Turn(question="red", answer="[SEG]", masks=(rng.random((16, 24)) < 0.5,))
        return Sample(
            sample_id=f"images/{index}",
            source="images",
            image_path=self.paths[index],
            image_hw=(16, 24),
            turns=(turn,),
        )


def image_cache(folder, source, *, skip=0):
    """Return a cache of the images without the last `skip`."""
    keys = {image_key(path): path for path in source.paths[: len(source) - skip]}
    plan = plan_cache(list(keys), IDENTITY, dtype="fp16", images_per_shard=4)
    start_folder(folder, plan)
    for number in range(len(plan.shards)):
        write_shard(folder, plan, number, compute("fp16"))
    finish(folder, plan)
    return FeatureCache(folder, IDENTITY, where="distillation.a.cache")


SETTINGS = PackingSettings(seq_len=64, packing_buffer=2)


def mixture_of(source):
    return Mixture({"images": source}, {}, seed=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_carry_stored_maps_and_images_through_the_workers(processor, tmp_path, num_workers):
    source = Images(tmp_path)
    choices = (
        TeacherChoice(name="a", grid=GRID, cache=image_cache(tmp_path / "cache", source)),
        TeacherChoice(name="b", fraction=0.5, grid=GRID),
    )
    assignment = StreamAssignment(global_batch_size=2, rank=0, world_size=1, micro_batch_size=1)
    steps = training_batches(
        mixture_of(source),
        processor,
        SETTINGS,
        assignment,
        start=[StreamState()] * 2,
        num_workers=num_workers,
        teachers=choices,
    )
    seen_by_b = 0
    for step in islice(steps, 4):
        for batch in step.batches:
            images = batch.distilled_images()
            assert images["a"] == tuple(range(len(batch.grids)))
            for name, image, features in zip(
                batch.teacher_names, batch.teacher_images, batch.teacher_maps, strict=True
            ):
                path = source.paths[int(batch.sample_ids[batch.image_samples[image]].split("/")[1])]
                if name == "a":
                    assert torch.equal(features, encode_map(random_map(image_key(path)), "fp16").features_EYX)
                else:
                    assert features is None
                    original = batch.original_images[batch.original_image_index.index(image)]
                    assert np.array_equal(original.numpy(), np.array(Image.open(path)))
            assert batch.original_image_index == images.get("b", ())
            seen_by_b += len(batch.original_images)
    assert 0 < seen_by_b < 8 * 2


def test_a_missing_image_ends_the_run_with_its_name_even_if_bad_samples_are_skipped(processor, tmp_path):
    source = Images(tmp_path)
    choice = TeacherChoice(name="a", grid=GRID, cache=image_cache(tmp_path / "cache", source, skip=1))
    stream = PackedStream(
        mixture_of(source), processor, SETTINGS, index=0, num_streams=1, max_skipped_fraction=1.0, teachers=[choice]
    )
    with pytest.raises(
        TeacherCacheError, match=r"images/5: .*5\.png: not in the cache .* of teacher a.*on_miss=online"
    ):
        list(islice(stream, 10))


def test_a_miss_falls_back_to_the_image_where_configured(processor, tmp_path):
    source = Images(tmp_path)
    cache = image_cache(tmp_path / "cache", source, skip=1)
    choice = TeacherChoice(name="a", grid=GRID, cache=cache, falls_back=True)
    stream = PackedStream(mixture_of(source), processor, SETTINGS, index=0, num_streams=1, teachers=[choice])
    for number in range(len(source)):
        example = stream.example(number)
        (target,) = example.teacher_targets
        is_last = example.sample_id == "images/5"
        assert (target.features_EYX is None) == is_last and (example.image_HW3 is not None) == is_last


def test_changed_image_bytes_are_a_miss(processor, tmp_path):
    source = Images(tmp_path)
    choice = TeacherChoice(name="a", grid=GRID, cache=image_cache(tmp_path / "cache", source))
    Image.fromarray(np.zeros((16, 24, 3), dtype=np.uint8)).save(source.paths[2])
    stream = PackedStream(mixture_of(source), processor, SETTINGS, index=0, num_streams=1, teachers=[choice])
    with pytest.raises(TeacherCacheError, match=r"2\.png: not in the cache"):
        list(islice(stream, 6))


def test_maps_of_a_batch_are_in_order_whether_stored_or_computed(make_batch, processor, tmp_path):
    source = Images(tmp_path)
    cache = image_cache(tmp_path / "cache", source, skip=3)
    spec = mask2former(random=True, architecture=MASK2FORMER, shortest_edge=64, longest_edge=110)
    teacher = Teacher(spec, device="cpu", precision="fp32", max_batch=2)
    choice = TeacherChoice(name="a", grid=GRID, cache=cache, falls_back=True)
    stream = PackedStream(mixture_of(source), processor, SETTINGS, index=0, num_streams=1, teachers=[choice])
    examples = [stream.example(number) for number in range(6)]
    maps = Teachers(choices=(choice,), networks={"a": teacher}).maps(make_batch(examples))["a"]
    for example, found in zip(examples, maps, strict=True):
        number = int(example.sample_id.split("/")[1])
        if number < 3:
            key = image_key(source.paths[number])
            assert torch.equal(found, encode_map(random_map(key), "fp16").features_EYX.float())
        else:
            image = torch.from_numpy(np.array(Image.open(source.paths[number])))
            torch.testing.assert_close(found, teacher.features([image])[0], rtol=1e-4, atol=1e-5)


def test_stored_equals_online_to_rounding_on_real_images(tmp_path):
    folder = shared_data("coco128_lightly") / "images"
    paths = sorted(folder.rglob("*.jpg"))[:6]
    spec = mask2former(random=True, architecture=MASK2FORMER, shortest_edge=96, longest_edge=160)
    teacher = Teacher(spec, device="cpu", precision="fp32", max_batch=4)
    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]
    for image, feature in zip(images, teacher.features(images), strict=True):
        online = resized_features(feature, (60, 80))
        assert image.shape[2] == 3
        half, levels = (encode_map(online, dtype) for dtype in ("fp16", "int8"))
        largest = online.abs().amax(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(decode_map(half.features_EYX, None), online, rtol=2**-11, atol=2**-25)
        error = (decode_map(levels.features_EYX, levels.scales_E) - online).abs()
        assert (error <= largest / 254 * 1.0001).all()


@pytest.fixture(scope="module")
def tool():
    return load_tool("cache_teacher_features")


def small(data_root, *more):
    overrides = [item for item in SMALL if not item.startswith("optim")]
    return [*overrides, *teacher_overrides(), f"paths.data={data_root}", *more]


def test_training_on_the_cache_gives_the_losses_of_training_online(tool, data_root, tmp_path, capsys):
    out = ["--out", str(tmp_path / "cache"), "--images-per-shard", "4", "--measure", "2"]
    assert tool.main([*small(data_root), *out, "--plan-only"]) == 0
    assert not (tmp_path / "cache").exists()
    printed = capsys.readouterr().out
    for word in ("disk", "build", "reading", "step fraction"):
        assert word in printed
    assert tool.main([*small(data_root), *out]) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "sam2").iterdir()}
    # A build that was killed after two shards: the rest is computed, to the same bytes.
    for name in whole:
        if name != "plan.json" and not name.startswith(("shard_00000", "shard_00001")):
            (tmp_path / "cache" / "sam2" / name).unlink()
    (tmp_path / "cache" / "sam2" / ".writing_shard_00002.safetensors").write_bytes(b"half")
    assert tool.main([*small(data_root), *out]) == 0
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "cache" / "sam2").iterdir()}
    overrides = ("deepspeed=none", "optim.steps=2", *teacher_overrides())
    cached = [f"distillation.{name}.cache={tmp_path / 'cache' / name}" for name in ("sam2", "mask2former")]
    train(data_root, tmp_path / "online", *overrides)
    train(data_root, tmp_path / "cached", *overrides, *cached)
    for line, expected in zip(log_lines(tmp_path / "cached"), log_lines(tmp_path / "online"), strict=True):
        assert line == pytest.approx(expected, rel=2e-3)
        assert line["loss/distill/sam2"] == pytest.approx(expected["loss/distill/sam2"], rel=1e-3)


def test_a_run_rejects_the_cache_of_another_teacher_before_it_starts(tool, data_root, tmp_path):
    assert tool.main([*small(data_root), "--out", str(tmp_path / "cache"), "--measure", "1"]) == 0
    overrides = (*teacher_overrides(), "distillation.mask2former.model.shortest_edge=96")
    cached = f"distillation.mask2former.cache={tmp_path / 'cache' / 'mask2former'}"
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "deepspeed=none"]
    done = start([*command, *overrides, cached], data_root)
    assert done.returncode == 2
    assert "was made by another teacher" in done.stderr and "shortest_edge" not in done.stderr.splitlines()[-1][:40]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tool, data_root, tmp_path):
    arguments = [*small(data_root), "--images-per-shard", "3", "--measure", "1", "--dtype", "int8"]
    assert tool.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    done = start([*launcher("torchrun"), str(TOOL), *arguments, "--out", str(tmp_path / "two")], data_root)
    assert done.returncode == 0, done.stderr[-2000:]
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_tool_rejects_random_weights_and_no_teacher(tool, data_root, tmp_path, capsys):
    overrides = [item for item in small(data_root) if "allow_random" not in item]
    assert tool.main([*overrides, "--out", str(tmp_path)]) == 2
    assert "its weights are random" in capsys.readouterr().err
    assert tool.main(["experiment=quickstart", "distillation=none"]) == 2
    assert "distillation is empty" in capsys.readouterr().err


def test_a_stored_map_knows_its_scales():
    stored = StoredMap(features_EYX=torch.ones(2, 1, 1, dtype=torch.int8), scales_E=torch.tensor([0.5, 2.0]))
    assert decode_map(stored.features_EYX, stored.scales_E).flatten().tolist() == [0.5, 2.0]

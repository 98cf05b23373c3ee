"""Epochs and samples per step are converted to steps and sequences by an estimate that agrees with real streams."""

import json
import math
import shutil
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from running import load_tool
from shared_data import shared_data
from test_train import SMALL, log_lines, train

from pixel_sail import dist
from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings
from pixel_sail.data.packing_forecast import PackingForecast, forecast_packing
from pixel_sail.data.sources import coco_panoptic
from pixel_sail.files import sha256
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.assumed import Assumptions, assumed_sequences
from pixel_sail.planning.balance import SampleCost
from pixel_sail.planning.length import length_lines, length_of, with_length
from pixel_sail.training import checkpoint
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import CheckpointError, differing_leaves
from pixel_sail.training.prepare import build_mixture, check_agreement, run_identity, with_saved_length
from pixel_sail.types import DataError, Sample, Turn

ARCHITECTURE = Architecture(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, mask_dim=16)


@pytest.fixture(scope="module")
def image_processor(tokenizer):
    """For images at their full size, patches of 16 pixels."""
    return PixelSailProcessor.for_model(tokenizer, ARCHITECTURE)


class Images:
    """Images of unknown size, with texts of 10 to 300 letters."""

    name = "images"

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def get(self, index, rng):
        turn = Turn(question="what is here", answer="x" * int(rng.integers(10, 300)))
        path = self.paths[index]
        return Sample(sample_id=f"images/{index}", source="images", image_path=path, image_hw=None, turns=(turn,))


def samples_per_sequence(mixture, processor, settings, *, sequences, cost=len, num_streams=2):
    """Return the contents of sequences of the real stream, with decoded images."""
    streams = [
        islice(PackedStream(mixture, processor, settings, index=index, num_streams=num_streams, cost=cost), sequences)
        for index in range(num_streams)
    ]
    return np.mean([len(sequence.examples) for stream in streams for sequence in stream])


@pytest.mark.parametrize("kind", ["panoptic", "of unknown size"])
def test_the_estimate_agrees_with_sequences_of_real_images(image_processor, kind):
    root = shared_data("coco128_lightly")
    if kind == "panoptic":
        folder = root / "panoptic_segmentation" / "annotations"
        source = coco_panoptic.load(
            root=root / "panoptic_segmentation",
            split="train2017",
            annotations=folder / "panoptic_train2017.json",
            png_dir=folder / "panoptic_train2017",
            image_dir=root / "images" / "train2017",
        )
    else:
        source = Images(sorted((root / "images").rglob("*.jpg")))
    mixture, settings = Mixture({"images": source}, {}, seed=0), PackingSettings(seq_len=8192)
    forecast = forecast_packing(mixture, image_processor, settings)
    assert forecast.num_positions >= 256 and 0 < forecast.standard_error < 0.03 * forecast.samples_per_sequence
    found = samples_per_sequence(mixture, image_processor, settings, sequences=16)
    assert 4.0 < found < 8.0
    assert forecast.samples_per_sequence == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.packing.max_samples=2", "data.packing.packing_buffer=1"),
        ("data.packing.independent_turns=false", "data.packing.seq_len=400"),
        ("data.packing.balance=flops", "data.packing.seq_len=2000"),
        ("+data.repeats.refshapes=2.5",),
    ],
)
def test_the_estimate_agrees_with_sequences_of_synthetic_images(data_root, overrides):
    config = load_config("train", TrainConfig, [*SMALL, f"paths.data={data_root}", *overrides])
    processor = build_model(config.model, seed=0, teachers={})[1]
    mixture, settings = build_mixture(config.data, seed=0), config.data.packing
    cost = SampleCost(architecture=config.model.architecture) if settings.balance == "flops" else len
    forecast = forecast_packing(mixture, processor, settings, cost=cost)
    found = samples_per_sequence(mixture, processor, settings, sequences=60, cost=cost)
    assert found > 1.5
    assert forecast.samples_per_sequence == pytest.approx(found, rel=0.03)
    assert forecast == forecast_packing(mixture, processor, settings, cost=cost)


def test_no_image_is_opened_where_its_size_is_stated(make_sample, processor, tmp_path):
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, size_hw=(16, 24), path=tmp_path / "nowhere.jpg")[0] for _ in range(8)]

    class Source:
        name = "stated"

        def __len__(self):
            return len(samples)

        def get(self, index, rng):
            return samples[index]

    mixture = Mixture({"stated": Source()}, {}, seed=0)
    assert forecast_packing(mixture, processor, PackingSettings(seq_len=120)).samples_per_sequence > 1


@pytest.mark.parametrize("turns", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("size_hw", [(16, 24), (40, 16), None])
@pytest.mark.parametrize("independent", [True, False])
def test_a_sample_laid_out_by_size_lacks_its_pixels_only(make_sample, processor, turns, size_hw, independent):
    masks, prompts = (turns, (0, 3)) if size_hw else ((0,) * len(turns), ())
    sample, image = make_sample(np.random.default_rng(0), size_hw=size_hw, masks_per_turn=masks, prompts=prompts)
    whole = vars(processor.encode_sample(sample, image, independent_turns=independent))
    found = vars(processor.lay_out(sample, size_hw, independent_turns=independent))
    assert len(found["patches_PK"]) == 0
    for name in whole.keys() - {"patches_PK", "masks", "ignored"}:
        same = torch.equal if isinstance(whole[name], torch.Tensor) else lambda a, b: a == b
        assert same(found[name], whole[name]), name
    assert all(a is b for a, b in zip(found["masks"], whole["masks"], strict=True))


def test_a_turned_image_counts_as_training_turns_it(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 16)).save(tmp_path / "turned.jpg", exif=exif)
    mixture = Mixture({"images": Images([tmp_path / "turned.jpg"])}, {}, seed=0)
    settings = PackingSettings(seq_len=4000, max_samples=1)
    real = next(iter(PackedStream(mixture, processor, settings, index=0, num_streams=1))).examples[0]
    costs = []
    forecast_packing(mixture, processor, settings, cost=lambda example: costs.append(example.grid_hw) or 1)
    assert set(costs) == {real.grid_hw} == {(8, 2)}


def test_samples_that_cannot_be_used_are_passed_but_not_packed(make_sample, processor):
    sample = make_sample(np.random.default_rng(0), size_hw=None, masks_per_turn=(0,))[0]

    class Source:
        name = "half"

        def __len__(self):
            return 300

        def get(self, index, rng):
            if index % 3 == 0:
                raise DataError(f"item {index}: found nothing")
            return sample

    mixture = Mixture({"half": Source()}, {}, seed=0)
    settings = PackingSettings(seq_len=10_000, max_samples=2)
    forecast = forecast_packing(mixture, processor, settings, max_skipped_fraction=0.5)
    assert forecast.samples_per_sequence == 2.0 and forecast.positions_per_sequence == pytest.approx(3.0, rel=0.03)
    with pytest.raises(DataError, match="found nothing"):
        forecast_packing(mixture, processor, settings, max_skipped_fraction=0.2)


# Steps and sequences


def config_of(*overrides):
    return load_config("train", TrainConfig, ["name=x", *overrides])


def forecast_of(samples, positions=None):
    return PackingForecast(
        num_positions=4096,
        num_sequences=650,
        samples_per_sequence=samples,
        positions_per_sequence=samples if positions is None else positions,
        standard_error=0.02,
    )


WISHED = ("optim.steps=null", "optim.epochs=1", "data.global_batch_size=null", "data.samples_per_step=128")


@pytest.mark.parametrize(
    ("group", "sequences", "is_far_off"),
    [(1, 20, False), (4, 20, False), (8, 24, True), (32, 32, True), (64, 64, True)],
)
def test_sequences_are_the_multiple_that_comes_nearest_to_the_samples(group, sequences, is_far_off):
    length = length_of(config_of(*WISHED), forecast_of(6.3), items=100_000, group=group, is_assumed=False)
    assert (length.global_batch_size, length.is_far_off) == (sequences, is_far_off)
    assert length.steps == round(100_000 / (sequences * 6.3)) and length.passes == pytest.approx(1, abs=0.001)
    said = "\n".join(length_lines(length))
    assert f"{sequences} sequences, {sequences * 6.3:.1f} samples expected (128 wanted)" in said
    assert ("data.packing.max_samples" in said) == is_far_off


@pytest.mark.parametrize(("epochs", "items", "steps"), [(1, 1000, 16), (2.5, 1000, 40), (0.1, 10, 1), (1, 1, 1)])
def test_steps_go_through_the_positions_of_the_stream_as_often_as_wished(epochs, items, steps):
    config = config_of("optim.steps=null", f"optim.epochs={epochs}", "data.global_batch_size=10")
    length = length_of(config, forecast_of(5.0, positions=6.25), items=items, group=2, is_assumed=False)
    assert (length.steps, length.global_batch_size, length.samples_per_step) == (steps, 10, 50.0)


def test_given_steps_and_sequences_are_kept_and_their_epochs_reported():
    config = config_of("optim.steps=80", "data.global_batch_size=10")
    length = length_of(config, forecast_of(5.0), items=1000, group=4, is_assumed=False)
    assert (length.steps, length.global_batch_size, length.passes) == (80, 10, 4.0)
    assert length_of(config, forecast_of(5.0), items=None, group=4, is_assumed=True).passes is None


def test_passes_over_an_unknown_number_of_samples_are_rejected():
    with pytest.raises(ConfigError, match=r"data\.planned_samples=N, or a number of steps: optim\.steps=N"):
        length_of(config_of(*WISHED), forecast_of(5.0), items=None, group=1, is_assumed=True)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("optim.epochs=1",), ("optim.steps", "optim.epochs", "optim.steps=null optim.epochs=1")),
        (("optim.steps=null",), ("optim.steps", "optim.epochs", "optim.steps=100 optim.epochs=null")),
        (("data.samples_per_step=128",), ("data.global_batch_size=null data.samples_per_step=128",)),
        (("data.global_batch_size=null",), ("data.global_batch_size=32 data.samples_per_step=null",)),
        (("optim.steps=null", "optim.epochs=0"), ("optim.epochs is 0", "above 0")),
        (("optim.steps=null", "optim.epochs=-1"), ("optim.epochs is -1", "above 0")),
        (("optim.steps=null", "optim.epochs=nan"), ("optim.epochs is nan", "above 0")),
        (("optim.steps=null", "optim.epochs=inf"), ("optim.epochs is inf", "above 0")),
        (("optim.steps=0",), ("optim.steps is 0", "1 or more")),
        (("data.global_batch_size=0",), ("data.global_batch_size is 0", "1 or more")),
        (("data.global_batch_size=null", "data.samples_per_step=0"), ("data.samples_per_step is 0", "1 or more")),
    ],
)
def test_exactly_one_length_is_given_and_it_is_a_number(overrides, named):
    with pytest.raises(ConfigError) as refused:
        config_of(*overrides)
    assert all(part in str(refused.value) for part in named), refused.value


# Runs


def test_the_computed_values_are_in_the_config_with_the_requested_ones_and_identify_the_run():
    config = config_of(*WISHED)
    found = with_length(config, global_batch_size=20, steps=794)
    assert (found.optim.steps, found.optim.epochs, found.optim.num_steps) == (794, 1.0, 794)
    assert (found.data.global_batch_size, found.data.samples_per_step, found.data.resolved_batch_size) == (20, 128, 20)
    assert config.optim.steps is None and config.data.global_batch_size is None
    other = with_length(config, global_batch_size=20, steps=795)
    assert dict(differing_leaves(run_identity(asdict(found)), run_identity(asdict(other)))) == {
        "optim.steps": (794, 795)
    }
    planned = with_length(config_of(*WISHED, "data.planned_samples=5"), global_batch_size=20, steps=794)
    assert run_identity(asdict(planned)) == run_identity(asdict(found))


def test_a_checkpoint_from_before_passes_could_be_given_fits():
    now = run_identity(asdict(config_of()))
    before = json.loads(json.dumps(now))
    del before["optim"]["epochs"], before["data"]["samples_per_step"]
    assert not list(differing_leaves(before, json.loads(json.dumps(now))))


def saved_run(folder, **identity):
    """Write the files of a checkpoint that `with_saved_length` reads."""
    folder.mkdir()
    (folder / checkpoint.STATE).write_text(json.dumps({"config": identity}))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        (folder / name).touch()
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    (folder / checkpoint.MANIFEST).write_text(json.dumps({name: sha256(folder / name) for name in names}))
    return folder


def test_epochs_that_are_not_whole_steps_are_reported():
    config = config_of("optim.steps=null", "optim.epochs=0.5", "data.global_batch_size=8")
    found = length_of(config, forecast_of(5.0), items=10, group=1, is_assumed=False)
    assert found.steps == 1 and found.misses_passes
    assert "the run makes 4.000 passes over the data, not 0.5" in length_lines(found)[-1]
    assert not length_of(config, forecast_of(5.0), items=8000, group=1, is_assumed=False).misses_passes


def test_a_checkpoint_says_how_long_its_run_is(tmp_path, monkeypatch):
    saved = saved_run(tmp_path / "step_00000002", optim={"steps": 77}, data={"global_batch_size": 12})
    found = with_saved_length(config_of(*WISHED), saved)
    assert (found.optim.steps, found.data.global_batch_size) == (77, 12)
    found = with_saved_length(config_of(*WISHED[:2], "data.global_batch_size=4"), saved)
    assert (found.optim.steps, found.data.global_batch_size) == (77, 4)
    given = config_of("optim.steps=5")
    assert with_saved_length(given, saved) is given
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(
        ConfigError, match=r"a step of this run has 12 sequences.*evenly over 20 .*processes that divides"
    ):
        with_saved_length(config_of(*WISHED), saved)
    (saved / checkpoint.STATE).write_text("{")
    with pytest.raises(CheckpointError, match="Delete this checkpoint folder"):
        with_saved_length(config_of(*WISHED), saved)


def test_processes_that_find_other_lengths_stop(monkeypatch):
    config = with_length(config_of(*WISHED), global_batch_size=20, steps=794)
    check_agreement(config)
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, (795, 20)])
    with pytest.raises(ConfigError, match=r"\(794, 20\), \(795, 20\).*the same files"):
        check_agreement(config)


PASSES = (
    *("optim.steps=null", "optim.epochs=1.5", "data.global_batch_size=null", "data.samples_per_step=10"),
    *("data.micro_batch_size=1", "deepspeed=none"),
)


def test_a_run_of_passes_keeps_its_length_on_another_number_of_processes_and_with_more_data(data_root, tmp_path):
    own, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data_root, own)
    said = train(own, run_dir, *PASSES, "checkpoint.stop_after=1", by="torchrun")
    config = json.loads((run_dir / "config.json").read_text())
    steps, sequences = config["optim"]["steps"], config["data"]["global_batch_size"]
    assert config["optim"]["epochs"] == 1.5 and config["data"]["samples_per_step"] == 10
    assert sequences % 2 == 0 and steps > 1
    assert said.count(f"a step: {sequences} sequences") == 1 and f"the run: {steps} steps" in said
    with (own / "refshapes" / "refshapes" / "instances.json").open("a") as file:
        file.write("\n")
    said = train(own, run_dir, *PASSES, "checkpoint.allow_changed_data=true", "data.planned_samples=9")
    assert "on samples of the mixture" not in said
    lines = log_lines(run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["data/epoch"] == pytest.approx(1.5, abs=1.5 / steps)
    assert lines[-1]["optim/lr"] < lines[1]["optim/lr"], "the schedule ends with the run"
    identity = checkpoint.saved_config(checkpoint.latest(run_dir / "checkpoints"))
    assert (identity["optim"]["epochs"], identity["optim"]["steps"]) == (1.5, steps)
    assert (identity["data"]["samples_per_step"], identity["data"]["global_batch_size"]) == (10, sequences)


# Plans


def test_assumed_samples_are_packed_as_a_run_packs_them():
    settings = PackingSettings(seq_len=8192)
    works, forecast = assumed_sequences(ARCHITECTURE, settings, Assumptions(), rows=1)
    assert max(work.real_tokens for work in works) <= 8192
    assert sum(work.samples for work in works) / len(works) == forecast.samples_per_sequence
    # int(8192 * 0.95) // 1302 was 5; images of COCO's sizes and the best fit of eight make more of it.
    assert 6.2 < forecast.samples_per_sequence < 6.8
    filled = np.mean([work.real_tokens for work in works]) / 8192
    assert 0.93 < filled < 1.0
    capped = assumed_sequences(ARCHITECTURE, replace(settings, max_samples=4), Assumptions(), rows=2)
    assert capped[1].samples_per_sequence == 4.0 and {work.samples for work in capped[0]} == {8}
    by_work = assumed_sequences(ARCHITECTURE, replace(settings, balance="flops"), Assumptions(), rows=1)[1]
    assert by_work.samples_per_sequence < forecast.samples_per_sequence


def test_assumed_images_are_about_as_long_as_real_ones(image_processor):
    root = shared_data("coco128_lightly") / "images"
    mixture, settings = Mixture({"images": Images(sorted(root.rglob("*.jpg")))}, {}, seed=0), PackingSettings()
    real = [len(image_processor.image_span(image_processor.grid_of(_size(mixture, n))).token_ids_S) for n in range(256)]
    works, _ = assumed_sequences(ARCHITECTURE, replace(settings, max_samples=1), Assumptions(text_tokens=1), rows=1)
    assert np.mean([work.real_tokens - 1 for work in works]) == pytest.approx(np.mean(real), rel=0.03)


def _size(mixture, position):
    with Image.open(mixture.item(position).sample.image_path) as image:
        return image.height, image.width


def test_a_plan_without_files_states_what_it_assumes_of_an_epoch(capsys):
    tool = load_tool("plan_run")
    arguments = ["model=sail_0_5b", "data=refcoco", "optim.steps=null", "optim.epochs=2", "sequences=0", "gpus=8"]
    assert tool.main([*arguments, "data.planned_samples=10000"]) == 0
    said = capsys.readouterr().out
    assert "an epoch: 10,000 assumed samples" in said and "passes (2 wanted)" in said
    assert tool.main([*arguments, "data.planned_samples=null"]) == 2
    assert "data.planned_samples=N" in capsys.readouterr().err


def test_the_plan_of_a_run_is_the_length_that_it_has(data_root, monkeypatch, capsys):
    """Of the run above, had it one process."""
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    assert load_tool("plan_run").main([*SMALL, *PASSES, "gpu=cpu", "gpus=1", "sequences=4", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    config = load_config("train", TrainConfig, [*SMALL, *PASSES])
    mixture = build_mixture(config.data, seed=0)
    forecast = forecast_packing(mixture, build_model(config.model, seed=0, teachers={})[1], config.data.packing)
    length = length_of(config, forecast, items=mixture.epoch_length, group=1, is_assumed=False)
    assert plan["length"]["items"] == mixture.epoch_length
    assert (plan["length"]["steps"], plan["length"]["global_batch_size"]) == (length.steps, length.global_batch_size)
    assert plan["time"]["steps"] == length.steps and math.isclose(plan["length"]["passes"], length.passes)

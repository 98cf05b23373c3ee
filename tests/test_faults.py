"""Every fault in docs/reliability.md names a test file, and the tests that fit in no other file are here."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, start
from safetensors.torch import save_file
from test_train import SMALL, log_lines

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.images import load_image
from pixel_sail.data.packing import StreamState
from pixel_sail.files import sha256
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.training import checkpoint
from pixel_sail.training.checkpoint import CheckpointError
from pixel_sail.training.prepare import run_identity
from pixel_sail.types import Sample, Turn

PAGE = ROOT / "docs" / "reliability.md"


def rows():
    """Return the cells of every row of the tables of faults."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        row for row in cells if len(row) == 3 and row[0] not in ("fault", "what is planted") and set(row[0]) - set("-:")
    ]


def test_every_fault_has_what_happens_and_a_test_file_or_a_reason():
    assert len(rows()) > 40
    for row in rows():
        assert all(row), row
        assert re.search(r"`test_\w+\.py`|no test: ", row[2]), row


# Checkpoints


@pytest.fixture
def complete_checkpoint(tmp_path):
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        save_file({"weight": torch.ones(100)}, folder / name)
    fields = {"step": 3, "streams": [], "num_skipped": 0, "source_sums": []}
    (folder / checkpoint.STATE).write_text(json.dumps({"train_state": fields, "config": {"seed": 1}}))
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    (folder / checkpoint.MANIFEST).write_text(json.dumps({name: sha256(folder / name) for name in names}))
    (folder / checkpoint.MARKER).touch()
    assert checkpoint.read(folder, {"seed": 1})[0].step == 3
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_checkpoint_with_a_cut_or_missing_file_is_rejected_by_its_name(complete_checkpoint, name, damage):
    damage(complete_checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"(?s){complete_checkpoint}.*{name}.*Delete this checkpoint folder"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


def test_a_checkpoint_whose_hashes_lack_a_file_is_rejected(complete_checkpoint):
    manifest = complete_checkpoint / checkpoint.MANIFEST
    hashes = json.loads(manifest.read_text())
    del hashes[checkpoint.MODEL]
    manifest.write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match="expected all of"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


def test_a_key_that_the_saved_configuration_lacks_counts_as_its_default(complete_checkpoint):
    defaults = {"seed": 0, "data": {"details": "ours"}}
    now = {"seed": 1, "data": {"details": "ours"}}
    assert checkpoint.read(complete_checkpoint, now, defaults=defaults)[0].step == 3
    for changed, found in (({**now, "data": {"details": "released"}}, "data.details"), ({**now, "more": 1}, "more")):
        with pytest.raises(CheckpointError, match=rf"started with another configuration.*'{found}'"):
            checkpoint.read(complete_checkpoint, changed, defaults=defaults)
    with pytest.raises(CheckpointError, match=r"'seed': \(1, 0\)"):
        checkpoint.read(complete_checkpoint, {}, defaults=defaults)


def test_the_state_of_an_earlier_version_is_read_under_its_old_names(complete_checkpoint):
    file = complete_checkpoint / checkpoint.STATE
    saved = json.loads(file.read_text())
    del saved["train_state"]["streams"]
    saved["train_state"]["lanes"] = [{"next": 7, "waiting": [3, 5]}, {"next": 9, "waiting": []}]
    saved["config"]["data"] = {"packs_per_step": 2, "packing": {"token_budget": 64, "lookahead": 4}}
    file.write_text(json.dumps(saved))
    sealed(complete_checkpoint)
    now = {"seed": 1, "data": {"global_batch_size": 2, "packing": {"seq_len": 64, "packing_buffer": 4}}}
    state, *_ = checkpoint.read(complete_checkpoint, now)
    assert state.streams == (StreamState(next=7, waiting=(3, 5)), StreamState(next=9))
    now["data"]["packing"]["seq_len"] = 128
    with pytest.raises(CheckpointError, match=r"'data\.packing\.seq_len': \(64, 128\)"):
        checkpoint.read(complete_checkpoint, now)


STATES = {
    "a step of another folder": {"step": 4},
    "no whole number": {"step": 3.0},
    "a truth value": {"num_skipped": True},
    "a negative number": {"num_skipped": -1},
    "streams that are none": {"streams": [3]},
    "a stream without a place": {"streams": [{"waiting": []}]},
    "a stream before the first sample": {"streams": [{"next": -1, "waiting": []}]},
    "a stream that waits for words": {"streams": [{"next": 1, "waiting": ["x"]}]},
    "sums that are words": {"source_sums": [["x"]]},
    "sums that are no rows": {"source_sums": [1.0]},
}


def sealed(folder: Path) -> None:
    """Make the hashes agree with the files."""
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    (folder / checkpoint.MANIFEST).write_text(json.dumps({name: sha256(folder / name) for name in names}))


@pytest.mark.parametrize("change", STATES)
def test_a_state_of_wrong_types_is_rejected_though_its_hash_agrees(complete_checkpoint, change):
    file = complete_checkpoint / checkpoint.STATE
    saved = json.loads(file.read_text())
    saved["train_state"] |= STATES[change]
    file.write_text(json.dumps(saved))
    sealed(complete_checkpoint)
    with pytest.raises(CheckpointError, match=r"state\.json: train_state.*found .*expected .*Delete this checkpoint"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"model.safetensors": 3}', "[" * 100_000, "\0"])
def test_a_manifest_without_hashes_is_rejected(complete_checkpoint, content):
    (complete_checkpoint / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*expected .*Delete this checkpoint"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


def test_tensors_of_other_shapes_names_or_types_are_rejected_and_never_broadcast(complete_checkpoint):
    model = torch.nn.Linear(3, 2)
    sound = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    moments = {f"{key}.{name}": tensor for key in checkpoint.MOMENTS for name, tensor in sound.items()}
    checkpoint.load_parameters(model, sound)
    checkpoint.check_moments(model, moments, is_averaged=False)
    for shape in ((), (1,), (3,), (1, 3), (3, 2)):
        with pytest.raises(CheckpointError, match=r"weight.*\(2, 3\)"):
            checkpoint.load_parameters(model, sound | {"weight": torch.zeros(shape)})
        with pytest.raises(CheckpointError, match=r"exp_avg\.weight.*\(2, 3\)"):
            checkpoint.check_moments(model, moments | {"exp_avg.weight": torch.zeros(shape)}, is_averaged=False)
    assert model.weight.eq(1).all()
    for other in (moments | {"exp_avg.new": torch.ones(1)}, sound, {}):
        with pytest.raises(CheckpointError, match="moments differ in"):
            checkpoint.check_moments(model, other, is_averaged=False)
    with pytest.raises(CheckpointError, match="average"):
        checkpoint.check_moments(model, moments, is_averaged=True)
    save_file({"weight": torch.ones(100, dtype=torch.int64)}, complete_checkpoint / checkpoint.MODEL)
    sealed(complete_checkpoint)
    with pytest.raises(CheckpointError, match="expected float32"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


def test_the_condition_of_the_last_checkpoint_is_reported(complete_checkpoint):
    assert "step_00000003, are finite, the largest is 1. " in checkpoint.condition(complete_checkpoint)
    assert checkpoint.condition(None) == "there is no checkpoint yet"
    save_file({"exp_avg.weight": torch.full((2,), float("nan"))}, complete_checkpoint / checkpoint.OPTIMIZER)
    sealed(complete_checkpoint)
    assert "is not finite in ['exp_avg.weight'] itself. Delete" in checkpoint.condition(complete_checkpoint)
    with pytest.raises(CheckpointError, match=r"optimizer.*not finite.*Delete this checkpoint folder"):
        checkpoint.read(complete_checkpoint, {"seed": 1})


def test_folders_without_the_marker_are_not_checkpoints(complete_checkpoint):
    folder = complete_checkpoint.parent
    for unfinished in (".writing_step_00000004", "step_00000005"):
        (folder / unfinished).mkdir()
        (folder / unfinished / checkpoint.MODEL).write_bytes(b"half")
    assert checkpoint.latest(folder) == complete_checkpoint


def test_a_disk_full_during_a_save_keeps_the_previous_checkpoint_and_the_run_resumes_from_it(data_root, tmp_path):
    """A file size limit replaces the full disk: the third checkpoint exceeds it."""
    overrides = (*SMALL, f"run_dir={tmp_path}", "deepspeed=none", "checkpoint.every=1", "optim.steps=4")
    overrides += ("checkpoint.asynchronous=false",)
    command = [sys.executable, str(ROOT / "tests" / "faulty_run.py"), "disk", "0", "3", *overrides]
    done = start(command, data_root)
    assert done.returncode == 2 and "step_00000002 is complete" in done.stderr
    complete = checkpoint.complete_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in complete] == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "export").exists()
    (tmp_path / "checkpoints" / ".writing_step_00000003").mkdir(exist_ok=True)
    again = start([sys.executable, "scripts/train.py", *overrides], data_root)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"continuing from {complete[-1]}" in again.stderr
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def test_precision_sharding_of_the_data_and_seed_belong_to_a_run():
    def identity(*overrides):
        config = load_config("train", TrainConfig, ["experiment=quickstart", "optim=adamw", *overrides])
        return run_identity(json.loads(json.dumps(config, default=vars)))

    for changed in ("optim.precision=bf16", "data.global_batch_size=32", "seed=1", "data.packing.packing_buffer=2"):
        differing = dict(checkpoint.differing_leaves(identity(), identity(changed)))
        assert list(differing) == [changed.split("=")[0]]
    for free in (
        "deepspeed=zero3",
        "data.num_workers=5",
        "watchdog.limit_s=1",
        "log.every=3",
        "~metric_bounds.loss_at_600",
    ):
        assert identity(free) == identity()


# Images and masks, all the way into the losses

SIZES = {"one pixel": (1, 1), "one row": (1, 40), "ordinary": (16, 24)}


def losses_of(processor, tiny_model, make_batch, image, masks):
    turn = Turn(question="red", answer=" ".join(["[SEG]"] * len(masks)) or "no", masks=tuple(masks))
    hw = (image.height, image.width)
    sample = Sample(sample_id="toy/7", source="toy", image_path=None, image_hw=hw, turns=(turn,))
    batch = make_batch([processor.encode_sample(sample, image, independent_turns=False)])
    model, config = tiny_model().train(), LossConfig()
    output = model(**batch.model_inputs())
    terms = loss_sums(output, batch, config, (), {})
    loss = combine(terms, count(batch), config, ()) + output.zero_loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    return loss.item(), norm.item()


@pytest.mark.parametrize("fill", ["empty", "whole", "one pixel"])
@pytest.mark.parametrize("size", SIZES)
def test_masks_of_any_extent_in_images_of_any_size_have_finite_losses(processor, tiny_model, make_batch, size, fill):
    mask = np.full(SIZES[size], fill == "whole")
    mask[0, 0] |= fill == "one pixel"
    image = Image.new("RGB", SIZES[size][::-1], "red")
    loss, norm = losses_of(processor, tiny_model, make_batch, image, [mask])
    assert 0 < loss < 100 and 0 < norm < 1e6


@pytest.mark.parametrize("num_masks", [0, 1, 40])
def test_no_seg_and_many_seg_have_finite_losses(processor, tiny_model, make_batch, num_masks):
    masks = [np.eye(16, 24, k=shift, dtype=bool) for shift in range(num_masks)]
    loss, norm = losses_of(processor, tiny_model, make_batch, Image.new("RGB", (24, 16), "red"), masks)
    assert 0 < loss < 100 and 0 < norm < 1e6


@pytest.mark.parametrize("kind", ["CMYK", "I;16", "L", "rotated", "1x1"])
def test_unusual_image_files_reach_the_model_as_rgb(tmp_path, processor, tiny_model, make_batch, kind):
    path, exif = tmp_path / ("image.tif" if kind == "CMYK" else "image.png"), Image.Exif()
    if kind == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(np.uint16))
    else:
        image = Image.new("L" if kind in ("rotated", "1x1") else kind, (1, 1) if kind == "1x1" else (24, 16))
    if kind == "rotated":
        exif[0x0112] = 6
    image.save(path, exif=exif)
    opened = load_image(path, where="toy/7")
    assert opened.mode == "RGB" and opened.size == {"rotated": (16, 24), "1x1": (1, 1)}.get(kind, (24, 16))
    mask = np.ones((opened.height, opened.width), dtype=bool)
    loss, norm = losses_of(processor, tiny_model, make_batch, opened, [mask])
    assert np.isfinite([loss, norm]).all()

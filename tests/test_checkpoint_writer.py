"""Background checkpoint writing: the same bytes, no silent error, no partial file under a final name."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, free_port
from torch import nn

from pixel_sail.training import checkpoint_writer
from pixel_sail.training.checkpoint import (
    CheckpointError,
    TrainState,
    checkpoint_name,
    complete_checkpoints,
    latest,
    not_finite,
    read,
    step_of,
)
from pixel_sail.training.checkpoint_writer import CheckpointWriter, superseded

ACCELERATOR = SimpleNamespace(unwrap_model=lambda model: model)
CONFIG = {"seed": 0}


def trained(size=4, seed=0):
    """A model after one step of AdamW, with its optimizer."""
    torch.manual_seed(seed)
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return model, optimizer


def writer_to(folder, *, keep=2, asynchronous=True):
    return CheckpointWriter(folder, config=CONFIG, keep=keep, asynchronous=asynchronous, device=torch.device("cpu"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hold_writing(monkeypatch):
    """Block file writes until the returned event is set."""
    go_on, original = threading.Event(), checkpoint_writer.save_file

    def held(*arguments):
        assert go_on.wait(30)
        original(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_file", held)
    return go_on


def test_background_and_foreground_write_the_same_bytes_while_training_continues(tmp_path, monkeypatch):
    model, optimizer = trained()
    with writer_to(tmp_path / "sync", asynchronous=False) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        assert latest(tmp_path / "sync") is not None, "a synchronous save is on disk when it returns"
    go_on = hold_writing(monkeypatch)
    with writer_to(tmp_path / "async") as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        optimizer.step()
        writer.check()
        assert latest(tmp_path / "async") is None, "saved before it was written"
        go_on.set()
    assert files_of(tmp_path / "async" / "step_00000001") == files_of(tmp_path / "sync" / "step_00000001")
    _, parameters, _ = read(tmp_path / "async" / "step_00000001", CONFIG)
    assert not torch.equal(parameters["weight"], model.weight), "the step after the save changed the model"


def test_the_next_save_waits_for_the_previous_one(tmp_path, monkeypatch):
    model, optimizer = trained()
    go_on = hold_writing(monkeypatch)
    with writer_to(tmp_path) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        writer.save(TrainState(step=2), model, optimizer, ACCELERATOR)
        assert (tmp_path / "step_00000001" / "COMPLETE").is_file()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_an_error_of_the_training_waits_for_the_writing(tmp_path, monkeypatch):
    model, optimizer = trained()
    go_on = hold_writing(monkeypatch)
    with pytest.raises(ZeroDivisionError), writer_to(tmp_path) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        threading.Timer(0.2, go_on.set).start()
        raise ZeroDivisionError
    assert latest(tmp_path) is not None


@pytest.fixture
def small_files():
    """Limit files to 64 kB; beyond that, writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_error_ends_the_run_and_names_the_last_complete_checkpoint(tmp_path, small_files, asynchronous):
    small, large = trained(4), trained(400)
    writer = writer_to(tmp_path, asynchronous=asynchronous)
    writer.save(TrainState(step=1), *small, ACCELERATOR)
    writer.wait()
    with pytest.raises(CheckpointError, match=r"step_00000002: not written: .*step_00000001 is complete"):
        writer.save(TrainState(step=2), *large, ACCELERATOR)
        # In the background: a later step's check raises the error.
        for _ in range(3000):
            writer.check()
            time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_background_error_is_reported_even_if_training_fails_too(tmp_path, small_files, caplog):
    with pytest.raises(ZeroDivisionError), writer_to(tmp_path) as writer:
        writer.save(TrainState(step=2), *trained(400), ACCELERATOR)
        raise ZeroDivisionError
    assert "step_00000002: not written" in caplog.text and "no checkpoint is complete yet" in caplog.text


def test_a_clean_exit_still_raises_the_error_of_the_last_save(tmp_path, small_files):
    with pytest.raises(CheckpointError, match="not written"), writer_to(tmp_path) as writer:
        writer.save(TrainState(step=2), *trained(400), ACCELERATOR)


@pytest.mark.parametrize("spoil", ["weight", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, spoil):
    model, optimizer = trained()
    with writer_to(tmp_path, asynchronous=False) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        tensor = model.weight if spoil == "weight" else optimizer.state[model.weight][spoil]
        tensor.data[1, 2] = float("nan") if spoil == "weight" else float("inf")
        with pytest.raises(CheckpointError, match=rf"not finite, among them .*{spoil}.*step_00000001 is the last"):
            writer.save(TrainState(step=2), model, optimizer, ACCELERATOR)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_large_values_whose_sum_overflows_are_finite():
    assert not_finite({"large": torch.full((9,), 3e38), "sound": torch.ones(3), "empty": torch.ones(0)}) == []
    assert not_finite({"opposite": torch.tensor([float("inf"), float("-inf")])}) == ["opposite"]


RANK = """
import resource, sys, types, torch
from pathlib import Path
from torch import distributed, nn
from pixel_sail import dist
from pixel_sail.training.checkpoint import CheckpointError, TrainState
from pixel_sail.training.checkpoint_writer import CheckpointWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
distributed.init_process_group("gloo")
model = nn.Linear(40, 40)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 40)).sum().backward()
optimizer.step()
accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
writer = CheckpointWriter(Path(sys.argv[1]), config={}, keep=1, asynchronous=True, device=torch.device("cpu"))
try:
    writer.save(TrainState(step=1), model, optimizer, accelerator)
    while True:
        writer.check()
except CheckpointError as error:
    print(error)
dist.shutdown()
"""


def test_every_rank_learns_that_rank_0_could_not_write(tmp_path):
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0] for process in ranks)
    assert "step_00000001: not written" in first
    assert "rank 0 could not write a checkpoint" in second


def test_rotation_keeps_the_newest_and_never_deletes_the_one_just_written(tmp_path):
    model, optimizer = trained()
    with writer_to(tmp_path, keep=2) as writer:
        for step in (1, 2, 3):
            writer.save(TrainState(step=step), model, optimizer, ACCELERATOR)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    # Checkpoints of later steps, wherever they come from, do not supersede an earlier one.
    assert superseded(tmp_path, tmp_path / "step_00000002", 1) == []
    assert superseded(tmp_path, tmp_path / "step_00000003", 1) == [tmp_path / "step_00000002"]


@pytest.mark.parametrize("name", ["step_00000003_best", "step_00000004.bak", "step_5", "step_0000000006", "step_x"])
def test_copies_under_other_names_are_neither_counted_nor_deleted_nor_resumed_from(tmp_path, name):
    model, optimizer = trained()
    with writer_to(tmp_path, keep=1, asynchronous=False) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
        for step in (2, 3):
            writer.save(TrainState(step=step), model, optimizer, ACCELERATOR)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000003"]
    assert files_of(tmp_path / name).keys() == files_of(tmp_path / "step_00000003").keys()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / checkpoint_name(step)).mkdir()
        (tmp_path / checkpoint_name(step) / "COMPLETE").touch()
    assert [step_of(path.name) for path in complete_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_leftovers_of_a_killed_process_are_ignored_and_removed_at_the_next_start(tmp_path):
    model, optimizer = trained()
    with writer_to(tmp_path) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
    for prefix in (".writing_", ".deleting_"):
        left = tmp_path / f"{prefix}step_00000002"
        left.mkdir()
        (left / "COMPLETE").touch()
    found = latest(tmp_path)
    assert found is not None and found.name == "step_00000001"
    writer_to(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_an_incomplete_folder_of_the_final_name_is_replaced(tmp_path):
    model, optimizer = trained()
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "model.safetensors").write_bytes(b"half")
    with writer_to(tmp_path) as writer:
        writer.save(TrainState(step=1), model, optimizer, ACCELERATOR)
    state, parameters, moments = read(tmp_path / "step_00000001", CONFIG)
    assert state.step == 1 and torch.equal(parameters["weight"], model.weight)
    assert torch.equal(moments["exp_avg.bias"], optimizer.state[model.bias]["exp_avg"])
    assert set(json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())) == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }

"""A run that fails on its data rolls back to its checkpoint and skips that data, deterministically."""

import json
import sys
from dataclasses import asdict
from itertools import islice

import pytest
from running import ROOT, start
from test_train import SMALL, log_lines, train

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.data.loader import training_batches
from pixel_sail.data.packing import StreamState
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import CheckpointError, TrainState
from pixel_sail.training.finite import NonFiniteLossError
from pixel_sail.training.prepare import build_mixture, stream_assignment
from pixel_sail.training.rollback import ROLLBACKS_FILE, behind_rollbacks, rollback

OVERRIDES = ("deepspeed=none", "checkpoint.every=2", "checkpoint.max_rollbacks=1")


def sizes_of_steps(num_steps):
    """Return tokens, supervised tokens and masks of the first steps of the data."""
    config = load_config("train", TrainConfig, [*SMALL, "run_dir=unused"])
    processor = build_model(config.model, seed=0, teachers={})[1]
    assignment = stream_assignment(config.data)
    steps = training_batches(
        build_mixture(config.data, seed=0),
        processor,
        config.data.packing,
        assignment,
        start=[StreamState()] * assignment.num_streams,
        num_workers=0,
    )
    sizes = []
    for step in islice(steps, num_steps):
        tokens = sum(int((batch.sample_index_BT >= 0).sum()) for batch in step.batches)
        supervised = sum(len(batch.targets_M) for batch in step.batches)
        sizes.append((tokens, supervised, sum(len(batch.masks) for batch in step.batches)))
    return sizes


def test_a_run_rolls_back_to_its_checkpoint_and_skips_the_data_it_failed_on(data_root, tmp_path, monkeypatch):
    command = [sys.executable, str(ROOT / "tests" / "faulty_run.py"), "loss", "0", "4", *SMALL, f"run_dir={tmp_path}"]
    done = start([*command, *OVERRIDES], data_root)
    assert done.returncode == 85, done.stderr[-4000:]
    assert "are not finite" in done.stderr and "Rollback 1 of 1: the same command resumes from step 2" in done.stderr
    train(data_root, tmp_path, *OVERRIDES, "checkpoint.stop_after=1")
    train(data_root, tmp_path, *OVERRIDES)
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    of_data = sizes_of_steps(8)
    assert len(set(of_data)) == 8, "steps must differ to be distinguished"
    found = [(line["data/tokens"], line["data/supervised_tokens"], line["data/masks"]) for line in log_lines(tmp_path)]
    assert found == of_data[:2] + of_data[4:8]
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_notes_of_an_earlier_version_count(tmp_path):
    error = NonFiniteLossError("losses are not finite")
    note = {"from_step": 2, "failed_step": 3, "lanes": [asdict(StreamState(next=7))]}
    (tmp_path / "rewinds.jsonl").write_text(json.dumps(note) + "\n")
    assert behind_rollbacks(tmp_path, TrainState(step=2)).streams == (StreamState(next=7),)
    ending = rollback(tmp_path, error, from_step=2, failed_step=4, streams=[StreamState(next=9)], limit=2)
    assert "Rollback 2 of 2" in str(ending)
    assert behind_rollbacks(tmp_path, TrainState(step=2)).streams == (StreamState(next=9),)


def test_rollbacks_are_counted(tmp_path):
    error = NonFiniteLossError("losses are not finite")
    streams = [StreamState(next=7, waiting=(3, 5)), StreamState(next=9)]
    for number in (1, 2):
        ending = rollback(tmp_path, error, from_step=2, failed_step=2 + number, streams=streams[-number:], limit=2)
        assert f"Rollback {number} of 2" in str(ending)
    with pytest.raises(NonFiniteLossError, match="had its 2 rollbacks"):
        rollback(tmp_path, error, from_step=2, failed_step=9, streams=streams, limit=2)
    assert len((tmp_path / ROLLBACKS_FILE).read_text().splitlines()) == 2
    assert behind_rollbacks(tmp_path, TrainState(step=2)).streams == tuple(streams)
    assert behind_rollbacks(tmp_path, TrainState(step=4)) == TrainState(step=4)
    with pytest.raises(
        ConfigError, match=r"a run with 2 streams of data, this start would have 4; start it on as many"
    ):
        behind_rollbacks(tmp_path, TrainState(step=2, streams=(StreamState(),) * 4))
    with pytest.raises(NonFiniteLossError, match=r"not finite$"):
        rollback(tmp_path / "none", error, from_step=0, failed_step=1, streams=streams, limit=0)
    assert json.loads((tmp_path / ROLLBACKS_FILE).read_text().splitlines()[1])["reason"] == "losses are not finite"


def test_a_note_of_an_earlier_version_is_read_and_one_without_streams_rejected(tmp_path):
    note = {"from_step": 2, "failed_step": 3, "lanes": [{"next": 7, "waiting": [3]}], "reason": "not finite"}
    (tmp_path / ROLLBACKS_FILE).write_text(json.dumps(note) + "\n")
    assert behind_rollbacks(tmp_path, TrainState(step=2)).streams == (StreamState(next=7, waiting=(3,)),)
    del note["lanes"]
    (tmp_path / ROLLBACKS_FILE).write_text(json.dumps(note) + "\n")
    with pytest.raises(CheckpointError, match=r"line 1: found no 'streams'"):
        behind_rollbacks(tmp_path, TrainState(step=2))

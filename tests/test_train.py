"""Training end to end through the command line: exact resumption, every launcher, clear failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ROOT, environment, free_port, launcher, start

from pixel_sail.provenance import code_version
from pixel_sail.renamed import current_log_line
from pixel_sail.training.log import TIMING_FIELDS

SMALL = (
    "experiment=quickstart",
    # The plain optimizer, no teacher, and both sources.
    "optim=adamw",
    "distillation=none",
    "deepspeed=zero2",
    "data.repeats.groupshapes=0.5",
    "model.architecture.initializer_range=0.02",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.mask_dim=16",
    "data.sources.refshapes.expressions_per_image=3",
    "data.sources.groupshapes.expressions_per_image=2",
    "data.packing.max_samples=0",
    "data.packing.seq_len=256",
    "data.packing.packing_buffer=3",
    "data.global_batch_size=4",
    "data.micro_batch_size=2",
    "loss.points.num_points=64",
    "optim.steps=6",
    "log.every=1",
    "log.tensorboard=false",
    "log.progress=false",
    "evals=[]",
)


def train(data_root: Path, run_dir: Path, *overrides: str, by: str = "python") -> str:
    done = start([*launcher(by), "scripts/train.py", *SMALL, f"run_dir={run_dir}", *overrides], data_root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def log_lines(run_dir: Path) -> list[dict]:
    lines = [current_log_line(json.loads(line)) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def test_six_steps_equal_three_steps_and_three_more_bit_for_bit(data_root, tmp_path):
    train(data_root, tmp_path / "whole", "data.num_workers=2", "deepspeed=none")
    train(data_root, tmp_path / "parts", "data.num_workers=2", "deepspeed=none", "checkpoint.stop_after=3")
    assert len(log_lines(tmp_path / "parts")) == 3
    said = train(data_root, tmp_path / "parts", "data.num_workers=1", "deepspeed=none", "name=renamed")
    assert "is the run 'quickstart', now called 'renamed'" in said
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")
    weights = [tmp_path / run / "export" / "model.safetensors" for run in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    starts = [json.loads(line) for line in (tmp_path / "parts" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 3]
    assert "checkpoint.stop_after=3" in starts[0]["command"] and "checkpoint.stop_after=3" not in starts[1]["command"]
    for made_by in starts:
        assert made_by["code"] == code_version() and made_by["packages"]["torch"] == torch.__version__
        assert made_by["world_size"] == 1 and made_by["device"].startswith("cpu")


def test_two_processes_with_sharded_optimizer_continue_bit_for_bit(data_root, tmp_path):
    train(data_root, tmp_path / "whole", by="torchrun")
    train(data_root, tmp_path / "parts", "checkpoint.stop_after=3", by="torchrun")
    train(data_root, tmp_path / "parts", by="torchrun")
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")
    weights = [tmp_path / run / "export" / "model.safetensors" for run in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_killed_run_resumes_with_the_same_log(data_root, tmp_path):
    overrides = ("deepspeed=none", "optim.steps=30", "checkpoint.every=4")
    train(data_root, tmp_path / "whole", *overrides)
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'killed'}", *overrides]
    log_file = tmp_path / "killed" / "log.jsonl"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(data_root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_lines(log_file, 10, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(data_root, tmp_path / "killed", *overrides)
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "by"), [(signal.SIGUSR1, "python"), (signal.SIGUSR2, "python"), (signal.SIGTERM, "ranks")]
)
def test_a_signal_ends_the_run_after_a_checkpoint_with_its_own_status(data_root, tmp_path, number, by):
    """SIGUSR1 and SIGUSR2 as Slurm sends them, to data workers as well; SIGTERM to one of two training processes."""
    overrides = ("optim.steps=30", "data.num_workers=2", "deepspeed=none" if by == "python" else "deepspeed=zero2")
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", *overrides]
    port = free_port()
    ranks = [{}] if by == "python" else [rank_variables(rank, 2, port=port) for rank in range(2)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(data_root) | own,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for own in ranks
    ]
    wait_for_lines(tmp_path / "run" / "log.jsonl", 3, processes)
    send = os.kill if number == signal.SIGTERM else os.killpg
    send(processes[-1].pid, number)
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [85] * len(ranks), messages
    assert all("which is saved; run the same command to resume" in message for message in messages)
    stopped = len(log_lines(tmp_path / "run"))
    assert 3 <= stopped < 30
    train(data_root, tmp_path / "run", *overrides, by="python" if by == "python" else "torchrun")
    train(data_root, tmp_path / "whole", *overrides, by="python" if by == "python" else "torchrun")
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def rank_variables(rank: int, world_size: int, *, port: int) -> dict[str, str]:
    variables: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    # One thread, as torchrun sets it: other numbers of threads sum in another order.
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in variables.items()}


def wait_for_lines(log_file: Path, number: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not (log_file.is_file() and len(log_file.read_text().splitlines()) >= number):
        assert all(process.poll() is None for process in processes), "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_activation_checkpointing_changes_no_number(data_root, tmp_path):
    train(data_root, tmp_path / "plain", "deepspeed=none", "optim.steps=3")
    overrides = ("deepspeed=none", "optim.steps=3", "optim.activation_checkpointing=layers")
    train(data_root, tmp_path / "again", *overrides, "checkpoint.stop_after=1")
    train(data_root, tmp_path / "again", *overrides[:2])
    assert log_lines(tmp_path / "again") == log_lines(tmp_path / "plain")


def test_half_precision_stays_close_to_single_precision(data_root, tmp_path):
    train(data_root, tmp_path / "fp32", "optim.steps=3", by="torchrun")
    train(data_root, tmp_path / "bf16", "optim.precision=bf16", "optim.steps=3", by="torchrun")
    for line, expected in zip(log_lines(tmp_path / "bf16"), log_lines(tmp_path / "fp32"), strict=True):
        assert line["loss/total"] != expected["loss/total"]
        assert line["loss/total"] == pytest.approx(expected["loss/total"], rel=0.03)


def test_a_changed_checkpoint_is_rejected_by_name(data_root, tmp_path):
    train(data_root, tmp_path / "run", "deepspeed=none", "checkpoint.stop_after=1")
    (weights,) = (tmp_path / "run" / "checkpoints").rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = start(
        [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "deepspeed=none"], data_root
    )
    assert done.returncode == 2
    assert "model.safetensors: sha256" in done.stderr and "manifest.json" in done.stderr


def test_bad_samples_within_the_allowed_fraction_are_listed_and_left_out(data_root, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data_root, broken)
    images = sorted((broken / "refshapes" / "images" / "train2014").glob("*.jpg"))[:2]
    for path in images:
        path.unlink()
    overrides = ("data.max_skipped_fraction=0.5", "deepspeed=none", "optim.steps=8", "data.num_workers=2")
    train(broken, tmp_path / "whole", *overrides)
    skipped = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert {Path(line["reason"].split(": ")[1]).name for line in skipped} == {path.name for path in images}
    assert {line["source"] for line in skipped} == {"refshapes", "groupshapes"}
    assert log_lines(tmp_path / "whole")[-1]["data/skipped"] == len(skipped)
    train(broken, tmp_path / "parts", *overrides, "checkpoint.stop_after=5")
    train(broken, tmp_path / "parts", *overrides)
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")


def test_every_kind_of_dataset_trains_in_one_mixture(data_root, tmp_path):
    tiny = [item for item in SMALL if not item.startswith(("data.sources", "data.repeats", "experiment"))]
    overrides = ("name=all", "model=tiny", "data=refshapes_all", *tiny, "data.packing.seq_len=2048")
    command = [sys.executable, "scripts/train.py", *overrides, f"run_dir={tmp_path / 'run'}", "deepspeed=none"]
    done = start([*command, "optim.steps=25"], data_root)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = log_lines(tmp_path / "run")
    seen = {key.split("/")[0] for line in lines for key in line if key.endswith("/samples")} - {"data"}
    assert len(seen) == 18
    assert all(line["data/skipped"] == 0 for line in lines)


def test_every_launcher_starts_the_same_run(data_root, tmp_path):
    for name in ("python", "torchrun", "accelerate", "deepspeed"):
        train(data_root, tmp_path / name, "optim.steps=3", by=name)
    first = log_lines(tmp_path / "torchrun")
    assert len(first) == 3
    # Launchers give their processes different numbers of threads, and one process sums in another order than two: the
    # last digits may differ. One process also groups the rows otherwise, which changes their padding and nothing else.
    for name in ("accelerate", "deepspeed", "python"):
        for line, expected in zip(log_lines(tmp_path / name), first, strict=True):
            without_padding = {key: value for key, value in line.items() if key != "data/padding_fraction"}
            assert without_padding == pytest.approx({key: expected[key] for key in without_padding}, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples(data_root, tmp_path):
    overrides = ("deepspeed=none", "optim.lr=1e30", "optim.warmup_fraction=0", "checkpoint.every=1")
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", *overrides]
    done = start(command, data_root)
    assert done.returncode == 2
    assert "not finite" in done.stderr and "shapes/train/image=" in done.stderr
    assert not list((tmp_path / "run").rglob(".writing_*"))


def test_a_used_run_folder_is_rejected_when_it_must_be_new(data_root, tmp_path):
    train(data_root, tmp_path / "run", "deepspeed=none", "optim.steps=1")
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "checkpoint.resume=never"]
    done = start([*command, "deepspeed=none"], data_root)
    assert done.returncode == 2 and "checkpoint.resume=never" in done.stderr


def test_a_run_is_not_continued_with_another_configuration(data_root, tmp_path):
    train(data_root, tmp_path / "run", "deepspeed=none", "checkpoint.stop_after=1")
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "deepspeed=none"]
    done = start([*command, "optim.lr=0.5"], data_root)
    assert done.returncode == 2
    assert "optim.lr" in done.stderr and "0.5" in done.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bad_image_ends_the_run_with_its_name(data_root, tmp_path, damage):
    broken = tmp_path / "data"
    shutil.copytree(data_root, broken)
    for path in (broken / "refshapes" / "images" / "train2014").glob("*.jpg"):
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:400])
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "deepspeed=none"]
    done = start(command, broken)
    assert done.returncode == 2, done.stderr[-2000:]
    message = done.stderr.splitlines()[-1]
    assert message.startswith("DataError:") and "COCO_train2014_" in message and "shapes/train/image=" in message
    assert not (tmp_path / "run" / "export").exists()


def test_an_unknown_key_ends_before_anything_is_written(data_root, tmp_path):
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "optim.learning=1"]
    done = start(command, data_root)
    assert done.returncode == 2 and "optim.learning" in done.stderr
    assert not (tmp_path / "run").exists()

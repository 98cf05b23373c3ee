"""--dry-run makes the first step of the run and leaves no trace in the run folder."""

import re
import shutil
import sys

from running import start
from test_train import SMALL, log_lines, train


def folder_state(folder):
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_dry_run_makes_the_next_step_of_the_run_and_writes_nothing(data_root, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={run_dir}", "deepspeed=none", "--dry-run"]
    fresh = start(command, data_root)
    assert fresh.returncode == 0, fresh.stderr[-4000:]
    assert not run_dir.exists()
    train(data_root, run_dir, "deepspeed=none", "checkpoint.stop_after=2", "checkpoint.every=1")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    before = folder_state(run_dir)
    continued = start(command, data_root)
    assert continued.returncode == 0, continued.stderr[-4000:]
    assert folder_state(run_dir) == before
    for step, shown in ((1, fresh.stdout), (2, continued.stdout)):
        line = log_lines(run_dir)[step - 1]
        losses = re.search(rf"^step {step}: total ([\d.]+), text ([\d.]+), bce ([\d.]+), dice ([\d.]+)", shown, re.M)
        assert losses is not None, shown
        assert list(losses.groups()) == [f"{line[name]:.4g}" for name in ("total", "text", "bce", "dice")]
        assert f"{line['samples']} samples, {line['tokens']} tokens" in shown
    assert "would start from random weights" in fresh.stdout
    assert f"would continue from {run_dir}/checkpoints/step_00000001" in continued.stdout
    for said in ("72,960 parameters", "memory: at most", "s computing", "checkpoints/, 0.9 MB each", str(run_dir)):
        assert said in fresh.stdout

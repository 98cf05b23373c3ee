"""--dry-run takes the next step of the run and writes nothing to the run folder."""

import re
import shutil
import sys

from running import start
from test_train import SMALL, log_lines, train


def folder_state(folder):
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_dry_run_makes_the_next_step_of_the_run_and_writes_nothing(data_root, tmp_path):
    run_dir = tmp_path / "run"
    train(data_root, run_dir, "deepspeed=none", "checkpoint.stop_after=2", "checkpoint.every=1")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    before = folder_state(run_dir)
    done = start(
        [sys.executable, "scripts/train.py", *SMALL, f"run_dir={run_dir}", "deepspeed=none", "--dry-run"], data_root
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert folder_state(run_dir) == before
    line = log_lines(run_dir)[1]
    losses = re.search(r"^step 2: total ([\d.]+), text ([\d.]+), bce ([\d.]+), dice ([\d.]+)", done.stdout, re.M)
    assert losses is not None, done.stdout
    assert list(losses.groups()) == [f"{line[f'loss/{name}']:.4g}" for name in ("total", "text", "bce", "dice")]
    assert f"{line['data/samples']} samples, {line['data/tokens']} tokens" in done.stdout
    assert re.search(r"^the run: 6 steps, [\d.]+ passes$", done.stdout, re.M), done.stdout
    assert f"would continue from {run_dir}/checkpoints/step_00000001" in done.stdout
    for said in ("72,960 parameters", "memory: at most", "s computing", "checkpoints/, 0.9 MB each", str(run_dir)):
        assert said in done.stdout

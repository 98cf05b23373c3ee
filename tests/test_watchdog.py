"""A stalled run ends by itself, reports where every rank was, and leaves no process behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from running import BIN, ROOT, environment, free_port
from test_train import SMALL

FAULTY = str(ROOT / "tests" / "faulty_run.py")
LIMITS = ("watchdog.limit_s=4", "watchdog.slow_factor=1.5")


def run_to_its_end(command: list[str], data_root: Path) -> tuple[int, str]:
    """Return exit status and stderr of a command; no process of its session may outlive it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(data_root), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, stderr = process.communicate(timeout=280)
    deadline = time.monotonic() + 10
    while left := processes_of_session(process.pid):
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.1)
    return process.returncode, stderr


def processes_of_session(session: int) -> list[str]:
    """Return the command lines of the living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # pid (name) state ppid group session ...; the name may hold anything.
                state, _, _, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(own_session) == session and state != "Z":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended in between
    return found


def test_a_sample_that_is_never_read_ends_the_run_with_its_name(data_root, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, FAULTY, "item", "0", "4", *SMALL, f"run_dir={run_dir}", "deepspeed=none", *LIMITS]
    status, stderr = run_to_its_end([*command, "data.num_workers=2"], data_root)
    assert status == 86, stderr[-4000:]
    report = (run_dir / "stalled" / "rank0.txt").read_text()
    assert "s of it waiting for data; the limit is 6 s (watchdog.limit_s)" in report
    assert "refshapes, item 4 (position " in report
    assert "in training_batches" in report, "the stack of the waiting process"
    assert "in item_or_sleep" in stderr, "the stack of the data worker"
    assert "is stalled" in stderr and str(run_dir / "stalled" / "rank0.txt") in stderr


def test_one_stuck_rank_of_two_ends_both_and_each_leaves_its_report(data_root, tmp_path):
    run_dir = tmp_path / "run"
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"]
    # The first steps may be slow on a busy machine, but not the fourth.
    limits = (LIMITS[0], "watchdog.slow_factor=10")
    command = [*torchrun, FAULTY, "stuck", "1", "4", *SMALL, f"run_dir={run_dir}", *limits]
    status, stderr = run_to_its_end(command, data_root)
    assert status == 1 and "exitcode: 86" in stderr, stderr[-4000:]
    waiting, stuck = ((run_dir / "stalled" / f"rank{rank}.txt").read_text() for rank in range(2))
    for report in (waiting, stuck):
        assert "step 4 is stalled" in report and "of it computing; the limit is 4 s" in report
        assert "samples in hand:\n  " in report and "shapes/train/image=" in report
    assert "in spoiled" in stuck and "in sum_over_ranks" in waiting


HOLDING_THE_LOCK = """
import ctypes, pathlib, sys
from pixel_sail.config import WatchdogConfig
from pixel_sail.training import watchdog
watchdog.GRACE_S = 0.1
with watchdog.Watchdog(pathlib.Path(sys.argv[1]), WatchdogConfig(limit_s=0.5, slow_factor=1.0)) as watched:
    watched.begin_step(1)
    ctypes.PyDLL(None).sleep(3600)
"""


def test_a_c_function_that_never_returns_to_python_is_ended_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HOLDING_THE_LOCK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr and 'File "<string>", line 8' in done.stderr


WITHIN_LIMITS = """
import pathlib, sys, time
from pixel_sail.config import WatchdogConfig
from pixel_sail.training import watchdog
watchdog.GRACE_S = 0.1
folder = pathlib.Path(sys.argv[1])
with watchdog.Watchdog(folder, WatchdogConfig(limit_s=0)) as watched:
    watched.begin_step(1)
    time.sleep(0.5)
print("no limit")
for last in (3, 4):
    with watchdog.Watchdog(folder, WatchdogConfig(limit_s=0.5, slow_factor=8)) as watched:
        for step in range(1, 4):
            watched.begin_step(step)
            watched.data_loaded(["a"])
            time.sleep(1.0 if step == 1 else 0.0)
        watched.begin_other("saving")
        time.sleep(1.0)
        if last == 4:
            watched.begin_step(4)
            time.sleep(3600)
    time.sleep(1.0)
    print("after the end")
"""


def test_first_steps_and_saves_may_take_longer_and_nothing_is_watched_afterwards(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_LIMITS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 86, done.stderr
    assert done.stdout.splitlines() == ["no limit", "after the end"]
    report = (tmp_path / "stalled" / "rank0.txt").read_text()
    assert "step 4 is stalled" in report and "waiting for data; the limit is 0.5 s" in report

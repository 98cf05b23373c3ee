"""One run per folder: a second one gets an error that names the holder, and a killed run releases the lock."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from running import ROOT, launcher, start
from test_train import SMALL

from pixel_sail.config import ConfigError
from pixel_sail.training.run_lock import LOCK_FILE, RunLock

HOLDER = """
import os, pathlib, sys, time
from pixel_sail.training.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)  # as a data worker that outlives its training process for a while
    os._exit(0)
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path, and has a child, as training processes do."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_folder_in_use_is_rejected_on_every_rank_until_its_holder_is_killed(data_root, tmp_path, holder):
    command = [*launcher("torchrun"), "scripts/train.py", *SMALL, f"run_dir={tmp_path}"]
    done = start(command, data_root)
    refusal = f"ConfigError: run_dir {tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since "
    assert done.returncode == 1
    assert done.stderr.count(refusal) == 2, done.stderr[-4000:]
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE}
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_an_unfinished_note_of_the_holder_is_no_obstacle(tmp_path, holder):
    with (tmp_path / LOCK_FILE).open("w") as file:
        file.write('{"host": "nod')
    with pytest.raises(ConfigError, match="is in use by another process"):
        RunLock(tmp_path)


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    RunLock(tmp_path)
    assert "file system without locks" in caplog.text and "No locks available" in caplog.text


def test_a_folder_that_cannot_be_made_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        RunLock(tmp_path / "file" / "run")

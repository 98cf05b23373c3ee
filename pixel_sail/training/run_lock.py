"""Locks a folder so that only one run uses it.

`training/prepare.py` acquires the lock on rank 0, and `evaluation/run.py` that of its output folder. It is a lock of
the kernel, which is released when the process that holds it ends for any reason. The text in the file is informative:

    runs/<name>/.lock    {"host": "node7", "pid": 4711, "since": "2030-05-04 13:07:55"}

POSIX record locks, not flock: data workers would inherit a flock and keep it after the training process was killed, and
more network file systems support record locks.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pixel_sail import dist
from pixel_sail.config import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of file systems without locks."""


class RunLock:
    """Exclusive lock of a folder; hold it for the whole run or evaluation."""

    def __init__(self, run_dir: Path, *, name: str = "run_dir") -> None:
        """Acquire the lock on rank 0; every rank must call it. `name` is the setting of the folder.

        Raises: ConfigError, on every rank, if another process holds it.
        """
        self._name = name
        self._file: TextIO | None = None
        refusal = self._take(run_dir) if dist.rank() == 0 else None
        refusal = dist.gather_objects(refusal)[0]
        if refusal is not None:
            raise ConfigError(refusal)

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, run_dir: Path) -> str | None:
        """Return why the lock cannot be acquired, None on success."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = (run_dir / LOCK_FILE).open("a+", errors="replace")
        except OSError as error:
            return f"{self._name} {run_dir} cannot be written to ({error}); use another one"
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    "%s %s is on a file system without locks (%s), which cannot keep out a second run; make sure "
                    "that there is only one",
                    self._name,
                    run_dir,
                    error,
                )
                return None
            file.seek(0)
            return (
                f"{self._name} {run_dir} is in use by {_holder(file.read())} ({error}); wait for that run to end, end "
                f"it, or choose another {self._name}"
            )
        try:
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}) + "\n")
            file.flush()
        except OSError as error:
            # Closing tries again to write the rest.
            with suppress(OSError):
                file.close()
            return f"run_dir {run_dir} cannot be written to ({error}); free disk space, or use another one"
        self._file = file
        return None


def _holder(text: str) -> str:
    """Return who holds a lock, from the text in its file, which may be incomplete."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")

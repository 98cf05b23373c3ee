"""One run per folder.

`training/loop.py` takes the lock on rank 0 before anything is read from or written to the folder, and
`evaluation/run.py` that of the folder it writes its answers to. The lock is the kernel's and ends with the process that
holds it, however that ends; the text in the file only says who it is:

    runs/<name>/.lock    {"host": "node7", "pid": 4711, "since": "2030-05-04 13:07:55"}

POSIX record locks, not flock: data workers would inherit a flock and hold it on after a training process was killed,
and network file systems know record locks more often.
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
"""What file systems answer that have no locks."""


class RunLock:
    """The right to write to a folder; keep it as long as the run or the evaluation lasts."""

    def __init__(self, run_dir: Path, *, name: str = "run_dir") -> None:
        """Take the lock, on rank 0; every rank must call it. `name` is the setting that chose the folder.

        Raises: ConfigError, on every rank, when another process holds it.
        """
        self._name = name
        self._file: TextIO | None = None
        refusal = self._take(run_dir) if dist.rank() == 0 else None
        refusal = dist.gather_objects(refusal)[0]
        if refusal is not None:
            raise ConfigError(refusal)

    def release(self) -> None:
        """Let another run have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, run_dir: Path) -> str | None:
        """Return why the folder cannot be had, None where it is ours now."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = (run_dir / LOCK_FILE).open("a+", errors="replace")
        except OSError as error:
            return f"{self._name} {run_dir} cannot be written to ({error}); choose another one"
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    "%s %s lies on a file system without locks (%s): nothing keeps a second run out of it; see to "
                    "it that there is one only",
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
            # Closing tries to write the rest again.
            with suppress(OSError):
                file.close()
            return f"run_dir {run_dir} cannot be written to ({error}); make room, or choose another one"
        self._file = file
        return None


def _holder(text: str) -> str:
    """Return who holds a lock, from what it wrote into the file; that may be unfinished."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")

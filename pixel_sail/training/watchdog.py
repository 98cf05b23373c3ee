"""Ends a stalled run and writes a report for debugging.

`training/loop.py` reports the current phase to the watchdog of its rank, and a thread checks the time. Every rank has a
watchdog, so ranks that wait for a stuck one end too. The report of rank 1:

    runs/<name>/stalled/rank1.txt    "rank 1 (node7, process 4711): step 57 is stalled, 1801 s of it waiting for data
                                     ...", samples being read, samples in hand, stacks of all threads

The thread needs the GIL. If a C function never releases it, faulthandler's timer writes the stacks to stderr a little
later and ends the process with status 1.
"""

import contextlib
import faulthandler
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path

from pixel_sail import dist
from pixel_sail.config import WatchdogConfig
from pixel_sail.training.preemption import STALLED_STATUS

logger = logging.getLogger(__name__)

FOLDER = "stalled"

FIRST_STEPS = 3
"""First steps of a session with `slow_factor` times the limit: kernels are autotuned and files are not cached."""

GRACE_S = 5.0
"""Seconds from the report of a rank to its exit, in which the other ranks write theirs."""

DUMP_S = 0.2
"""Seconds for a data worker to write its stacks."""


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """Current phase of a rank."""

    phase: str = "starting"
    step: int = 0
    since: float = 0.0
    phase_since: float = 0.0
    limit_s: float = math.inf
    sample_ids: tuple[str, ...] = ()


class Watchdog:
    """Context manager that watches one rank; disabled if `limit_s` is 0."""

    def __init__(self, run_dir: Path, config: WatchdogConfig, being_read: Callable[[], Sequence[str]] = tuple) -> None:
        """`being_read`: returns the names of the samples that data workers are reading."""
        self._file = run_dir / FOLDER / f"rank{dist.rank()}.txt"
        self._config = config
        self._being_read = being_read
        self._watched = _Watched()
        self._steps_begun = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Start watching; an old report of this rank is deleted."""
        self._file.unlink(missing_ok=True)
        if self._config.limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def begin_step(self, step: int) -> None:
        """Start the clock of an optimizer step, which begins by waiting for its data."""
        self._steps_begun += 1
        self._begin("waiting for data", step, is_slow=self._steps_begun <= FIRST_STEPS)

    def data_loaded(self, sample_ids: Sequence[str]) -> None:
        """Record that the step is computing, and its samples; the step's clock keeps running."""
        self._watched = replace(
            self._watched, phase="computing", phase_since=time.monotonic(), sample_ids=tuple(sample_ids)
        )

    def begin_other(self, phase: str) -> None:
        """Start the clock of a phase that follows a step: saving, validating."""
        self._begin(phase, self._watched.step, is_slow=True)

    def _begin(self, phase: str, step: int, *, is_slow: bool) -> None:
        limit_s = self._config.limit_s * (self._config.slow_factor if is_slow else 1.0)
        now = time.monotonic()
        self._watched = replace(
            self._watched, phase=phase, step=step, since=now, phase_since=now, limit_s=limit_s or math.inf
        )
        if limit_s > 0:
            faulthandler.dump_traceback_later(limit_s + 4 * GRACE_S, exit=True)

    def _watch(self) -> None:
        """Wait for the end of the run or the time limit."""
        while not self._ended.wait(min(1.0, self._config.limit_s / 4)):
            watched = self._watched
            if time.monotonic() - watched.since > watched.limit_s:
                try:
                    self._report(watched)
                    time.sleep(GRACE_S)
                finally:
                    # A stuck worker would not notice that this process ended.
                    _signal_children(signal.SIGKILL)
                    os._exit(STALLED_STATUS)

    def _report(self, watched: _Watched) -> None:
        """Write this rank's report and log one message. A failed write must not keep the process alive."""
        now = time.monotonic()
        message = (
            f"rank {dist.rank()} ({socket.gethostname()}, process {os.getpid()}): step {watched.step} is stalled, "
            f"{now - watched.phase_since:.0f} s of it {watched.phase}; the limit is {watched.limit_s:g} s "
            "(watchdog.limit_s)"
        )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("w") as file:
                self._write(file, message, watched)
            message += f"; {self._file} has stacks and samples"
        except OSError as error:
            faulthandler.dump_traceback(sys.stderr)
            message += f"; its report could not be written: {error}"
        logger.error(
            "%s. The process ends with status %d; the last complete checkpoint is intact", message, STALLED_STATUS
        )
        # Data workers write their stacks to stderr in pieces; two at once would mix within a line.
        _signal_children(signal.SIGUSR2, pause_s=DUMP_S)

    def _write(self, file: TextIOWrapper, message: str, watched: _Watched) -> None:
        file.write(f"{message}\n\n")
        for title, names in (
            ("samples that are being read:", self._being_read()),
            ("samples in hand:", watched.sample_ids),
        ):
            file.write("\n  ".join((title, *(names or ("none",)))) + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def _signal_children(number: signal.Signals, *, pause_s: float = 0.0) -> None:
    """Send a signal to the data workers, with a pause after each."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended in between
                os.kill(child.pid, number)
            time.sleep(pause_s)

"""Where the numbers of a run are expected, judged while it runs.

Place in the flow: `training/loop.py` shows every step's logged numbers to one `Corridor`. A band is judged once, by the
first value at its step or later:

    corridor.early_loss: {metric: total, after: 400, high: 1.6}
    step 400, total 2.31  ->  a warning, and {"step": 400, "corridor": {"early_loss": "total is 2.31 ..."}} in the log

With `action: stop` the step is saved and the run ends. Started again, it ends again by the same line of its log, until
the band is changed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixel_sail import dist
from pixel_sail.config import BandConfig
from pixel_sail.errors import ExpectedError
from pixel_sail.training.log import RunLog, lines_up_to

logger = logging.getLogger(__name__)


class LeftCorridorError(ExpectedError, RuntimeError):
    """A number of the run is not where it was expected, and its band says stop."""


class Corridor:
    """The bands of a run. Every rank has one and sees the same numbers."""

    def __init__(self, bands: Mapping[str, BandConfig], log_file: Path, *, start: int) -> None:
        """`log_file`: of a run that goes on after step `start`; what it holds is judged already.

        Every rank must call it. Raises: LeftCorridorError where that ended the run before.
        """
        self._bands = dict(bands)
        self._open = dict(bands)
        if not bands:
            return
        past = lines_up_to(log_file, start) if dist.rank() == 0 else []
        for line in dist.gather_objects(past)[0]:
            stop = self._stop(self._judge(line["step"], line))
            if stop is not None:
                raise LeftCorridorError(
                    f"{stop}. That ended the run before; change the band, set its action to warn, or begin a new run"
                )

    def judge(self, step: int, log: RunLog) -> str | None:
        """Judge the numbers logged since the last call; return the finding that ends the run, None to go on."""
        findings = self._judge(step, log.take_numbers())
        if findings:
            log.note(step, {"corridor": findings})
        if dist.rank() == 0:
            for finding in findings.values():
                logger.warning(finding)
        return self._stop(findings)

    def finish(self, step: int) -> None:
        """Say which bands never met their number."""
        for name, band in self._open.items():
            if band.after <= step and dist.rank() == 0:
                logger.warning("corridor.%s was not judged: no %s was logged", name, band.metric)

    def _judge(self, step: int, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Return, by band, what is wrong with the numbers of a step; bands that were judged are done with."""
        findings = {}
        for name, band in list(self._open.items()):
            if step < band.after or band.metric not in numbers:
                continue
            del self._open[name]
            value = numbers[band.metric]
            low = float("-inf") if band.low is None else band.low
            high = float("inf") if band.high is None else band.high
            if not low <= value <= high:  # NaN is outside as well
                findings[name] = (
                    f"corridor.{name}: {band.metric} is {value:.4g} at step {step}, expected {low:g} .. {high:g}; "
                    "configuration, data or code differ from those the band was made with"
                )
        return findings

    def _stop(self, findings: Mapping[str, str]) -> str | None:
        return next((finding for name, finding in findings.items() if self._bands[name].action == "stop"), None)

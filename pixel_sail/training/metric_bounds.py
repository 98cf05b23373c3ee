"""Where the numbers of a run are expected, judged while it runs.

`training/loop.py` shows every step's logged numbers to one `MetricBounds`. A bound is judged once, by the first value
at its step or later:

    metric_bounds.early_loss: {metric: loss/total, after: 400, high: 1.6}
    step 400, loss/total 2.31  ->  a warning, and in the log {"step": 400, "metric_bounds": {"early_loss": "..."}}

With `action: stop` the step is saved and the run ends. Started again, it ends again by the same line of its log, until
the bound is changed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixel_sail import dist
from pixel_sail.config import MetricBoundConfig
from pixel_sail.errors import ExpectedError
from pixel_sail.training.log import RunLog, lines_up_to

logger = logging.getLogger(__name__)


class MetricOutOfBoundsError(ExpectedError, RuntimeError):
    """A number of the run is not where it was expected, and its bound says stop."""


class MetricBounds:
    """The bounds of a run. Every rank has them and sees the same numbers."""

    def __init__(self, bounds: Mapping[str, MetricBoundConfig], log_file: Path, *, start: int) -> None:
        """`log_file`: of a run that goes on after step `start`; what it holds is judged already.

        Every rank must call it. Raises: MetricOutOfBoundsError where that ended the run before.
        """
        self._bounds = dict(bounds)
        self._open = dict(bounds)
        if not bounds:
            return
        past = lines_up_to(log_file, start) if dist.rank() == 0 else []
        for line in dist.gather_objects(past)[0]:
            stop = self._stop(self._judge(line["step"], line))
            if stop is not None:
                raise MetricOutOfBoundsError(
                    f"{stop}. That ended the run before; change the bound, set its action to warn, or begin a new run"
                )

    def judge(self, step: int, log: RunLog) -> str | None:
        """Judge the numbers logged since the last call; return the finding that ends the run, None to go on."""
        findings = self._judge(step, log.take_numbers())
        if findings:
            log.note(step, {"metric_bounds": findings})
        if dist.rank() == 0:
            for finding in findings.values():
                logger.warning(finding)
        return self._stop(findings)

    def finish(self, step: int) -> None:
        """Say which bounds never met their number."""
        for name, bound in self._open.items():
            if bound.after <= step and dist.rank() == 0:
                logger.warning("metric_bounds.%s was not judged: no %s was logged", name, bound.metric)

    def _judge(self, step: int, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Return, by bound, what is wrong with the numbers of a step; bounds that were judged are done with."""
        findings = {}
        for name, bound in list(self._open.items()):
            if step < bound.after or bound.metric not in numbers:
                continue
            del self._open[name]
            value = numbers[bound.metric]
            low = float("-inf") if bound.low is None else bound.low
            high = float("inf") if bound.high is None else bound.high
            if not low <= value <= high:  # NaN is outside as well
                findings[name] = (
                    f"metric_bounds.{name}: {bound.metric} is {value:.4g} at step {step}, expected {low:g} .. {high:g}"
                    "; configuration, data or code differ from those the bound was made with"
                )
        return findings

    def _stop(self, findings: Mapping[str, str]) -> str | None:
        return next((finding for name, finding in findings.items() if self._bounds[name].action == "stop"), None)

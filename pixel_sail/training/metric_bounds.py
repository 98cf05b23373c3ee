"""Metric bounds: checks logged metrics against intervals during the run.

`training/loop.py` passes every step's logged metrics to one `MetricBounds`. A bound is checked once, with the first
value at or after its step:

    metric_bounds.early_loss: {metric: loss/total, after: 400, high: 1.6}
    step 400, loss/total 2.31  ->  a warning, and in the log {"step": 400, "metric_bounds": {"early_loss": "..."}}

With `action: stop` a checkpoint is saved and the run exits. A restart exits again, because of the same line of its log,
until the bound is changed.
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
    """A metric violates a bound with `action: stop`."""


class MetricBounds:
    """The bounds of a run. Every rank checks the same metrics."""

    def __init__(self, bounds: Mapping[str, MetricBoundConfig], log_file: Path, *, start: int) -> None:
        """`log_file`: log of a run that resumes after step `start`; its lines count as checked.

        Every rank must call it. Raises: MetricOutOfBoundsError if one of them ended the run.
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
                    f"{stop}. This ended the run; change the bound, set its action to warn, or begin a new run"
                )

    def check(self, step: int, log: RunLog) -> str | None:
        """Check the metrics logged since the last call; return the finding that ends the run, None to continue."""
        findings = self._judge(step, log.take_numbers())
        if findings:
            log.note(step, {"metric_bounds": findings})
        if dist.rank() == 0:
            for finding in findings.values():
                logger.warning(finding)
        return self._stop(findings)

    def finish(self, step: int) -> None:
        """Warn of bounds whose metric was never logged."""
        for name, bound in self._open.items():
            if bound.after <= step and dist.rank() == 0:
                logger.warning("metric_bounds.%s was not checked: no %s was logged", name, bound.metric)

    def _judge(self, step: int, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Return the violations of a step by bound; checked bounds are removed from the open ones."""
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

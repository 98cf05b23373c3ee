"""What a person sees of a running training: a bar on a terminal, plain lines elsewhere.

Place in the flow: `RunLog` of rank 0 owns one `Progress` and tells it of every step and every line of numbers. Where
stderr is no terminal, as under Slurm, each logged step is one line of the program's log:

    step 120/1650: total 1.210, bce 0.420, dice 0.680, lr 1.9e-03, grad_norm 0.90, 31,204 tokens/s, 07:12 left
    step 500/1650, refshapes_val: ciou 0.612, giou 0.701
"""

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

logger = logging.getLogger(__name__)

NUMBERS = {"total": ".3f", "bce": ".3f", "dice": ".3f", "lr": ".1e", "grad_norm": ".2f"}
"""Numbers of a plain line and their format."""

SCORES = ("ciou", "giou")
"""Scores of a validation that are shown."""


class Progress:
    """Steps done out of `steps`, on stderr."""

    def __init__(self, *, steps: int, start: int, shown: bool) -> None:
        self.steps = steps
        self.start = start
        self.shown = shown
        self.started = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=steps, initial=start, unit="step", mininterval=1.0, dynamic_ncols=True)
            if shown and is_terminal
            else None
        )

    def step_done(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show one line of numbers, of a training step or of a validation."""
        if not self.shown:
            return
        is_training = "total" in values
        if self._bar is None:
            logger.info(
                training_line(step, self.steps, values, self.seconds_left(step))
                if is_training
                else validation_line(step, self.steps, values)
            )
        elif is_training:
            shown = {name: f"{values[name]:.3f}" for name in ("total", "bce", "dice") if name in values}
            if "tokens_per_s" in values:
                shown["tokens/s"] = f"{values['tokens_per_s']:,.0f}"
            self._bar.set_postfix(shown, refresh=False)
        else:
            self._bar.write(validation_line(step, self.steps, values), file=sys.stderr)

    def seconds_left(self, step: int) -> float:
        """Return how long the rest of the run takes if it goes on like this session, validations included."""
        return (time.monotonic() - self.started) / max(step - self.start, 1) * (self.steps - step)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def training_line(step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """Return the plain line of a logged step."""
    parts = [f"{name} {values[name]:{form}}" for name, form in NUMBERS.items() if name in values]
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    return f"step {step}/{steps}: " + ", ".join([*parts, f"{tqdm.format_interval(seconds_left)} left"])


def validation_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Return the plain line of a validation, whose values are named <eval>/<score>."""
    names = [name.rpartition("/") for name in values]
    evals = ", ".join(dict.fromkeys(group for group, _, _ in names))
    scores = [f"{score} {values[f'{group}/{score}']:.3f}" for group, _, score in names if score in SCORES]
    return f"step {step}/{steps}, {evals}: " + ", ".join(scores)

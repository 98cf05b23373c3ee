"""The learning rate as a pure function of the step, so the schedule has no state to save.

`training/loop.py` sets it before every step. With 1,000 steps, warm-up 0.05 and lr 4e-5:

    cosine                          step 0 has 8e-7, step 49 has 4e-5, step 524 about 2e-5, step 999 about 0
    wsd, the last 0.2 of the steps  step 0 has 8e-7, steps 49 .. 800 have 4e-5, step 900 has 2e-5, step 999 has 2e-7

With wsd (warm-up, stable, decay), the rates up to a stable step do not depend on the number of following steps.
"""

import math

from pixel_sail.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then cosine decay, or a constant rate and
    linear decay, to `final_lr`."""
    steps = config.num_steps
    warmup, decay_start = _phases(config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(max(step - decay_start, 0) / max(steps - decay_start, 1), 1.0)
    left = 1.0 - progress if config.schedule == "wsd" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr + (config.lr - config.final_lr) * left


def is_stable(step: int, config: OptimConfig) -> bool:
    """Return whether `step` is in the stable phase of wsd, in which the length of the run may change."""
    warmup, decay_start = _phases(config)
    return config.schedule == "wsd" and warmup <= step <= decay_start


def _phases(config: OptimConfig) -> tuple[int, int]:
    """Return the number of warm-up steps, and the step at which the decay begins."""
    steps = config.num_steps
    warmup = round(config.warmup_fraction * steps)
    return warmup, max(warmup, steps - round(config.decay_fraction * steps)) if config.schedule == "wsd" else warmup

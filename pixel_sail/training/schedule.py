"""The learning rate as a pure function of the step, so that nothing about it needs saving.

`training/loop.py` sets it before every step. With 1,000 steps, warm-up 0.05 and lr 4e-5:

    cosine                          step 0 has 8e-7, step 49 has 4e-5, step 524 about 2e-5, step 999 about 0
    wsd, the last 0.2 of the steps  step 0 has 8e-7, steps 49 .. 800 have 4e-5, step 900 has 2e-5, step 999 has 2e-7

What wsd (warm-up, stable, decay) has done up to a stable step does not depend on how many steps follow.
"""

import math

from pixel_sail.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then decay to `final_lr`, along a cosine or
    late and linear."""
    steps = config.num_steps
    warmup, decay_start = _phases(config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(max(step - decay_start, 0) / max(steps - decay_start, 1), 1.0)
    left = 1.0 - progress if config.schedule == "wsd" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr + (config.lr - config.final_lr) * left


def is_stable(step: int, config: OptimConfig) -> bool:
    """Return whether warm-up is over and no decay has begun after so many steps, so that the run may become longer or
    shorter."""
    warmup, decay_start = _phases(config)
    return config.schedule == "wsd" and warmup <= step <= decay_start


def _phases(config: OptimConfig) -> tuple[int, int]:
    """Return the steps of the warm-up, and the step from which on the rate decays."""
    steps = config.num_steps
    warmup = round(config.warmup_fraction * steps)
    return warmup, max(warmup, steps - round(config.decay_fraction * steps)) if config.schedule == "wsd" else warmup

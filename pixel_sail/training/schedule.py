"""The learning rate as a pure function of the step, so that nothing about it needs saving.

Place in the flow: `training/loop.py` sets it before every step. With 1,000 steps, warm-up 0.05 and lr 4e-5: step 0 has
8e-7, step 49 has 4e-5, step 524 about 2e-5, step 999 about 0.
"""

import math

from pixel_sail.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then cosine decay to `final_lr`."""
    steps = config.num_steps
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

"""Exponential moving average (EMA) of the weights, stored in the optimizer's state.

`training/loop.py` calls `update_average` after each step. The optimizer owns the float32 master weights, sharded or
not. The average is sharded the same way, and `training/checkpoint.py` gathers, saves and restores it like Adam's
moments:

    optimizer.state[weight] == {"step": 3.0, "exp_avg": ..., "exp_avg_sq": ..., "average": ...}

Frozen weights equal their average and have none.
"""

import torch
from torch import Tensor

AVERAGE = "average"
"""Name of the entry."""

WARM_UP = 10
"""Warm-up of the decay: after n steps it is at most n / (n + WARM_UP), so that the initial weights fade."""


@torch.no_grad()
def update_average(owned: list[Tensor], states: dict[Tensor, dict[str, Tensor]], *, decay: float, step: int) -> None:
    """Update the average with this step's weights.

    owned: the tensors that the optimizer updates; states: their optimizer states; step: finished steps before this one.
    """
    memory = min(decay, step / (step + WARM_UP))
    for weight in owned:
        state = states[weight]
        if AVERAGE not in state:
            state[AVERAGE] = torch.zeros_like(weight, dtype=torch.float32)
        state[AVERAGE].lerp_(weight.detach().float(), 1.0 - memory)

"""An exponential moving average of the weights, kept as one more entry of the optimizer's state.

`training/loop.py` calls `update_average` after each step. What the optimizer owns are the float32 values that are
trained, sharded or not, so the average is sharded the same way, and `training/checkpoint.py` gathers, saves and
restores it as it does with Adam's moments:

    optimizer.state[weight] == {"step": 3.0, "exp_avg": ..., "exp_avg_sq": ..., "average": ...}

Frozen weights equal their average and have none.
"""

import torch
from torch import Tensor

AVERAGE = "average"
"""Name of the entry."""

WARM_UP = 10
"""Steps over which the memory grows: after n steps it is at most n / (n + WARM_UP), so that starting weights fade."""


@torch.no_grad()
def update_average(owned: list[Tensor], states: dict[Tensor, dict[str, Tensor]], *, decay: float, step: int) -> None:
    """Take this step's weights into the average.

    owned: the tensors that the optimizer updates, states: its state of each, step: finished steps before this one.
    """
    memory = min(decay, step / (step + WARM_UP))
    for weight in owned:
        state = states[weight]
        if AVERAGE not in state:
            state[AVERAGE] = torch.zeros_like(weight, dtype=torch.float32)
        state[AVERAGE].lerp_(weight.detach().float(), 1.0 - memory)

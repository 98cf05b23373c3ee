"""One optimizer that uses Muon for the matrices listed in `roles.py` and AdamW for all other parameters.

`optim.py` builds it instead of AdamW; groups marked `ORTHOGONAL` use Muon. The update is that of
`torch.optim.Muon(nesterov=True, adjust_lr_fn="match_rms_adamw")`: the momentum with all singular values near 1
(0.7 .. 1.2), times 0.2 sqrt(longer side), which matches the RMS of AdamW's updates.

    gradient [64, 256] -> momentum -> orthogonal [64, 256], every entry about 1/16 -> x 0.2 sqrt(256) -> about 0.2

A weight with more than two axes is flattened to a matrix, first axis against all others. Without ZeRO and in stage 0
the optimizer holds whole weights. In stages 1 and 2 it holds this rank's shard of each flattened group: the momentum is
sharded, gathered once per step, and each rank orthogonalizes the matrices that overlap its shard. Gradients are clipped
before, as for AdamW.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import AdamW, Optimizer

ORTHOGONAL = "orthogonal"
"""Key of a parameter group, and attribute of the tensors in it."""

MOMENTUM = "momentum_buffer"
"""Name of Muon's only state, as in torch."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of Keller Jordan's quintic Newton-Schulz iteration, as in torch: fast and approximate."""

SMALLEST_NORM = 1e-7
STACK_ELEMENTS = 64 * 2**20
"""Maximum elements in a stack of matrices, unless a single matrix has more."""


@dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """Offsets of a group's weights in ZeRO's flat buffer, for example two of shape [2, 3] at 0 and 8."""

    shapes: tuple[torch.Size, ...]
    starts: tuple[int, ...]
    ranks: Any
    """Process group over whose ranks the buffer is sharded equally."""
    device: torch.device
    """Device of the weights; the buffer itself may be offloaded."""


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return rows and columns of a weight seen as a matrix."""
    return shape[0], shape[1:].numel()


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of Newton-Schulz: bfloat16 suffices, but is not faster on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def update_scale(shape: torch.Size) -> float:
    """Return the factor that scales an orthogonal matrix to the RMS of AdamW's updates (match_rms_adamw)."""
    return 0.2 * math.sqrt(max(matrix_shape(shape)))


def orthogonal(stack_KRC: Tensor, num_steps: int) -> Tensor:
    """Return matrices with the singular vectors of the given ones and singular values near 1."""
    a, b, c = COEFFICIENTS
    is_tall = stack_KRC.shape[1] > stack_KRC.shape[2]
    x = stack_KRC.mT if is_tall else stack_KRC
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonal_all(matrices: Sequence[Tensor], num_steps: int) -> list[Tensor]:
    """Return the orthogonalized matrices; those of equal shape are computed as a batch."""
    alike: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(index)
    found: dict[int, Tensor] = {}
    for shape, indices in alike.items():
        size = max(1, STACK_ELEMENTS // shape.numel())
        for part in (indices[start : start + size] for start in range(0, len(indices), size)):
            results = orthogonal(torch.stack([matrices[index] for index in part]), num_steps)
            found |= dict(zip(part, results, strict=True))
    return [found[index] for index in range(len(matrices))]


class MuonAdamW(AdamW):
    """AdamW, bit for bit, for groups that are not `ORTHOGONAL`; groups that are need `momentum` and `ns_steps`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update. ZeRO calls it once per group, with only that group in `param_groups`."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group[ORTHOGONAL]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group[ORTHOGONAL] and "layout" in group:
                self._step_flat(group, group["layout"])
            elif group[ORTHOGONAL]:
                self._step_whole(group)
        return loss

    def _step_whole(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        dtype = working_dtype(weights[0].device) if weights else None
        matrices = [self._smoothed(weight, group).to(dtype).flatten(1) for weight in weights]
        for weight, matrix in zip(weights, orthogonal_all(matrices, group["ns_steps"]), strict=True):
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            weight.add_(matrix.reshape(weight.shape), alpha=-group["lr"] * update_scale(weight.shape))

    def _step_flat(self, group: dict[str, Any], layout: FlatLayout) -> None:
        (cut,) = group["params"]
        if cut.grad is None:
            return
        whole, first = _gathered(self._smoothed(cut, group), layout)
        last = first + len(cut)
        own = [
            (start, shape)
            for start, shape in zip(layout.starts, layout.shapes, strict=True)
            if start < last and first < start + shape.numel()
        ]
        matrices = [whole[start : start + shape.numel()].view(matrix_shape(shape)) for start, shape in own]
        update = torch.zeros_like(cut)
        for (start, shape), matrix in zip(own, orthogonal_all(matrices, group["ns_steps"]), strict=True):
            begin, end = max(start, first), min(start + shape.numel(), last)
            part = matrix.reshape(-1)[begin - start : end - start]
            update[begin - first : end - first] = part.to(cut.device, cut.dtype) * update_scale(shape)
        cut.mul_(1.0 - group["lr"] * group["weight_decay"])
        cut.add_(update, alpha=-group["lr"])

    def _smoothed(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the momentum with the gradient; return the Nesterov average."""
        assert weight.grad is not None
        state = self.state[weight]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(weight)
        gradient = weight.grad.to(weight.dtype)
        state[MOMENTUM].lerp_(gradient, 1.0 - group["momentum"])
        return gradient.lerp(state[MOMENTUM], group["momentum"])


def _gathered(cut: Tensor, layout: FlatLayout) -> tuple[Tensor, int]:
    """Return the gathered buffer in the dtype of Newton-Schulz, and the offset of this rank's shard."""
    own = cut.to(layout.device, working_dtype(layout.device))
    whole = own.new_empty(len(own) * distributed.get_world_size(layout.ranks))
    distributed.all_gather_into_tensor(whole, own, group=layout.ranks)
    return whole, distributed.get_rank(layout.ranks) * len(own)


def mark(weights: Iterable[Tensor]) -> None:
    """Mark tensors whose state belongs to Muon."""
    for weight in weights:
        setattr(weight, ORTHOGONAL, True)


def is_marked(weight: Tensor) -> bool:
    """Return whether a tensor's state belongs to Muon."""
    return getattr(weight, ORTHOGONAL, False)


def find_layouts(optimizer: Optimizer) -> None:
    """Set the layouts of Muon's groups after DeepSpeed flattened them (stages 1 and 2 of DeepSpeed 0.19)."""
    wrapper: Any = optimizer
    while not hasattr(wrapper, "round_robin_bit16_groups") and hasattr(wrapper, "optimizer"):
        wrapper = wrapper.optimizer
    for index, group in enumerate(wrapper.param_groups):
        if not group.get(ORTHOGONAL, False):
            continue
        if hasattr(wrapper, "round_robin_bit16_groups"):
            weights = wrapper.round_robin_bit16_groups[index]
            group["layout"] = FlatLayout(
                shapes=tuple(weight.shape for weight in weights),
                starts=tuple(wrapper.round_robin_bit16_offsets[index]),
                ranks=wrapper.real_dp_process_group[index],
                device=weights[0].device,
            )
        mark(group["params"])

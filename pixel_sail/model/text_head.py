"""The text head: next-token logits, or the loss of given targets without keeping the logits.

`modeling_pixel_sail` calls it on the states of supervised positions. With 600 such positions and a vocabulary of
151,680 the logits would be 364 MB in float32, held three times. In chunks of 256 rows they take 155 MB temporarily
and are recomputed in the backward pass.

Axis letters: M positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 256
"""Number of positions whose logits are in memory at a time."""


class TextHead(nn.Linear):
    """A linear layer without bias from states to vocabulary."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(self, states: Tensor, targets_M: Tensor | None = None) -> Tensor:
        """Return logits [..., V], or with targets the cross-entropy of every position [M] in float32.

        The losses are computed here and not in `losses/`, because ZeRO-3 gathers the weight for this call only.
        """
        if targets_M is None:
            return super().forward(states)
        device = states.device.type
        weight = self.weight
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            states, weight = states.to(dtype), weight.to(dtype)
        losses: Tensor = ChunkedCrossEntropy.apply(states, weight, targets_M, CHUNK)
        return losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `states @ weight.T` at targets, in chunks of rows, in float32."""

    @staticmethod
    def forward(ctx: Any, states_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, chunk: int) -> Tensor:
        """Return the loss of every row [M]. Keeps the states and one number per row."""
        losses, log_sums = [states_MD.new_zeros(0, dtype=torch.float32)], [states_MD.new_zeros(0, dtype=torch.float32)]
        for rows_MD, own_M in zip(states_MD.split(chunk), targets_M.split(chunk), strict=True):
            if not len(own_M):
                continue
            logits_MV = F.linear(rows_MD, weight_VD).float()
            log_sum_M = logits_MV.logsumexp(1)
            losses.append(log_sum_M - logits_MV.gather(1, own_M[:, None])[:, 0])
            log_sums.append(log_sum_M)
        ctx.save_for_backward(states_MD, weight_VD, targets_M, torch.cat(log_sums))
        ctx.chunk = chunk
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of states and weight."""
        states_MD, weight_VD, targets_M, log_sums_M = ctx.saved_tensors
        (upstream_M,) = gradients
        grad_states_MD = torch.zeros_like(states_MD)
        grad_weight_VD = torch.zeros_like(weight_VD)
        for first in range(0, len(targets_M), ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            grad_MV = F.linear(states_MD[rows], weight_VD).float().sub_(log_sums_M[rows, None]).exp_()
            one_hot_M1 = targets_M[rows, None]
            grad_MV.scatter_add_(1, one_hot_M1, grad_MV.new_full((1, 1), -1.0).expand(len(one_hot_M1), 1))
            grad_MV = grad_MV.mul_(upstream_M[rows, None]).to(states_MD.dtype)
            grad_states_MD[rows] = grad_MV @ weight_VD
            grad_weight_VD.addmm_(grad_MV.T, states_MD[rows])
        return grad_states_MD, grad_weight_VD, None, None

"""CPU attention for many short independent questions about small images.

`attention_backends.attention_backend` selects it if it computes fewest scores. A dense mask over an image of 66 tokens
and 32 questions of 16 has 334,000 scores per head, most of them masked. Here the image is one product, 66 x 66, and the
questions are two, 512 x 66 and 32 times 16 x 16: 46,000 scores with as many operations as for one question. Samples
are padded to equal sizes inside a layer's attention only.

Axis letters: B rows, T tokens, N all tokens of all rows, M slots of the padded layout, I samples, P shared tokens of a
sample (its image, and text before its branches), R branches, L tokens of a branch, A heads, G key-value heads, E head
width, Q heads of a key-value head times tokens of a branch, Z remaining axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixel_sail.model.decoder import attend
from pixel_sail.types import SampleSpan


def padded_sizes(spans: Sequence[SampleSpan]) -> tuple[int, int, int, int]:
    """Return the padded sizes (samples, shared tokens, branches, tokens of a branch)."""
    lengths = [length for span in spans for length in span.branches]
    shared = max(span.image + span.shared for span in spans)
    return len(spans), shared, max(len(span.branches) for span in spans), max(lengths, default=0)


SCORES_PER_CALL = 10_000
"""Fixed cost of each call of `segments` (slices, copies, kernel start; forward and backward), in scores of a head under
a dense mask."""
WEIGHT_OF_BRANCHES = 2.5
"""Cost of one branch score in `turns`, which writes scores to memory, in the same unit. Both numbers from
`tools/bench_small_step.py` at 5, 16 and 32 questions per image, see docs/performance.md."""


def fastest_on_cpu(spans: Sequence[SampleSpan], shape: tuple[int, int]) -> str:
    """Return the fastest CPU backend for rows [B, T]: dense, turns or segments.

    One row of 1,332 with one conversation has 1.77 million scores under a dense mask and 1.62 million in two calls.
    """
    if not spans:
        return "dense"
    samples, shared, branches, length = padded_sizes(spans)
    calls = needed = 0
    for span in spans:
        seen = span.image + span.shared
        calls += bool(span.image) + bool(span.shared) + len(span.branches)
        needed += span.image**2 + span.shared * seen + sum(own * (seen + own) for own in span.branches)
    scores = {
        "dense": shape[0] * shape[1] ** 2,
        "turns": samples * (shared**2 + WEIGHT_OF_BRANCHES * branches * length * (shared + length)),
        "segments": needed + SCORES_PER_CALL * calls,
    }
    return min(scores, key=lambda backend: scores[backend])


class TurnAttention:
    """Attention backend for samples with branches. Padding gets zeros."""

    def __init__(self, spans: Sequence[SampleSpan], *, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.sizes = samples, shared, branches, length = padded_sizes(spans)
        token_IP = torch.full((samples, shared), -1)
        token_IRL = torch.full((samples, branches, length), -1)
        mask_IPP = torch.zeros(samples, shared, shared, dtype=torch.bool)
        for index, span in enumerate(spans):
            own, start = span.image + span.shared, span.row * shape[1] + span.start
            token_IP[index, :own] = torch.arange(start, start + own)
            mask_IPP[index, :own, :own] = torch.ones(own, own, dtype=torch.bool).tril()
            mask_IPP[index, : span.image, : span.image] = True
            start += own
            for branch, tokens in enumerate(span.branches):
                token_IRL[index, branch, :tokens] = torch.arange(start, start + tokens)
                start += tokens
        mask_IPP |= torch.eye(shared, dtype=torch.bool)  # No row of the mask may be empty.
        self.prefix_mask_I1PP = _numbers(mask_IPP[:, None], dtype)
        causal_LL = torch.ones(length, length, dtype=torch.bool).tril().expand(samples, -1, -1)
        seen_ILP = (token_IP >= 0)[:, None].expand(-1, length, -1)
        self.branch_mask_I111LK = _numbers(torch.cat((seen_ILP, causal_LL), dim=2)[:, None, None, None], dtype)
        token_M = torch.cat((token_IP.flatten(), token_IRL.flatten()))
        slot_N = torch.full((shape[0] * shape[1],), -1)
        slot_N[token_M[token_M >= 0]] = (token_M >= 0).nonzero()[:, 0]
        self.tokens = RowIndex(token_M)
        self.slots = RowIndex(slot_N)

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output."""
        samples, shared, branches, length = self.sizes
        rows, heads, tokens, width = q_BATE.shape
        groups = k_BGTE.shape[1]
        joined = torch.cat([x.transpose(1, 2).flatten(2) for x in (q_BATE, k_BGTE, v_BGTE)], dim=2).flatten(0, 1)
        padded_MHE: Tensor = Reorder.apply(joined, self.tokens, self.slots).unflatten(1, (-1, width))
        shared_MHE, own_MHE = padded_MHE.split((samples * shared, samples * branches * length))
        shared_IHPE = shared_MHE.unflatten(0, (samples, shared)).transpose(1, 2)
        q_IAPE, k_IGPE, v_IGPE = shared_IHPE.split((heads, groups, groups), dim=1)
        outputs = [attend(q_IAPE, k_IGPE, v_IGPE, self.prefix_mask_I1PP).transpose(1, 2).flatten(0, 1)]
        if branches:
            own_IHRLE = own_MHE.unflatten(0, (samples, branches, length)).permute(0, 3, 1, 2, 4)
            q_IARLE, k_IGRLE, v_IGRLE = own_IHRLE.split((heads, groups, groups), dim=1)
            q_IGRQE = q_IARLE.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4) * width**-0.5
            of_shared_IGRQP = (q_IGRQE.flatten(2, 3) @ k_IGPE.mT).unflatten(2, (branches, -1))
            scores_IGRQK = torch.cat((of_shared_IGRQP, q_IGRQE @ k_IGRLE.mT), dim=-1)
            repeated = scores_IGRQK.unflatten(3, (-1, length)) + self.branch_mask_I111LK
            weights_IGRQK = repeated.flatten(3, 4).softmax(-1).to(v_IGPE.dtype)
            to_shared, to_own = weights_IGRQK.split((shared, length), dim=-1)
            output_IGRQE = (to_shared.flatten(2, 3) @ v_IGPE).unflatten(2, (branches, -1)) + to_own @ v_IGRLE
            output_IRLAE = output_IGRQE.unflatten(3, (-1, length)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
            outputs.append(output_IRLAE.flatten(0, 2))
        output_MZ = torch.cat([part.to(q_BATE.dtype) for part in outputs]).flatten(1)
        output_NZ: Tensor = Reorder.apply(output_MZ, self.slots, self.tokens)
        return output_NZ.view(rows, tokens, heads, width).transpose(1, 2)


class RowIndex:
    """Index of each row of one layout in the other, -1 for none."""

    def __init__(self, index_M: Tensor) -> None:
        self.index_M = index_M.clamp(min=0)
        self.is_empty_M1 = (index_M < 0)[:, None] if bool((index_M < 0).any()) else None

    def gather(self, x_NZ: Tensor) -> Tensor:
        """Return the rows in this layout, zero for missing ones."""
        rows_MZ = x_NZ.index_select(0, self.index_M)
        return rows_MZ if self.is_empty_M1 is None else rows_MZ.masked_fill_(self.is_empty_M1, 0.0)


class Reorder(torch.autograd.Function):
    """Rows in another layout. Each row occurs at most once in both, so the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x_NZ: Tensor, to: RowIndex, back: RowIndex) -> Tensor:
        """Return the rows in the layout of `to`."""
        ctx.back = back
        return to.gather(x_NZ)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the rows."""
        return ctx.back.gather(gradients[0]), None, None


def _numbers(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask in the dtype of the scores."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)

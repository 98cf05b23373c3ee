"""Spans of the samples in packed sequences, as Python integers on the host.

`data/collate.py` computes the spans of a batch before it is moved to a device, so that attention needs no dense mask
and shapes are known without a device synchronization. A row with an image of 66 tokens and a conversation of 40, and a
second image with two independent questions:

    SampleSpan(row=0, start=0, image=66, shared=0, branches=(40,)), SampleSpan(row=0, start=106, image=66, shared=0,
    branches=(12, 15))
"""

import torch
from torch import Tensor

from pixel_sail.types import SampleSpan


def sample_spans(sample_index_BT: Tensor, branch_ids_BT: Tensor, in_image_BT: Tensor) -> tuple[SampleSpan, ...]:
    """Return the spans of all samples by row, then by first token. Reads the tensors' values.

    Raises: ValueError unless every sample is one image, then shared text, then one run of tokens per branch.
    """
    spans = []
    for row, rows in enumerate(zip(sample_index_BT.cpu(), branch_ids_BT.cpu(), in_image_BT.cpu(), strict=True)):
        keys_3T = torch.stack([values.long() for values in rows])
        runs_3R, lengths = torch.unique_consecutive(keys_3T, dim=1, return_counts=True)
        runs = list(zip(*runs_3R.tolist(), lengths.tolist(), strict=True))
        start = 0
        while runs:
            sample, own = runs[0][0], [run for run in runs if run[0] == runs[0][0]]
            if runs[: len(own)] != own:
                raise ValueError(f"attention: the tokens of sample {sample} in row {row} are not contiguous")
            runs = runs[len(own) :]
            length = sum(run[3] for run in own)
            if sample >= 0:
                spans.append(_span(row, start, sample, own))
            start += length
    return tuple(spans)


def _span(row: int, start: int, sample: int, runs: list[tuple[int, int, int, int]]) -> SampleSpan:
    """Return the span of one sample from its runs of (sample, branch, in image, length)."""
    rest = list(runs)
    image = rest.pop(0)[3] if rest[0][2] else 0
    shared = rest.pop(0)[3] if rest and rest[0][1] == 0 and not rest[0][2] else 0
    branches = [branch for _, branch, in_image, _ in rest if not in_image]
    if len(branches) != len(rest) or 0 in branches or len(set(branches)) != len(branches):
        raise ValueError(
            f"attention: sample {sample} in row {row} has runs of (sample, branch, in image, length) {runs}, expected "
            "its image first, then text of branch 0, then each branch in one piece; use kernels.attention=dense"
        )
    return SampleSpan(row=row, start=start, image=image, shared=shared, branches=tuple(run[3] for run in rest))

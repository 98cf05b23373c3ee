"""What each source of the mixture contributed since the last log line, and which samples were left out.

Place in the flow: `training/loop.py` adds every step's `StepReport.by_source` and writes the result with the log line:

    {"refcoco/samples": 310, "refcoco/tokens": 9920, "refcoco/masks": 1550, "refcoco/text": 0.12, "refcoco/bce": 0.31}
    skipped.jsonl: {"source": "osprey_short_form", "position": 18220, "reason": "...: no such image file; ..."}
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pixel_sail import dist
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import Skipped, allowed_skips
from pixel_sail.files import append_lines
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.types import DataError

SKIPPED_FILE = "skipped.jsonl"


def source_scalars(names: Sequence[str], sums: Tensor, distill_terms: Sequence[DistillTerm] = ()) -> dict[str, float]:
    """Return counts and mean losses of every source that had samples, from sums of `source_columns`."""
    scalars: dict[str, float] = {}
    for name, (samples, tokens, masks, text, bce, dice, *distilled) in zip(names, sums.tolist(), strict=True):
        if not samples:
            continue
        scalars |= {f"{name}/samples": samples, f"{name}/tokens": tokens, f"{name}/text": text / max(tokens, 1)}
        if masks:
            scalars |= {f"{name}/masks": masks, f"{name}/bce": bce / masks, f"{name}/dice": dice / masks}
        losses, images = distilled[: len(distill_terms)], distilled[len(distill_terms) :]
        for term, loss, num_images in zip(distill_terms, losses, images, strict=True):
            if num_images:
                scalars[f"{name}/distill/{term.name}"] = loss / num_images
    return scalars


def record_skipped(
    run_dir: Path,
    own: Sequence[Skipped],
    *,
    before: int,
    mixture: Mixture,
    position: int,
    max_share: float,
    device: torch.device,
) -> int:
    """Write this step's left-out samples of all ranks to skipped.jsonl; return how many the run has left out so far.

    Raises: DataError, on every rank, when that is more than `max_share` of the mixture up to `position`, or of one
    epoch if that is longer.
    """
    new = int(dist.sum_over_ranks(torch.tensor(len(own), device=device)))
    if new == 0:
        return before
    everyone = sorted((skip for skips in dist.gather_objects(own) for skip in skips), key=lambda skip: skip.position)
    if dist.rank() == 0:
        append_lines(run_dir / SKIPPED_FILE, [json.dumps(asdict(skip)) for skip in everyone])
    total = before + new
    if total > allowed_skips(mixture, position, max_share):
        counts = dict(Counter(skip.source for skip in everyone))
        raise DataError(
            f"data: {total} samples left out by position {position} of the mixture, expected at most a share of "
            f"{max_share} (data.max_skipped_share); {run_dir / SKIPPED_FILE} names them, the last are {counts}: "
            f"{everyone[-1].reason}"
        )
    return total

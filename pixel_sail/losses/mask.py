"""Mask losses on sampled points: binary cross-entropy and Dice.

Place in the flow: `losses/total.py` calls `point_losses` once per image with the model's logits and the true masks.
Both losses are sums over masks, so that dividing by the number of masks of the whole global batch is the caller's
business.

Example: 3 masks of a 427 x 640 image and logits [3, 108, 160]; 37,632 random points per mask are looked at, the 9,408
most uncertain and 3,136 fresh ones are scored, both maps being read bilinearly at the same relative places.

Axis letters: N masks, Y X logit cells, H W mask pixels, Q points.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.model.mask_head import PointLogits
from pixel_sail.model.transfer import to_device
from pixel_sail.types import DataError


@dataclass(kw_only=True)
class PointSampling:
    """How the points of a mask are chosen (release and Mask2Former: 12,544 points, 3.0, 0.75)."""

    num_points: int = 12544
    oversample_ratio: float = 3.0
    """Candidates per kept point."""
    importance_ratio: float = 0.75
    """Share of points taken from the most uncertain candidates; the rest is uniform."""

    def __post_init__(self) -> None:
        """Check the numbers. Raises: DataError."""
        if not (self.num_points >= 1 and 1 <= self.oversample_ratio < math.inf and 0 <= self.importance_ratio <= 1):
            raise DataError(
                f"loss.points: found num_points {self.num_points}, oversample_ratio {self.oversample_ratio}, "
                f"importance_ratio {self.importance_ratio}; expected at least 1, at least 1, and 0 .. 1"
            )


@dataclass(frozen=True, kw_only=True)
class MaskSums:
    """Sums over masks of the two losses, unweighted, and the number of masks."""

    bce: Tensor
    dice: Tensor
    count: int


def sample_map(maps_NYX: Tensor, points_NQ2: Tensor) -> Tensor:
    """Read maps bilinearly at points (x, y) in [0, 1] x [0, 1], zero outside: [N, Q]."""
    grid = points_NQ2[:, :, None] * 2.0 - 1.0
    return F.grid_sample(maps_NYX[:, None], grid, align_corners=False)[:, 0, :, 0]


def read_logits(logits: Tensor | PointLogits, points_NQ2: Tensor) -> Tensor:
    """Return the logits [N, Q] of masks at points, from maps [N, Y, X] or from what makes them."""
    return logits.at(points_NQ2) if isinstance(logits, PointLogits) else sample_map(logits, points_NQ2)


@torch.no_grad()
def choose_points(logits: Tensor | PointLogits, sampling: PointSampling, generator: torch.Generator) -> Tensor:
    """Return points [N, Q, 2]: the most uncertain of many uniform candidates, and fresh uniform ones.

    Random numbers are drawn on the generator's device (the CPU) and moved, so that a run does not depend on the device.
    Source: PointRend / Mask2Former, with their ratios.
    """
    num_masks = len(logits)
    device = logits.probes_NE.device if isinstance(logits, PointLogits) else logits.device
    num_important = int(sampling.importance_ratio * sampling.num_points)
    num_candidates = int(sampling.oversample_ratio * sampling.num_points)
    candidates = to_device(torch.rand(num_masks, num_candidates, 2, generator=generator), device)
    uncertainty = -read_logits(logits, candidates).abs()
    best = uncertainty.topk(num_important, dim=1).indices
    important = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    fresh = to_device(torch.rand(num_masks, sampling.num_points - num_important, 2, generator=generator), device)
    return torch.cat((important, fresh), dim=1)


def bce_sum(logits_NQ: Tensor, targets_NQ: Tensor, counts_NQ: Tensor | None = None) -> Tensor:
    """Return the sum over masks of the mean binary cross-entropy of each, over the points that count (None: all)."""
    losses = F.binary_cross_entropy_with_logits(logits_NQ, targets_NQ, reduction="none")
    if counts_NQ is None:
        return losses.mean(1).sum()
    return ((losses * counts_NQ).sum(1) / counts_NQ.sum(1).clamp(min=1)).sum()


def dice_sum(logits_NQ: Tensor, targets_NQ: Tensor, counts_NQ: Tensor | None = None, *, smooth: float = 1.0) -> Tensor:
    """Return the sum over masks of 1 - (2 sum(pt) + smooth) / (sum(p) + sum(t) + smooth), over the points that count.

    Plain sums in the denominator, not squares; `smooth` makes an empty prediction of an empty target cost 0.
    Source: release, naive Dice with eps 1.
    """
    probabilities = logits_NQ.sigmoid()
    if counts_NQ is not None:
        probabilities, targets_NQ = probabilities * counts_NQ, targets_NQ * counts_NQ
    overlap = 2.0 * (probabilities * targets_NQ).sum(1)
    return (1.0 - (overlap + smooth) / (probabilities.sum(1) + targets_NQ.sum(1) + smooth)).sum()


def point_losses(
    logits: Tensor | PointLogits,
    masks_NHW: Tensor,
    sampling: PointSampling,
    generator: torch.Generator,
    ignored_NHW: Tensor | None = None,
) -> MaskSums:
    """Return both losses of the masks of one image (logits [N, Y, X] or `PointLogits`), in float32, on points sampled
    for each mask.

    A point counts unless it touches an ignored pixel; None ignores nothing.
    """
    if isinstance(logits, Tensor):
        logits = logits.float()
    points = choose_points(logits, sampling, generator)
    predicted, target = read_logits(logits, points), sample_map(masks_NHW.float(), points)
    counts = None if ignored_NHW is None else (sample_map(ignored_NHW.float(), points) == 0).float()
    return MaskSums(bce=bce_sum(predicted, target, counts), dice=dice_sum(predicted, target, counts), count=len(logits))


def full_map_losses(logits_NYX: Tensor, masks_NYX: Tensor) -> MaskSums:
    """Return both losses on every cell of maps of equal size: the yardstick of the sampled ones."""
    if logits_NYX.shape != masks_NYX.shape:
        raise ValueError(f"full-map losses: logits {tuple(logits_NYX.shape)}, masks {tuple(masks_NYX.shape)}")
    logits, targets = logits_NYX.float().flatten(1), masks_NYX.float().flatten(1)
    return MaskSums(bce=bce_sum(logits, targets), dice=dice_sum(logits, targets), count=logits.shape[0])

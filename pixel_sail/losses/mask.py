"""Mask losses on sampled points: binary cross-entropy and Dice.

`losses/total.py` calls `losses_at_points` once per micro-batch with the logits and target masks of all its images.
Both losses are returned per mask; the caller divides by the number of masks of the global batch. `point_losses` is the
same for one image and the reference in tests.

Example: 3 masks of a 427 x 640 image and logits [3, 108, 160]. Of 37,632 random candidate points per mask, the loss
uses the 9,408 most uncertain and 3,136 further uniform ones. Both maps are sampled bilinearly at the same relative
positions.

Axis letters: N masks, Y X logit cells, H W mask pixels, Q points.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.model.mask_head import PointLogits
from pixel_sail.model.transfer import to_device
from pixel_sail.types import DataError

SMALL_IMAGE = 2**19
"""Images up to this number of pixels are processed together: 480 x 640 has 307,200."""


@dataclass(kw_only=True)
class PointSampling:
    """How the points of a mask are sampled (release and Mask2Former: 12,544 points, 3.0, 0.75)."""

    num_points: int = 12544
    oversample_ratio: float = 3.0
    """Candidates per selected point."""
    importance_ratio: float = 0.75
    """Fraction of points selected from the most uncertain candidates. The rest is uniform."""

    def __post_init__(self) -> None:
        """Check the numbers. Raises: DataError."""
        if not (self.num_points >= 1 and 1 <= self.oversample_ratio < math.inf and 0 <= self.importance_ratio <= 1):
            raise DataError(
                f"loss.points: found num_points {self.num_points}, oversample_ratio {self.oversample_ratio}, "
                f"importance_ratio {self.importance_ratio}; expected at least 1, at least 1, and 0 .. 1"
            )


@dataclass(frozen=True, kw_only=True)
class MaskSums:
    """Unweighted sums of both losses over masks, and the number of masks."""

    bce: Tensor
    dice: Tensor
    count: int


def sample_map(maps_NYX: Tensor, points_NQ2: Tensor) -> Tensor:
    """Sample maps bilinearly at points (x, y) in [0, 1] x [0, 1], zero outside: [N, Q]."""
    grid = points_NQ2[:, :, None] * 2.0 - 1.0
    return F.grid_sample(maps_NYX[:, None], grid, align_corners=False)[:, 0, :, 0]


def sample_logits(logits: Tensor | PointLogits, points_NQ2: Tensor) -> Tensor:
    """Return the logits [N, Q] of masks at points, from maps [N, Y, X] or `PointLogits`."""
    return logits.at(points_NQ2) if isinstance(logits, PointLogits) else sample_map(logits, points_NQ2)


@torch.no_grad()
def sample_points(
    logits: Tensor | PointLogits,
    sampling: PointSampling,
    generator: torch.Generator | Sequence[torch.Generator],
    masks_per_image: Sequence[int] | None = None,
) -> Tensor:
    """Return points [N, Q, 2]: the most uncertain of many uniform candidates, and further uniform ones.

    Masks of several images come with one generator per image and their counts, so that the samples of an image do not
    depend on the others. Random numbers are sampled on the generators' device (the CPU) and moved, so that results do
    not depend on the device.
    Source: PointRend / Mask2Former, with their ratios.
    """
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    counts = [len(logits)] if masks_per_image is None else masks_per_image
    device = logits.mask_embed_NE.device if isinstance(logits, PointLogits) else logits.device
    num_important = int(sampling.importance_ratio * sampling.num_points)
    num_candidates = int(sampling.oversample_ratio * sampling.num_points)
    num_fresh = sampling.num_points - num_important
    sampled = [
        tuple(torch.rand(count, size, 2, generator=own) for size in (num_candidates, num_fresh))
        for own, count in zip(generators, counts, strict=True)
    ]
    candidates, fresh = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    fresh = to_device(fresh, device)
    if not num_important:
        return fresh
    candidates = to_device(candidates, device)
    uncertainty = -sample_logits(logits, candidates).abs()
    best = uncertainty.topk(num_important, dim=1).indices
    important = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat((important, fresh), dim=1)


def bce_means(logits_NQ: Tensor, targets_NQ: Tensor, counts_NQ: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy of each mask [N] over valid points (None: all)."""
    losses = F.binary_cross_entropy_with_logits(logits_NQ, targets_NQ, reduction="none")
    if counts_NQ is None:
        return losses.mean(1)
    return (losses * counts_NQ).sum(1) / counts_NQ.sum(1).clamp(min=1)


def dice_losses(
    logits_NQ: Tensor, targets_NQ: Tensor, counts_NQ: Tensor | None = None, *, smooth: float = 1.0
) -> Tensor:
    """Return 1 - (2 sum(pt) + smooth) / (sum(p) + sum(t) + smooth) of each mask [N] over valid points.

    The denominator has plain sums, not squares. With `smooth`, an empty prediction of an empty target costs 0.
    Source: release, naive Dice with eps 1.
    """
    probabilities = logits_NQ.sigmoid()
    if counts_NQ is not None:
        probabilities, targets_NQ = probabilities * counts_NQ, targets_NQ * counts_NQ
    overlap = 2.0 * (probabilities * targets_NQ).sum(1)
    return 1.0 - (overlap + smooth) / (probabilities.sum(1) + targets_NQ.sum(1) + smooth)


@dataclass(frozen=True, kw_only=True)
class ImageMasks:
    """Inputs of the mask losses of one image."""

    logits: Tensor | PointLogits
    """[N, Y, X] or `PointLogits`."""
    masks: Sequence[Tensor]
    """N bool tensors [H, W]."""
    ignored: Sequence[Tensor | None]
    """Aligned with `masks`: ignored pixels [H, W]."""
    seed: int


def losses_at_points(images: Sequence[ImageMasks], sampling: PointSampling) -> tuple[Tensor, list[int]]:
    """Return both losses of every mask [2, N] in float32 at sampled points, and the image of each column. Points that
    touch an ignored pixel are excluded.

    Images of one size are processed together, because the time for small images depends on the number of operations.
    """
    by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        # Processed alone to save memory: large masks, which become float32, and `PointLogits`.
        is_alone = isinstance(image.logits, PointLogits) or image.masks[0].numel() > SMALL_IMAGE
        own_hw = () if isinstance(image.logits, PointLogits) else tuple(image.logits.shape[1:])
        by_shape[(index if is_alone else -1, *own_hw, *image.masks[0].shape)].append(index)
    is_ignored = any(ignored is not None for image in images for ignored in image.ignored)
    read: list[tuple[Tensor, ...]] = []
    for indices in by_shape.values():
        own = [images[index] for index in indices]
        counts = [len(image.logits) for image in own]
        logits = own[0].logits
        if isinstance(logits, Tensor):
            logits = torch.cat([image.logits for image in own if isinstance(image.logits, Tensor)]).float()
        generators = [torch.Generator().manual_seed(image.seed) for image in own]
        points = sample_points(logits, sampling, generators, counts)
        masks = [mask for image in own for mask in image.masks]
        values = [sample_logits(logits, points), sample_map(torch.stack(masks).float(), points)]
        if is_ignored:
            without = [ignored for image in own for ignored in image.ignored]
            filled = [torch.zeros_like(m) if i is None else i for i, m in zip(without, masks, strict=True)]
            values.append((sample_map(torch.stack(filled).float(), points) == 0).float())
        read.append(tuple(values))
    joined = [torch.cat(parts) for parts in zip(*read, strict=True)]
    owners = [index for indices in by_shape.values() for index in indices for _ in range(len(images[index].logits))]
    return torch.stack((bce_means(*joined), dice_losses(*joined))), owners


def point_losses(
    logits: Tensor | PointLogits,
    masks_NHW: Tensor,
    sampling: PointSampling,
    generator: torch.Generator,
    ignored_NHW: Tensor | None = None,
) -> MaskSums:
    """Return both losses of the masks of one image (logits [N, Y, X] or `PointLogits`) in float32 at sampled points.

    Points that touch an ignored pixel are excluded; None ignores nothing.
    """
    if isinstance(logits, Tensor):
        logits = logits.float()
    points = sample_points(logits, sampling, generator)
    predicted, target = sample_logits(logits, points), sample_map(masks_NHW.float(), points)
    counts = None if ignored_NHW is None else (sample_map(ignored_NHW.float(), points) == 0).float()
    bce_N, dice_N = bce_means(predicted, target, counts), dice_losses(predicted, target, counts)
    return MaskSums(bce=bce_N.sum(), dice=dice_N.sum(), count=len(logits))


def full_map_losses(logits_NYX: Tensor, masks_NYX: Tensor) -> MaskSums:
    """Return both losses over all cells of maps of equal size, the reference for the sampled losses."""
    if logits_NYX.shape != masks_NYX.shape:
        raise ValueError(f"full-map losses: logits {tuple(logits_NYX.shape)}, masks {tuple(masks_NYX.shape)}")
    logits, targets = logits_NYX.float().flatten(1), masks_NYX.float().flatten(1)
    bce_N, dice_N = bce_means(logits, targets), dice_losses(logits, targets)
    return MaskSums(bce=bce_N.sum(), dice=dice_N.sum(), count=logits.shape[0])

"""Image <-> patch grid: sizes, pixels and prompt masks. The order of patches is defined here only.

The processor calls it for training and inference. Sizes (height, width) for patches of 16 and a longest side of 1024:

    image 427 x 640  -> resized 432 x 640 -> grid 27 x 40 = 1080 patches
    image 480 x 640  -> resized 480 x 640 -> grid 30 x 40 = 1200 patches
    image 1080 x 1920 -> resized 576 x 1024 -> grid 36 x 64 = 2304 patches

The other rule, "area", for patches of 32 and an area of 800 x 800: 480 x 640 -> 704 x 928 -> grid 22 x 29.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixel_sail.model.transfer import to_device
from pixel_sail.types import BoolMask, DataError, SizeHW

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
"""ImageNet statistics, as in the release."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's image statistics, used by EVE."""

RESAMPLING = {"long_side": Image.Resampling.BILINEAR, "area": Image.Resampling.BICUBIC}
"""Resampling filter of each sizing rule, as in the release."""


def resized_size(size_hw: SizeHW, patch_size: int, max_long_side: int, sizing: str = "long_side") -> SizeHW:
    """Return the size an image is resized to: both sides multiples of the patch size.

    long_side: caps the long side; images are not enlarged beyond the next multiple. area: scales images up or down to
    the area of a square of `max_long_side`, then rounds each side up to a multiple. Source: release, dataset
    preprocessing of the SAIL and of the EVE model.
    """
    height, width = size_hw
    if height < 1 or width < 1:
        raise DataError(f"image size {size_hw}: both sides must be at least 1 pixel")
    if sizing == "area":
        # The smallest n with n * patch_size >= side * max_long_side / sqrt(height * width), in integers, so that an
        # exact result is not rounded up.
        rows, columns = (
            math.isqrt((max_long_side**2 * side - 1) // (patch_size**2 * other)) + 1
            for side, other in ((height, width), (width, height))
        )
        return rows * patch_size, columns * patch_size
    long, short = max(height, width), min(height, width)
    new_long = min(-(-long // patch_size) * patch_size, max_long_side // patch_size * patch_size)
    new_short = max(-(-int(new_long * short / long) // patch_size), 1) * patch_size
    return (new_long, new_short) if height >= width else (new_short, new_long)


def grid_size(size_hw: SizeHW, patch_size: int, max_long_side: int, sizing: str = "long_side") -> SizeHW:
    """Return the patch grid (rows, columns) of an image of this size."""
    height, width = resized_size(size_hw, patch_size, max_long_side, sizing)
    return height // patch_size, width // patch_size


def image_to_patches(
    image: Image.Image, patch_size: int, max_long_side: int, sizing: str = "long_side"
) -> tuple[Tensor, SizeHW]:
    """Return the patches [P, 3 * patch_size ** 2], uint8, channel first and row by row, and their grid.

    They stay uint8 until the model normalizes them, which saves three quarters of the memory and transfer.
    """
    height, width = resized_size((image.height, image.width), patch_size, max_long_side, sizing)
    resized = image.convert("RGB").resize((width, height), RESAMPLING[sizing])
    rows, columns = height // patch_size, width // patch_size
    tiles = torch.from_numpy(np.array(resized)).view(rows, patch_size, columns, patch_size, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * columns, -1).contiguous(), (rows, columns)


def normalize_patches(
    patches_SK: Tensor, *, mean: tuple[float, ...] = PIXEL_MEAN, std: tuple[float, ...] = PIXEL_STD
) -> Tensor:
    """Return uint8 patches as float32, normalized by mean and standard deviation."""
    pixels_SCQ = patches_SK.float().view(len(patches_SK), 3, patches_SK.shape[1] // 3) / 255.0
    mean_C1, std_C1 = to_device(torch.tensor([mean, std]), patches_SK.device)[..., None]
    return ((pixels_SCQ - mean_C1) / std_C1).view(patches_SK.shape)


def covered_patches(mask: BoolMask, grid_hw: SizeHW) -> NDArray[np.bool_]:
    """Return which cells of the grid [h, w] contain at least one pixel of the mask.

    Every pixel is assigned to the cell that contains its center, so a single marked pixel always marks a cell. (The
    release resizes the mask to the nearest pixel first, which can lose single pixels when downscaling.)
    """
    rows, columns = np.nonzero(mask)
    covered = np.zeros(grid_hw, dtype=bool)
    covered[
        ((rows + 0.5) * grid_hw[0] / mask.shape[0]).astype(int),
        ((columns + 0.5) * grid_hw[1] / mask.shape[1]).astype(int),
    ] = True
    return covered


def visible_owners(covered: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64] | None:
    """Return the index of the visible region of every patch [h, w], -1 for none; None if not all can be visible.

    `covered` holds the patches of every region [h, w], at least one, in painting order: later regions are on top. A
    fully hidden region gets one patch back, the most central one of the region with most patches to spare. If its
    covering regions have one patch each, they move to another of their own patches.
    """
    owners = np.full(covered[0].shape, -1, dtype=np.int64)
    for region, cells in enumerate(covered):
        owners[cells] = region
    for region in range(len(covered)):
        if not (owners == region).any() and not _uncover(region, covered, owners, moving={region}):
            return None
    return owners


def _uncover(region: int, covered: Sequence[NDArray[np.bool_]], owners: NDArray[np.int64], *, moving: set[int]) -> bool:
    """Assign `region` one patch without taking the last patch of another. Return False if this is impossible.

    Searches an augmenting path of a matching between regions and patches. `moving`: regions on the path already.
    """
    counts = {int(owner): int((owners == owner).sum()) for owner in np.unique(owners[covered[region]])}
    spare = max(counts, key=lambda owner: (counts[owner], -owner))
    if counts[spare] > 1:
        owners[_most_central(covered[region] & (owners == spare), covered[region])] = region
        return True
    for owner in sorted(counts):
        if owner in moving:
            continue
        moving.add(owner)
        cell = covered[region] & (owners == owner)
        if _uncover(owner, covered, owners, moving=moving):
            owners[cell] = region
            return True
    return False


def _most_central(candidates: NDArray[np.bool_], cells: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the candidate patch nearest to the center of the cells, the first in reading order if tied."""
    places = np.argwhere(candidates)
    distances = ((places - np.argwhere(cells).mean(axis=0)) ** 2).sum(axis=1)
    row, column = places[int(distances.argmin())]
    return int(row), int(column)

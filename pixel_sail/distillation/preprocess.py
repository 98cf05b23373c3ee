"""Preprocesses an image for a teacher, on the teacher's device.

`teacher.py` calls it for every image. Resizing reproduces the image processors of transformers for 8-bit images
(antialiased, columns, then rows, each rounded to whole levels). The difference is at most two levels of 255 and 1/50 of
a level on average. For an image of 480 x 640:

    Mask2Former  ShortestEdge(short=800, long=1333, divisor=32)  ->  800 x 1088
    SAM 2        Square(side=1024)                               ->  1024 x 1024
    our 0.5B model  PatchMultiple(patch_size=16, max_long_side=1024)  ->  480 x 640

Axis letters: H W pixels, 3 color channels.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.model.patches import resized_size
from pixel_sail.model.transfer import to_device
from pixel_sail.types import SizeHW

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ShortestEdge:
    """The short side becomes `short`, unless the long one would exceed `long`; then both are rounded up to a multiple.

    Source: transformers, `get_size_with_aspect_ratio` and the `size_divisor` of Mask2Former's image processor.
    """

    short: int
    long: int | None = None
    divisor: int = 1

    def __call__(self, size_hw: SizeHW) -> SizeHW:
        """Return the size an image of this size is resized to."""
        short, long = min(size_hw), max(size_hw)
        exact: float = self.short
        if self.long is not None and long / short * self.short > self.long:
            exact = self.long * short / long
        new_short = round(exact)
        # A side that already fits is not changed, even if the other one rounds differently.
        new_long = long if short == new_short else int(exact * long / short)
        rows, columns = (new_short, new_long) if size_hw[0] <= size_hw[1] else (new_long, new_short)
        return -(-rows // self.divisor) * self.divisor, -(-columns // self.divisor) * self.divisor


@dataclass(frozen=True, kw_only=True)
class Square:
    """Both sides become `side`, whatever the shape of the image."""

    side: int

    def __call__(self, size_hw: SizeHW) -> SizeHW:
        """Return the size an image of this size is resized to."""
        return self.side, self.side


@dataclass(frozen=True, kw_only=True)
class PatchMultiple:
    """Like the student's own processor: multiples of the patch size, with a maximum long side."""

    patch_size: int
    max_long_side: int

    def __call__(self, size_hw: SizeHW) -> SizeHW:
        """Return the size an image of this size is resized to."""
        return resized_size(size_hw, self.patch_size, self.max_long_side)


@dataclass(frozen=True, kw_only=True)
class AreaMultiple:
    """Like the processor of a student with base eve: multiples of the patch size, with about the area of a square."""

    patch_size: int
    side: int

    def __call__(self, size_hw: SizeHW) -> SizeHW:
        """Return the size an image of this size is resized to."""
        return resized_size(size_hw, self.patch_size, self.side, "area")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resizing, scaling to 0 .. 1 and normalization."""

    resize: Callable[[SizeHW], SizeHW]
    """One of the rules above."""
    mode: str = "bilinear"
    """bilinear or bicubic."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    snap: int = 1
    """After resizing, both sides are resized to the nearest multiple of this (bilinear, on unrounded values)."""

    def size(self, size_hw: SizeHW) -> SizeHW:
        """Return the size (height, width) of the teacher's input for an image of this size."""
        rows, columns = self.resize(size_hw)
        return max(round(rows / self.snap), 1) * self.snap, max(round(columns / self.snap), 1) * self.snap

    def __call__(self, image_HW3: Tensor) -> Tensor:
        """Return the teacher's input [3, H, W], float32, on the image's device. The image is uint8."""
        height, width = image_HW3.shape[:2]
        levels_3HW = resize_levels(image_HW3.permute(2, 0, 1), self.resize((height, width)), mode=self.mode)
        pixels_3HW = levels_3HW / 255.0
        size = self.size((height, width))
        if tuple(pixels_3HW.shape[1:]) != size:
            pixels_3HW = F.interpolate(pixels_3HW[None], size, mode="bilinear", align_corners=False)[0]
        mean, std = to_device(torch.tensor([self.mean, self.std]), image_HW3.device)[..., None, None]
        return (pixels_3HW - mean) / std

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the result, for the cache."""
        return {**asdict(self), "resize": {"rule": type(self.resize).__name__, **vars(self.resize)}}


def resize_levels(levels_3HW: Tensor, size_hw: SizeHW, *, mode: str) -> Tensor:
    """Return 8-bit levels resized with antialiasing, whole numbers 0 .. 255, as float32.

    Columns first, then rows, each rounded to 8 bits with halves up, as Pillow and torch (with bytes on a CPU) do.
    """
    levels = levels_3HW.float()
    for size in ((levels_3HW.shape[1], size_hw[1]), size_hw):
        if tuple(levels.shape[1:]) != tuple(size):
            levels = F.interpolate(levels[None], size, mode=mode, align_corners=False, antialias=True)[0]
            levels = (levels + 0.5).floor().clamp(0, 255)
    return levels

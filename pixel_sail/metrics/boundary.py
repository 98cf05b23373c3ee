"""Boundary IoU: the IoU of the boundary regions of two masks.

`evaluation/predictions.py` calls `boundary_sums` for each pair of evals that request it
(`refer_seg.load_with_boundaries`).

The boundary region of a mask has its pixels at most d from a pixel outside, where d is 2 % of the image's diagonal and
everything beyond the image is outside. Source: Cheng et al., Boundary IoU (CVPR 2021), with their d, kernel and
padding. Example at 128 x 128: d = 4 pixels; a square of side 40 moved by 2 pixels has IoU 0.90 and boundary IoU 0.60.
"""

from dataclasses import dataclass
from math import hypot

import numpy as np
from scipy import ndimage

from pixel_sail.types import BoolMask, SizeHW

RIM_FRACTION = 0.02
"""Width of the boundary region as a fraction of the image's diagonal."""


@dataclass(frozen=True, kw_only=True)
class BoundarySums:
    """Sums over scored pairs."""

    iou_sum: float
    count: int

    def add(self, other: "BoundarySums") -> "BoundarySums":
        """Return the sums over the pairs of both."""
        return BoundarySums(iou_sum=self.iou_sum + other.iou_sum, count=self.count + other.count)

    def summary(self) -> dict[str, float | int]:
        """Return the mean over pairs."""
        return {"boundary_iou": self.iou_sum / self.count}

    def fractions(self) -> dict[str, tuple[float, float]]:
        """Return numerator and denominator of the mean."""
        return {"boundary_iou": (self.iou_sum, self.count)}


def rim_width(size_hw: SizeHW) -> int:
    """Return the width of the boundary region in pixels, at least 1."""
    return max(1, round(RIM_FRACTION * hypot(*size_hw)))


def rim(mask_HW: BoolMask, width: int) -> BoolMask:
    """Return the pixels of a mask at most `width` rows and columns from a pixel outside it."""
    inside = ndimage.minimum_filter(mask_HW, size=2 * width + 1, mode="constant", cval=False)
    return mask_HW & ~inside


def boundary_sums(prediction_HW: BoolMask | None, target_HW: BoolMask) -> BoundarySums:
    """Return the sums of one pair of masks of one size. No prediction is an empty mask; two empty masks count as 1."""
    width = rim_width((target_HW.shape[0], target_HW.shape[1]))
    predicted = np.zeros_like(target_HW) if prediction_HW is None else rim(prediction_HW, width)
    true = rim(target_HW, width)
    union = int((predicted | true).sum())
    return BoundarySums(iou_sum=int((predicted & true).sum()) / union if union else 1.0, count=1)

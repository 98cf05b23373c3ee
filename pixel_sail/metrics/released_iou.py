"""cIoU and gIoU exactly as in the released scripts, for the `paper` protocol.

(predicted, target) pairs as RLE -> `ReleasedIoUSums` -> added over items -> `summary`. For correct scores use
`metrics/iou.py`.

Differences of the released code:
- cIoU = sum of intersections / (sum of unions + 1e-10); gIoU = mean of intersection / (union + 1e-5), plus 1 where
  there is no union.
- A missing prediction of RefCOCO is an empty mask (`missing="empty"`). For ReasonSeg and PerBench it is excluded from
  both sums of cIoU and counts 0 in gIoU (`missing="skipped"`), which makes cIoU higher.
- gIoU of PerBench is divided by the number of target masks, although only the first mask is compared: `num_targets`.

- Ignored pixels of ReasonSeg are not ignored, and they corrupt the target: `released_target`. Overlapping polygons of
  one object corrupt the targets of RefCOCO and gRefCOCO in the same way: `Expression.released_target`.

Example: prediction of 4 pixels, target of 8, 4 in common, and one missing prediction of a target of 8: skipped, cIoU
0.5 and gIoU 0.25; as an empty mask, cIoU 0.25.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.metrics.iou import counted_areas
from pixel_sail.rle import encode_as_released
from pixel_sail.types import RLE, DataError

UNION_EPSILON = 1e-10
PAIR_EPSILON = 1e-5
MISSING = ("empty", "skipped")


@dataclass(frozen=True, kw_only=True)
class ReleasedIoUSums:
    """Sums over items. Immutable."""

    intersection: int = 0
    """Pixels."""
    union: int = 0
    """Pixels."""
    iou_sum: float = 0.0
    num_targets: int = 0
    """Denominator of gIoU."""
    count: int = 0
    missing: int = 0

    @classmethod
    def from_rles(
        cls,
        prediction: RLE | None,
        target: RLE | None,
        *,
        missing: str = "empty",
        num_targets: int = 1,
        where: str = "pair",
    ) -> "ReleasedIoUSums":
        """Return the sums of one item. Raises: DataError if sizes differ or the rule for missing ones is unknown."""
        if missing not in MISSING:
            raise DataError(f"{where}: found missing={missing!r}, expected one of {MISSING}; correct the caller")
        if prediction is None and missing == "skipped":
            return cls(num_targets=num_targets, count=1, missing=1)
        intersection, prediction_area, target_area = counted_areas(prediction, target, None, where)
        union = prediction_area + target_area - intersection
        return cls(
            intersection=intersection,
            union=union,
            iou_sum=intersection / (union + PAIR_EPSILON) + (union == 0),
            num_targets=num_targets,
            count=1,
            missing=int(prediction is None),
        )

    def add(self, other: "ReleasedIoUSums") -> "ReleasedIoUSums":
        """Return the sums over the items of both."""
        return ReleasedIoUSums(
            intersection=self.intersection + other.intersection,
            union=self.union + other.union,
            iou_sum=self.iou_sum + other.iou_sum,
            num_targets=self.num_targets + other.num_targets,
            count=self.count + other.count,
            missing=self.missing + other.missing,
        )

    def summary(self) -> dict[str, float | int]:
        """Return the scores by name, fractions in 0-1. Raises: DataError on no item."""
        if self.num_targets == 0:
            raise DataError("IoU summary: found 0 scored items, expected at least 1; check the split and the filters")
        return {
            "ciou": self.intersection / (self.union + UNION_EPSILON),
            "giou": self.iou_sum / self.num_targets,
            "count": self.count,
            "missing": self.missing,
        }

    def fractions(self) -> dict[str, tuple[float, float]]:
        """Return numerator and denominator of both scores, without the constant 1e-10 in the denominator of cIoU."""
        return {"ciou": (self.intersection, self.union), "giou": (self.iou_sum, self.num_targets)}


def released_target(target: RLE | None, ignored: RLE | None) -> RLE | None:
    """Return the target that the released ReasonSeg script uses for an item with ignored pixels.

    The script encodes a map of 0, 1 (target) and 255 (ignored), see `rle.encode_as_released`. Without ignored pixels
    the result equals the target. Raises: DataError if sizes differ.
    """
    if ignored is None:
        return target
    values_HW = coco_mask.decode(ignored) * np.uint8(255)
    if target is not None:
        if list(target["size"]) != list(ignored["size"]):
            raise DataError(
                f"found a target of size {target['size']} and ignored pixels of size {ignored['size']}, expected one "
                "(height, width); repair the annotations"
            )
        values_HW[coco_mask.decode(target) > 0] = 1
    return encode_as_released(values_HW)

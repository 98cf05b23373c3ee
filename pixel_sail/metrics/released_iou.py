"""cIoU and gIoU as the released scripts compute them, small constants and all, for the `paper` protocol.

Place in the flow: (predicted, target) pairs as RLE -> `ReleasedIoUSums` -> added over items and ranks -> `summary`.
Where a correct score is wanted, use `metrics/iou.py`.

What is done differently from there (facts of the released code):
- cIoU = sum of intersections / (sum of unions + 1e-10); gIoU = mean of intersection / (union + 1e-5), plus 1 where
  there is no union.
- A missing prediction of RefCOCO is an empty mask (`missing="empty"`). Of ReasonSeg and PerBench it is left out of both
  sums of cIoU and counts 0 in gIoU (`missing="skipped"`), which makes cIoU higher.
- gIoU of PerBench is divided by the number of target masks, although only the first mask is compared: `num_targets`.

Not imitated: overlapping polygons and ignored pixels damaged by the release's detour over run-length encoding.

Example: prediction of 4 pixels, target of 8, 4 in common, and one missing prediction of a target of 8: skipped, cIoU
0.5 and gIoU 0.25; as an empty mask, cIoU 0.25.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pixel_sail.metrics.iou import counted_areas
from pixel_sail.types import RLE, DataError

UNION_EPSILON = 1e-10
PAIR_EPSILON = 1e-5
MISSING = ("empty", "skipped")


@dataclass(frozen=True, kw_only=True)
class ReleasedIoUSums:
    """Sums over items. Never changed in place."""

    intersection: int = 0
    """Pixels."""
    union: int = 0
    """Pixels."""
    iou_sum: float = 0.0
    num_targets: int = 0
    """What gIoU is divided by."""
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
        ignored: RLE | None = None,
        where: str = "pair",
    ) -> "ReleasedIoUSums":
        """Return the sums of one item. Raises: DataError if sizes differ or the rule for missing ones is unknown."""
        if missing not in MISSING:
            raise DataError(f"{where}: found missing={missing!r}, expected one of {MISSING}; correct the caller")
        if prediction is None and missing == "skipped":
            return cls(num_targets=num_targets, count=1, missing=1)
        intersection, prediction_area, target_area = counted_areas(prediction, target, ignored, where)
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

    def integers(self) -> list[int]:
        """Return every integer sum in a fixed order, to be added over ranks exactly."""
        return [self.intersection, self.union, self.num_targets, self.count, self.missing]

    @classmethod
    def from_integers(cls, values: Sequence[int], *, iou_sum: float) -> "ReleasedIoUSums":
        """Return the sums that `integers` listed."""
        intersection, union, num_targets, count, missing = values
        return cls(
            intersection=intersection,
            union=union,
            iou_sum=iou_sum,
            num_targets=num_targets,
            count=count,
            missing=missing,
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

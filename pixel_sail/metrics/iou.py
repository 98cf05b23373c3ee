"""cIoU, gIoU, precision at IoU thresholds and no-target accuracy, as integer sums.

(prediction, target) pairs -> `IoUSums` of one pair -> added over expressions and ranks -> `summary`.

Conventions, which differ between published implementations:
- cIoU = sum of intersections / sum of unions; gIoU = mean of the IoU of each pair.
- A pair without any pixel has no IoU and counts as the argument `empty_iou` (default 1).
- A missing prediction (None) is an empty mask, and is also counted in `missing`.
- A hit at threshold t means IoU >= t.
- Ignored pixels are removed from prediction and target first.
- No target: the target is None or has no pixels. N-acc = fraction of these predicted empty (not one pixel); T-acc =
  fraction of the others predicted non-empty.

Example: prediction of 3 pixels, target of 3, 2 in common -> intersection 2, union 4, IoU 0.5, hit at 0.5 only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.types import RLE, BoolMask, DataError

IOU_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class IoUSums:
    """Sums over scored pairs. Immutable: every method returns a new object."""

    intersection: int = 0
    """Pixels."""
    union: int = 0
    """Pixels."""
    iou_sum: float = 0.0
    hits: tuple[int, ...] = (0,) * len(IOU_THRESHOLDS)
    """Pairs with IoU >= each of IOU_THRESHOLDS."""
    count: int = 0
    missing: int = 0
    num_no_target: int = 0
    num_no_target_correct: int = 0
    num_target: int = 0
    num_target_nonempty: int = 0

    @classmethod
    def from_masks(
        cls,
        prediction: BoolMask | None,
        target: BoolMask | None,
        *,
        ignored: BoolMask | None = None,
        empty_iou: float = 1.0,
        where: str = "pair",
    ) -> "IoUSums":
        """Return the sums of one pair of masks [H, W]. Raises: DataError unless bool and of one size."""
        for name, mask in (("prediction", prediction), ("target", target), ("ignored region", ignored)):
            if mask is not None and mask.dtype != np.bool_:
                raise DataError(f"{where}: found a {name} of {mask.dtype}, expected bool; apply a threshold first")
        if prediction is not None and target is not None:
            _check_sizes(prediction.shape, target.shape, where)
        if ignored is not None:
            prediction, target = _without(prediction, ignored, where), _without(target, ignored, where)
        return cls._from_areas(
            intersection=0 if prediction is None or target is None else int((prediction & target).sum()),
            prediction_area=None if prediction is None else int(prediction.sum()),
            target_area=0 if target is None else int(target.sum()),
            empty_iou=empty_iou,
        )

    @classmethod
    def from_rles(
        cls,
        prediction: RLE | None,
        target: RLE | None,
        *,
        ignored: RLE | None = None,
        empty_iou: float = 1.0,
        where: str = "pair",
    ) -> "IoUSums":
        """Return the sums of one pair of compressed RLEs, without decoding them. Raises: DataError if sizes differ."""
        intersection, prediction_area, target_area = counted_areas(prediction, target, ignored, where)
        return cls._from_areas(
            intersection=intersection,
            prediction_area=None if prediction is None else prediction_area,
            target_area=target_area,
            empty_iou=empty_iou,
        )

    @classmethod
    def _from_areas(
        cls, *, intersection: int, prediction_area: int | None, target_area: int, empty_iou: float
    ) -> "IoUSums":
        """Return the sums of one pair from its pixel counts; a missing prediction has area None."""
        union = (prediction_area or 0) + target_area - intersection
        iou = intersection / union if union else empty_iou
        has_target = target_area > 0
        return cls(
            intersection=intersection,
            union=union,
            iou_sum=iou,
            hits=tuple(int(iou >= threshold) for threshold in IOU_THRESHOLDS),
            count=1,
            missing=int(prediction_area is None),
            num_no_target=int(not has_target),
            num_no_target_correct=int(not has_target and not prediction_area),
            num_target=int(has_target),
            num_target_nonempty=int(has_target and bool(prediction_area)),
        )

    def add(self, other: "IoUSums") -> "IoUSums":
        """Return the sums over the pairs of both."""
        return IoUSums(
            intersection=self.intersection + other.intersection,
            union=self.union + other.union,
            iou_sum=self.iou_sum + other.iou_sum,
            hits=tuple(mine + theirs for mine, theirs in zip(self.hits, other.hits, strict=True)),
            count=self.count + other.count,
            missing=self.missing + other.missing,
            num_no_target=self.num_no_target + other.num_no_target,
            num_no_target_correct=self.num_no_target_correct + other.num_no_target_correct,
            num_target=self.num_target + other.num_target,
            num_target_nonempty=self.num_target_nonempty + other.num_target_nonempty,
        )

    def integers(self) -> list[int]:
        """Return every integer sum in a fixed order, to be added over ranks exactly."""
        counts = [self.count, self.missing, self.num_no_target, self.num_no_target_correct]
        return [self.intersection, self.union, *self.hits, *counts, self.num_target, self.num_target_nonempty]

    @classmethod
    def from_integers(cls, values: Sequence[int], *, iou_sum: float) -> "IoUSums":
        """Return the sums that `integers` listed."""
        intersection, union, *rest = values
        hits, rest = tuple(rest[: len(IOU_THRESHOLDS)]), rest[len(IOU_THRESHOLDS) :]
        count, missing, num_no_target, num_no_target_correct, num_target, num_target_nonempty = rest
        return cls(
            intersection=intersection,
            union=union,
            iou_sum=iou_sum,
            hits=hits,
            count=count,
            missing=missing,
            num_no_target=num_no_target,
            num_no_target_correct=num_no_target_correct,
            num_target=num_target,
            num_target_nonempty=num_target_nonempty,
        )

    def update(
        self,
        prediction: RLE | None,
        target: RLE | None,
        *,
        ignored: RLE | None = None,
        empty_iou: float = 1.0,
        where: str = "pair",
    ) -> "IoUSums":
        """Return the sums with one more pair of RLEs. Raises: DataError if sizes differ."""
        return self.add(IoUSums.from_rles(prediction, target, ignored=ignored, empty_iou=empty_iou, where=where))

    def summary(self) -> dict[str, float | int]:
        """Return the scores by name, fractions in 0-1; `n_acc` and `t_acc` only with no-target items.

        If no pair has any pixel, cIoU is `empty_iou`, like gIoU. Raises: DataError without pairs.
        """
        if self.count == 0:
            raise DataError("IoU summary: found 0 scored pairs, expected at least 1; check the split and the filters")
        scores: dict[str, float | int] = {
            name: numerator / denominator for name, (numerator, denominator) in self.fractions().items() if denominator
        }
        if not self.num_no_target:
            scores.pop("t_acc", None)
        if not self.union:
            scores = {"ciou": scores["giou"], **scores}
        return scores | {"count": self.count, "missing": self.missing}

    def fractions(self) -> dict[str, tuple[float, float]]:
        """Return numerator and denominator of every score; cIoU is 0 / 0 without any pixel."""
        hits = {
            f"p{round(threshold * 100)}": (number, self.count)
            for threshold, number in zip(IOU_THRESHOLDS, self.hits, strict=True)
        }
        return {
            "ciou": (self.intersection, self.union),
            "giou": (self.iou_sum, self.count),
            **hits,
            "n_acc": (self.num_no_target_correct, self.num_no_target),
            "t_acc": (self.num_target_nonempty, self.num_target),
        }


def counted_areas(prediction: RLE | None, target: RLE | None, ignored: RLE | None, where: str) -> tuple[int, int, int]:
    """Return the areas of intersection, prediction and target without ignored pixels. None is an empty mask.

    Raises: DataError if sizes differ.
    """
    parts = [rle for rle in (prediction, target) if rle is not None]
    if len(parts) == 2:
        _check_sizes(parts[0]["size"], parts[1]["size"], where)
    if ignored is not None:
        for rle in parts:
            _check_sizes(ignored["size"], rle["size"], where, "an ignored region")
    intersection = _area(parts, ignored) if len(parts) == 2 else 0
    return intersection, _area([prediction], ignored), _area([target], ignored)


def _area(rles: Sequence[RLE | None], ignored: RLE | None) -> int:
    """Return the pixels in all of the masks and not ignored."""
    if any(rle is None for rle in rles):
        return 0
    area = int(coco_mask.area(coco_mask.merge(list(rles), intersect=True)))
    if ignored is not None:
        area -= int(coco_mask.area(coco_mask.merge([*rles, ignored], intersect=True)))
    return area


def _without(mask: BoolMask | None, ignored: BoolMask, where: str) -> BoolMask | None:
    if mask is None:
        return None
    _check_sizes(ignored.shape, mask.shape, where, "an ignored region")
    return mask & ~ignored


def _check_sizes(found_hw: Sequence[int], target_hw: Sequence[int], where: str, what: str = "a prediction") -> None:
    if tuple(found_hw) != tuple(target_hw):
        raise DataError(
            f"{where}: found {what} of size {list(found_hw)}, expected {list(target_hw)} (height, width of "
            "the target); resize predictions to the original image before scoring"
        )

"""Scores of PerBench's visual-text referring segmentation, and PerBench's overall score.

Predicted and target masks of one question, as RLE -> sums of `metrics/iou.py` (`standard`) or of
`metrics/released_iou.py` (`paper`) -> added over questions and ranks -> table.

Protocols, for predictions P0, P1, ... in the order of their [SEG] and targets T0, T1, ... in the order of the file:

- `standard`: the union of all P against the union of all T, one pair per question; no [SEG] is an empty mask.
- `each`: P0 with T0, P1 with T1, ...; unpaired masks count as missing or as false positives. Measures whether the model
  separates the objects of one answer.
- `paper`: only P0 with T0, but gIoU is divided by the number of all T, so two targets score at most 0.5. A question
  without a prediction is excluded from cIoU.

Example: P0 = T0 of 4 pixels, T1 of 4 pixels elsewhere, no P1 -> standard cIoU 0.5, each gIoU 0.5, paper cIoU 1.0 and
gIoU 0.5.
"""

from collections.abc import Sequence
from itertools import zip_longest

from pycocotools import mask as coco_mask

from pixel_sail.metrics.iou import IoUSums
from pixel_sail.metrics.released_iou import ReleasedIoUSums
from pixel_sail.rle import json_safe
from pixel_sail.types import RLE, DataError


def score_union(predictions: Sequence[RLE], targets: Sequence[RLE], *, where: str) -> IoUSums:
    """Return the sums of one question by the `standard` protocol. Raises: DataError if sizes differ, without target."""
    _check_question(predictions, targets, where)
    return IoUSums.from_rles(_union(predictions), _union(targets), where=where)


def score_each(predictions: Sequence[RLE], targets: Sequence[RLE], *, where: str) -> IoUSums:
    """Return the sums of one question by the `each` protocol; its count is that of pairs. Raises: DataError."""
    _check_question(predictions, targets, where)
    sums = IoUSums()
    for prediction, target in zip_longest(predictions, targets):
        sums = sums.update(prediction, target, where=where)
    return sums


def score_first_as_released(predictions: Sequence[RLE], targets: Sequence[RLE], *, where: str) -> ReleasedIoUSums:
    """Return the sums of one question by the `paper` protocol. Raises: DataError."""
    _check_question(predictions, targets, where)
    first = predictions[0] if predictions else None
    return ReleasedIoUSums.from_rles(first, targets[0], missing="skipped", num_targets=len(targets), where=where)


def perbench_overall(*, meteor: float, accuracy: float, ciou: float, giou: float) -> float:
    """Return PerBench's overall score, a fraction like its parts (0-1; the paper prints it times 100).

    Source: not in the release; this mean of three tasks gives the Overall column of the paper's Table 3.
    Raises: DataError for a part outside 0-1, such as a percentage.
    """
    parts = {"meteor": meteor, "accuracy": accuracy, "ciou": ciou, "giou": giou}
    for name, value in parts.items():
        if not 0.0 <= value <= 1.0:
            raise DataError(f"PerBench overall: found {name} = {value}, expected a fraction 0-1; divide by 100")
    return (meteor + accuracy + (ciou + giou) / 2) / 3


def _union(rles: Sequence[RLE]) -> RLE | None:
    return json_safe(coco_mask.merge(list(rles), intersect=False)) if rles else None


def _check_question(predictions: Sequence[RLE], targets: Sequence[RLE], where: str) -> None:
    """Raise DataError for masks of different sizes, of which pycocotools returns an empty union."""
    if not targets:
        raise DataError(f"{where}: found no target mask, expected one at least; repair the file")
    size = list(targets[0]["size"])
    for name, rles in (("prediction", predictions), ("target", targets)):
        for number, rle in enumerate(rles):
            if list(rle["size"]) != size:
                raise DataError(
                    f"{where}: found {name} {number} of size {list(rle['size'])}, expected {size} (height, width of "
                    "the first target); resize predictions to the original image before scoring"
                )

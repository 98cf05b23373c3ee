"""Prediction files of referring segmentation, and their scores.

Predictor -> `PredictionWriter` -> file -> `read_predictions` -> `score_predictions` -> one row. `record_files.py`
describes how a file survives a killed run.

Example line: {"ref_id": 8, "sent_id": 2, "image_id": 519404, "text": "the tie of the standing man", "segmentation":
{"size": [480, 640], "counts": "..."}, "answer": "It is [SEG]."}; "segmentation" is null if no [SEG] was generated. For
an answer with several [SEG], "first_segmentation" is the mask of the first one if it differs from their union. The
released scripts score the first one, so one file serves both protocols.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import numpy as np

from pixel_sail.data.masks import check_rle, decode_rle
from pixel_sail.evaluation.record_files import RecordFormat, RecordWriter, check_kinds, check_line_fields, read_records
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, TaskScores, measure, merge_scores
from pixel_sail.metrics.boundary import BoundarySums, boundary_sums
from pixel_sail.metrics.iou import IoUSums
from pixel_sail.metrics.released_iou import ReleasedIoUSums, released_target
from pixel_sail.types import DataError, Expression, Json, Prediction

logger = logging.getLogger(__name__)

_INTEGER_FIELDS = ("ref_id", "sent_id", "image_id")
_REQUIRED_FIELDS = (*_INTEGER_FIELDS, "text", "segmentation")
_MASK_FIELDS = ("segmentation", "first_segmentation")
_KINDS: dict[str, type] = {**dict.fromkeys(_INTEGER_FIELDS, int), "text": str, "answer": str}


def _to_json(prediction: Prediction, where: str) -> Json:
    line = asdict(prediction)
    for name in _MASK_FIELDS:
        if line[name] is not None:
            check_rle(line[name], None, f"{where} ref_id {prediction.ref_id}, sent_id {prediction.sent_id}, {name}")
    if line["first_segmentation"] is None:
        del line["first_segmentation"]
    return line


def _from_json(line: Json, where: str) -> Prediction:
    check_line_fields(line, _REQUIRED_FIELDS, ("answer", "first_segmentation"), where)
    check_kinds(line, _KINDS, where)
    masks = {name: check_rle(line[name], None, where) for name in _MASK_FIELDS if line.get(name) is not None}
    return Prediction(**{**line, **masks})


def prediction_key(record: Prediction | Expression) -> tuple[int, int]:
    """Return the key of an expression within its dataset."""
    return record.ref_id, record.sent_id


PREDICTIONS: RecordFormat[Prediction, tuple[int, int]] = RecordFormat(
    to_json=_to_json, from_json=_from_json, key=prediction_key, key_name="(ref_id, sent_id)"
)


class PredictionWriter(RecordWriter[Prediction]):
    """Appends predictions to a file, one flushed line each. A context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending, creating it and its folder. An incomplete last line is truncated."""
        super().__init__(path, PREDICTIONS)


def read_predictions(path: str | Path) -> list[Prediction]:
    """Return the predictions of a file in order, without duplicates. Raises: DataError, see `read_records`."""
    return read_records(path, PREDICTIONS)


def score_predictions(
    expressions: Sequence[Expression], predictions: Iterable[Prediction], *, empty_iou: float = 1.0
) -> IoUSums:
    """Return the sums over all expressions, matched with predictions by (ref_id, sent_id).

    An expression without a prediction, or whose prediction has no mask, scores as an empty mask and counts as missing.
    Ignored pixels are removed from prediction and target first.
    Raises: DataError for a prediction of an unknown expression, another image or size, or contradicting duplicates.
    """
    pairs = zip(expressions, _match(expressions, predictions), strict=True)
    each = (score_prediction(expression, prediction, empty_iou=empty_iou) for expression, prediction in pairs)
    return reduce(IoUSums.add, each, IoUSums())


def measure_predictions(
    expressions: Sequence[Expression], predictions: Iterable[Prediction], *, missing_as_released: str = "empty"
) -> TaskScores:
    """Return the scores in both protocols: those of `score_predictions`, and cIoU and gIoU as `released_prediction`.

    missing_as_released: treatment of a prediction without a mask in the release, see `metrics/released_iou.py`.
    Raises: DataError, see `score_predictions`.
    """
    pairs = list(zip(expressions, _match(expressions, predictions), strict=True))
    standard = [score_prediction(expression, prediction) for expression, prediction in pairs]
    released = [released_prediction(*pair, missing=missing_as_released) for pair in pairs]
    return merge_scores(measure(standard), measure(released, prefix=PAPER_PREFIX))


def measure_boundaries(
    expressions: Sequence[Expression], predictions: Iterable[Prediction], *, missing_as_released: str = "empty"
) -> TaskScores:
    """Return the scores of `measure_predictions` and the boundary IoU, which decodes every mask.

    Raises: DataError, see `score_predictions`.
    """
    matched = _match(expressions, predictions)
    given = [prediction for prediction in matched if prediction is not None]
    areas = measure_predictions(expressions, given, missing_as_released=missing_as_released)
    rims = [_boundary_sums(expression, prediction) for expression, prediction in zip(expressions, matched, strict=True)]
    return merge_scores(areas, measure(rims))


def _boundary_sums(expression: Expression, prediction: Prediction | None) -> BoundarySums:
    """Return the sums of one expression without ignored pixels."""
    counted = np.ones(expression.image_hw, dtype=np.bool_)
    if expression.ignored is not None:
        counted = ~decode_rle(expression.ignored)
    predicted = None if prediction is None else prediction.segmentation
    target = (
        np.zeros(expression.image_hw, dtype=np.bool_) if expression.target is None else decode_rle(expression.target)
    )
    return boundary_sums(None if predicted is None else decode_rle(predicted) & counted, target & counted)


def _match(expressions: Sequence[Expression], predictions: Iterable[Prediction]) -> list[Prediction | None]:
    """Return the prediction for every expression, None if missing."""
    by_id: dict[tuple[int, int], Prediction] = {}
    for prediction in predictions:
        PREDICTIONS.add_unique(by_id, prediction, "predictions")
    unknown = by_id.keys() - {prediction_key(expression) for expression in expressions}
    if unknown:
        raise DataError(
            f"predictions: found (ref_id, sent_id) {min(unknown)} and {len(unknown) - 1} others that are not "
            f"among the {len(expressions)} expressions, expected none; check dataset, split and split_by"
        )
    num_absent = len(expressions) - len(by_id)
    if num_absent:
        logger.warning("%d of %d expressions have no prediction, they count as missing", num_absent, len(expressions))
    return [by_id.get(prediction_key(expression)) for expression in expressions]


def score_prediction(expression: Expression, prediction: Prediction | None, *, empty_iou: float = 1.0) -> IoUSums:
    """Return the sums of one expression. Ignored pixels count neither as predicted nor as target.

    Raises: DataError for a prediction of another image or size.
    """
    where = f"ref_id {expression.ref_id}, sent_id {expression.sent_id}"
    if prediction is not None:
        _check_match(prediction, expression, where)
    return IoUSums.from_rles(
        None if prediction is None else prediction.segmentation,
        expression.target,
        ignored=expression.ignored,
        empty_iou=empty_iou,
        where=where,
    )


def released_prediction(
    expression: Expression, prediction: Prediction | None, *, missing: str = "empty"
) -> ReleasedIoUSums:
    """Return the sums of one expression as in the released scripts: the first mask against their target.

    Raises: DataError for a prediction of another image or size.
    """
    where = f"ref_id {expression.ref_id}, sent_id {expression.sent_id}"
    first = None
    if prediction is not None:
        _check_match(prediction, expression, where)
        first = prediction.first_segmentation or prediction.segmentation
    target = expression.released_target or released_target(expression.target, expression.ignored)
    return ReleasedIoUSums.from_rles(first, target, missing=missing, where=where)


def _check_match(prediction: Prediction, expression: Expression, where: str) -> None:
    if prediction.image_id != expression.image_id:
        raise DataError(
            f"{where}: found a prediction for image {prediction.image_id}, expected image {expression.image_id}; "
            "the file was made from another release of the annotations"
        )
    for mask in (prediction.segmentation, prediction.first_segmentation):
        if mask is not None and tuple(mask["size"]) != expression.image_hw:
            raise DataError(
                f"{where}: found a mask of size {mask['size']}, expected {list(expression.image_hw)} (height, width of "
                f"image {expression.image_id}); resize predictions to the original image"
            )

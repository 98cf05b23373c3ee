"""Prediction files, one JSON record per line, and their score.

Place in the flow: predictor -> `PredictionWriter` -> file -> `read_predictions` -> `score_predictions` -> one row. The
writer adds whole lines, so a run that was killed leaves at most one unfinished line at the end; reading drops it and
says so, opening for writing cuts it off, and the run goes on with the expressions that are not in the file.

Example line: {"ref_id": 8, "sent_id": 2, "image_id": 519404, "text": "the tie of the standing man", "segmentation":
{"size": [480, 640], "counts": "..."}, "answer": "It is [SEG]."}; "segmentation" is null when no [SEG] was generated.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pixel_sail.data.masks import check_rle
from pixel_sail.metrics.iou import IoUSums
from pixel_sail.types import DataError, Expression, Prediction

logger = logging.getLogger(__name__)

_INTEGER_FIELDS = ("ref_id", "sent_id", "image_id")
_REQUIRED_FIELDS = (*_INTEGER_FIELDS, "text", "segmentation")


class PredictionWriter:
    """Appends predictions to a file, one flushed line each. Use as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending, creating it and its folder, after cutting off an unfinished last line."""
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _repair_end(self._path)
        self._file = self._path.open("ab")

    def write(self, prediction: Prediction) -> None:
        """Append one record. Raises: DataError if its segmentation is not a sound RLE."""
        if prediction.segmentation is not None:
            where = f"{self._path}: prediction ref_id {prediction.ref_id}, sent_id {prediction.sent_id}"
            check_rle(prediction.segmentation, None, where)
        self._file.write(json.dumps(asdict(prediction)).encode("ascii") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "PredictionWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def read_predictions(path: str | Path) -> list[Prediction]:
    """Return the records of a file in order, identical repeats once.

    An unfinished last line is dropped with a warning. Raises: DataError naming file:line for any other malformed line,
    and for two different records of one (ref_id, sent_id).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: found no readable file ({error.strerror}), expected JSON lines; check the path"
        ) from error
    body, rest = _split_unfinished(data)
    if rest:
        logger.warning("%s: dropped an unfinished last line of %d bytes", path, len(rest))
    predictions: dict[tuple[int, int], Prediction] = {}
    for number, line in enumerate(body.splitlines(), start=1):
        _add_unique(predictions, _parse_line(line, f"{path}:{number}"), f"{path}:{number}")
    return list(predictions.values())


def score_predictions(
    expressions: Sequence[Expression], predictions: Iterable[Prediction], *, empty_iou: float = 1.0
) -> IoUSums:
    """Return the sums over all expressions, matched with predictions by (ref_id, sent_id).

    An expression without a prediction, or whose prediction has no mask, scores as an empty mask and counts as missing.
    Raises: DataError for a prediction of no expression here, another image, another size, or two that contradict.
    """
    by_id: dict[tuple[int, int], Prediction] = {}
    for prediction in predictions:
        _add_unique(by_id, prediction, "predictions")
    unknown = by_id.keys() - {(expression.ref_id, expression.sent_id) for expression in expressions}
    if unknown:
        raise DataError(
            f"predictions: found (ref_id, sent_id) {min(unknown)} and {len(unknown) - 1} others that are not among the "
            f"{len(expressions)} expressions, expected none; check dataset, split and split_by"
        )
    num_absent = len(expressions) - len(by_id)
    if num_absent:
        logger.warning("%d of %d expressions have no prediction, they count as missing", num_absent, len(expressions))
    sums = IoUSums()
    for expression in expressions:
        found = by_id.get((expression.ref_id, expression.sent_id))
        where = f"ref_id {expression.ref_id}, sent_id {expression.sent_id}"
        if found is not None:
            _check_match(found, expression, where)
        segmentation = found.segmentation if found is not None else None
        sums = sums.update(segmentation, expression.target, empty_iou=empty_iou, where=where)
    return sums


def _check_match(prediction: Prediction, expression: Expression, where: str) -> None:
    if prediction.image_id != expression.image_id:
        raise DataError(
            f"{where}: found a prediction for image {prediction.image_id}, expected image {expression.image_id}; "
            "the file was made from another release of the annotations"
        )
    if prediction.segmentation is not None and tuple(prediction.segmentation["size"]) != expression.image_hw:
        raise DataError(
            f"{where}: found a mask of size {prediction.segmentation['size']}, expected {list(expression.image_hw)} "
            f"(height, width of image {expression.image_id}); resize predictions to the original image"
        )


def _add_unique(by_id: dict[tuple[int, int], Prediction], prediction: Prediction, where: str) -> None:
    """Add a prediction unless the same one is there already."""
    key = (prediction.ref_id, prediction.sent_id)
    if by_id.setdefault(key, prediction) != prediction:
        raise DataError(
            f"{where}: found a second, different record for (ref_id, sent_id) {key}, expected one; "
            "two runs wrote into one file, start a new one"
        )


def _parse_line(line: bytes, where: str) -> Prediction:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: found no JSON ({error}), expected one record; remove or repair the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected a JSON object; remove or repair the line")
    _check_fields(record, where)
    segmentation = record["segmentation"]
    return Prediction(
        ref_id=record["ref_id"],
        sent_id=record["sent_id"],
        image_id=record["image_id"],
        text=record["text"],
        segmentation=None if segmentation is None else check_rle(segmentation, None, where),
        answer=record.get("answer", ""),
    )


def _check_fields(record: dict[str, Any], where: str) -> None:
    missing = [name for name in _REQUIRED_FIELDS if name not in record]
    unknown = sorted(record.keys() - {*_REQUIRED_FIELDS, "answer"})
    if missing or unknown:
        raise DataError(
            f"{where}: found unknown fields {unknown} and no {missing}, expected {list(_REQUIRED_FIELDS)} and perhaps "
            "'answer'; repair the line"
        )
    kinds = {**dict.fromkeys(_INTEGER_FIELDS, int), "text": str, "answer": str}
    for name, kind in kinds.items():
        if name in record and type(record[name]) is not kind:
            raise DataError(f"{where}: found {name} = {record[name]!r}, expected {kind.__name__}; repair the line")


def _split_unfinished(data: bytes) -> tuple[bytes, bytes]:
    """Return the whole lines of a file and the unfinished rest.

    A last line without a newline that is a whole JSON value is finished: a cut object never parses.
    """
    end = data.rfind(b"\n") + 1
    rest = data[end:]
    try:
        json.loads(rest)
    except ValueError:
        return data[:end], rest
    return data, b""


def _repair_end(path: Path) -> None:
    """Make a prediction file end with a whole line."""
    if not path.exists():
        return
    body, rest = _split_unfinished(path.read_bytes())
    if rest:
        logger.warning("%s: cut off an unfinished last line of %d bytes", path, len(rest))
    with path.open("r+b") as file:
        file.truncate(len(body))
        if body and not body.endswith(b"\n"):
            file.seek(0, 2)
            file.write(b"\n")

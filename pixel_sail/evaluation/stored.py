"""Evals of an evaluation folder, read back to be scored again or compared.

Place in the flow: `<output>/<eval>/protocol.json` and `predictions.jsonl` -> `StoredEval` -> `comparison.py` for
`tools/compare_runs.py`. The protocol holds the eval's own config entry, so the items come from where they came from:

    read_stored(Path("runs/a/evaluation/refcoco_val")).measure().scores["ciou"] == 0.81

Neither model nor photos are needed. `_target_` may name functions of this package only.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixel_sail.config import build
from pixel_sail.evaluation.measured import Measured
from pixel_sail.evaluation.record_files import read_records
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.task import Question, Task
from pixel_sail.types import DataError

PACKAGE = "pixel_sail."


@dataclass(frozen=True, kw_only=True)
class StoredEval:
    """One eval of one evaluation, complete."""

    folder: Path
    protocol: dict[str, Any]
    task: Task[Any, Any]
    records: list[Any]
    """In the order of the items."""

    @cached_property
    def questions(self) -> list[Question]:
        """Return the question of every item, as it was asked."""
        return self.task.questions(self.protocol["predict"]["prompt"])

    def images(self) -> list[str]:
        """Return which image each item is about."""
        return [str(question.image_id) for question in self.questions]

    def measure(self) -> Measured:
        """Return the scores, computed anew. Raises: DataError."""
        return self.task.measure(self.task.items, self.records)


def stored_evals(folder: Path) -> list[str]:
    """Return the names of the evals of an evaluation folder. Raises: DataError when there is none."""
    names = sorted(file.parent.name for file in folder.glob("*/protocol.json"))
    if not names:
        raise DataError(
            f"{folder}: found no <eval>/protocol.json, expected a folder that scripts/evaluate.py wrote, such as "
            "runs/<name>/evaluation"
        )
    return names


def read_protocol(folder: Path) -> dict[str, Any]:
    """Return what made the predictions of one eval. Raises: DataError."""
    file = folder / "protocol.json"
    try:
        protocol: dict[str, Any] = json.loads(file.read_text())
        target = protocol["eval"]["_target_"]
        complete = {"questions_sha256", "weights_sha256", "predict"} <= protocol.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: found no protocol ({error!r}), expected that of an eval; evaluate again") from error
    if not complete or not str(target).startswith(PACKAGE):
        raise DataError(
            f"{file}: found _target_ {target!r} and fields {sorted(protocol)}, expected a function of {PACKAGE} and "
            "the hashes of questions and weights; the file is of another version, evaluate again"
        )
    return protocol


def read_stored(folder: Path) -> StoredEval:
    """Return one eval with its items and records.

    Raises: DataError when the evaluation is unfinished or the annotations are no longer those that were asked about.
    """
    protocol = read_protocol(folder)
    node = dict(protocol["eval"])
    max_images, prompt = node.pop("max_images", 0), protocol["predict"]["prompt"]
    task = as_task(build(node, str(folder)), str(folder)).first_images(max_images, prompt)
    file = folder / "predictions.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: found no such file, expected all predictions; the evaluation was not finished")
    by_key = {task.format.key(record): record for record in read_records(file, task.format)}
    keys = [question.key for question in task.questions(prompt)]
    if by_key.keys() != set(keys):
        raise DataError(
            f"{file}: found {len(by_key)} predictions, {len(by_key.keys() - set(keys))} of them to no item, expected "
            f"one for each of the {len(keys)} items; the annotations changed since, or the file was edited"
        )
    return StoredEval(folder=folder, protocol=protocol, task=task, records=[by_key[key] for key in keys])

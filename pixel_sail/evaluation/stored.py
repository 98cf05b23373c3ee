"""Finished evals, read back for rescoring or comparison.

`<output>/<eval>/protocol.json` and `predictions.jsonl` -> `StoredEval` -> `comparison.py` for `tools/compare_runs.py`.
The protocol names the loader of the items and its settings, so the same items are loaded:

    read_stored(Path("runs/a/evaluation/refcoco_val")).measure().scores["ciou"] == 0.81

Neither model nor images are needed. The folder may be untrusted; `loaders.py` limits what it can name.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixel_sail.evaluation.loaders import LIMIT, load_entry, read_entry
from pixel_sail.evaluation.record_files import read_records
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.task import ItemRequest, Task
from pixel_sail.evaluation.task_scores import TaskScores
from pixel_sail.types import DataError


@dataclass(frozen=True, kw_only=True)
class StoredEval:
    """One finished eval."""

    folder: Path
    protocol: dict[str, Any]
    task: Task[Any, Any]
    records: list[Any]
    """In the order of the items."""

    @cached_property
    def requests(self) -> list[ItemRequest[Any]]:
        """Return the request of every item."""
        return self.task.requests(self.protocol["predict"]["prompt"])

    def images(self) -> list[str]:
        """Return the image of each item."""
        return [str(request.image_id) for request in self.requests]

    def measure(self) -> TaskScores:
        """Recompute the scores. Raises: DataError."""
        return self.task.measure(self.task.items, self.records)


def stored_evals(folder: Path) -> list[str]:
    """Return the names of the evals of an evaluation folder. Raises: DataError if there is none."""
    names = sorted(file.parent.name for file in folder.glob("*/protocol.json"))
    if not names:
        raise DataError(
            f"{folder}: found no <eval>/protocol.json, expected a folder that scripts/evaluate.py wrote, such as "
            "runs/<name>/evaluation"
        )
    return names


def read_protocol(folder: Path) -> dict[str, Any]:
    """Return the protocol of one eval. Raises: DataError."""
    file = folder / "protocol.json"
    try:
        protocol = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: found no protocol ({error!r}), expected that of an eval; evaluate again") from error
    if not isinstance(protocol, dict):
        raise DataError(f"{file}: found no protocol but a {type(protocol).__name__}, expected that of an eval")
    predict = protocol.get("predict")
    hashes = [protocol.get(name) for name in ("questions_sha256", "weights_sha256")]
    if not all(isinstance(value, str) for value in hashes) or not isinstance(predict, dict):
        raise DataError(
            f"{file}: found no protocol of this version, expected the hashes of questions and weights and the settings "
            "`predict`; evaluate again"
        )
    if not isinstance(predict.get("prompt"), str):
        raise DataError(f"{file}: found predict.prompt {predict.get('prompt')!r:.80}, expected the name of a template")
    return protocol | {"eval": read_entry(protocol.get("eval"), str(file))}


def read_stored(folder: Path, loaders: Collection[str] = ()) -> StoredEval:
    """Return one eval with its items and records.

    loaders: the user's own functions that the folder may name, see `loaders.py`.
    Raises: DataError if the evaluation is unfinished or the annotations changed since.
    """
    protocol = read_protocol(folder)
    where, prompt = str(folder / "protocol.json"), protocol["predict"]["prompt"]
    loaded = as_task(load_entry(protocol["eval"], where, loaders), where)
    task = loaded.first_images(protocol["eval"][LIMIT], prompt)
    file = folder / "predictions.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: found no such file, expected all predictions; the evaluation was not finished")
    by_key = {task.format.key(record): record for record in read_records(file, task.format)}
    keys = [request.key for request in task.requests(prompt)]
    if by_key.keys() != set(keys):
        raise DataError(
            f"{file}: found {len(by_key)} predictions, {len(by_key.keys() - set(keys))} of them to no item, expected "
            f"one for each of the {len(keys)} items; the annotations changed since, or the file was edited"
        )
    return StoredEval(folder=folder, protocol=protocol, task=task, records=[by_key[key] for key in keys])

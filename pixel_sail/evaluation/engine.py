"""Distributed, resumable inference over all items of a task, each exactly once.

`run.py` builds tasks and calls `evaluate`, which returns the records that the task then scores.

    <output>/protocol.json                everything the predictions depend on: hashes of the model's files and of the
                                          questions, settings, eval
    <output>/part-0.jsonl part-1.jsonl    records of each rank, one line per item
    <output>/predictions.jsonl            all of them in the order of the annotations, written at the end

Items are first grouped into batches: the questions about a few images of one patch grid, which are encoded together.
Batches depend only on the task and `max_batch_tokens`, not on finished work or the number of processes, so that
interrupted and distributed runs give the same results up to the last bit. Batches are distributed over ranks
round-robin, most expensive first. Each rank appends its records to its own file, without communication before the end.
A killed run resumes with the batches that are not complete on file.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from PIL import Image
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest, NotFiniteError, span_length
from pixel_sail.evaluation.record_files import Record, RecordFormat, RecordWriter, read_records, write_errors
from pixel_sail.evaluation.task import Item, ItemRequest, Task, by_image
from pixel_sail.files import replace_text
from pixel_sail.model.folder import hash_of, weights_hash
from pixel_sail.predictor_io import PredictorOutput
from pixel_sail.types import DataError, SizeHW

RequestBatch = list[list[ItemRequest[Item]]]
"""Items grouped by image, for a few images."""

QUESTION_TOKENS = 32
"""Estimated length of a question, for batching before tokenization. The predictor counts exactly."""


def evaluate(
    predictor: BatchPredictor,
    task: Task[Item, Record],
    output: Path,
    *,
    protocol: dict[str, Any],
    progress: bool = True,
) -> list[Record]:
    """Answer every item exactly once, resuming from `output`. Return all records in order, on every rank.

    Raises: ConfigError if `output` was made with another protocol; DataError if an item has no answer, two different
    answers, or non-finite outputs.
    """
    predictor = _with_length(predictor, task)
    requests = _requests(task, predictor.config.prompt)
    _check_prompt_ids(predictor, requests)
    _claim(output, protocol)
    done = _read_parts(output, task).keys()
    # Every rank reads the finished records before any rank appends, so that all distribute the same remainder.
    dist.barrier()
    remaining = [batch for batch in batches(predictor, requests) if _keys(batch) - done]
    own = remaining[dist.rank() :: dist.world_size()]
    with (
        RecordWriter(output / f"part-{dist.rank()}.jsonl", task.format) as writer,
        _progress(own, output.name, progress) as bar,
    ):
        for batch, records in _answer_batches(predictor, task, own):
            for record in records:
                if task.format.key(record) not in done:
                    writer.write(record)
            writer.sync()
            bar.update(len(batch))
    dist.barrier()
    ordered = _complete(output, task, [request.key for request in requests])
    if dist.rank() == 0:
        _write_merged(output / "predictions.jsonl", task.format, ordered)
    dist.barrier()
    return ordered


def answer_own(predictor: BatchPredictor, task: Task[Item, Record]) -> tuple[list[Item], list[Record]]:
    """Return this rank's items and their records without writing files, for validation during training."""
    predictor = _with_length(predictor, task)
    own = batches(predictor, _requests(task, predictor.config.prompt))[dist.rank() :: dist.world_size()]
    items: list[Item] = []
    records: list[Record] = []
    for batch, written in _answer_batches(predictor, task, own):
        by_key = {task.format.key(record): record for record in written}
        requests = [request for group in batch for request in group]
        items += [request.item for request in requests]
        records += [by_key[request.key] for request in requests]
    return items, records


def answer_image(predictor: BatchPredictor, task: Task[Item, Record], items: Sequence[Item]) -> list[Record]:
    """Return the records of items about one image, in the order of the items. Raises: DataError."""
    predictor = _with_length(predictor, task)
    requests = [task.request(item, predictor.config.prompt) for item in items]
    ((_, records),) = _answer_batches(predictor, task, [[requests]])
    by_key = {task.format.key(record): record for record in records}
    return [by_key[request.key] for request in requests]


def batches(predictor: BatchPredictor, requests: Sequence[ItemRequest[Item]]) -> list[RequestBatch[Item]]:
    """Return all items in batches of images with one patch grid within `max_batch_tokens`, most expensive first.

    An image whose questions alone exceed the limit is its own batch.
    """
    costs: list[tuple[int, RequestBatch[Item]]] = []
    by_grid: dict[SizeHW, list[list[ItemRequest[Item]]]] = {}
    for group in by_image(requests):
        by_grid.setdefault(predictor.processor.grid_of(group[0].source_image.size_hw), []).append(group)
    for grid, groups in by_grid.items():
        batch: RequestBatch[Item] = []
        for group in groups:
            if batch and _cost(predictor, grid, [*batch, group]) > predictor.config.max_batch_tokens:
                costs.append((_cost(predictor, grid, batch), batch))
                batch = []
            batch.append(group)
        costs.append((_cost(predictor, grid, batch), batch))
    return [batch for _, batch in sorted(costs, key=lambda pair: -pair[0])]


def _cost(predictor: BatchPredictor, grid_hw: SizeHW, batch: RequestBatch[Any]) -> int:
    """Return the estimated tokens of a batch: texts, and images once per set of visual prompts."""
    overlays = [_by_overlay(group) for group in batch]
    per_question = QUESTION_TOKENS + (predictor.config.max_new_tokens or 0)
    num_questions = max(len(overlay) for image in overlays for overlay in image)
    return sum(map(len, overlays)) * (span_length(grid_hw) + num_questions * per_question)


def _with_length(predictor: BatchPredictor, task: Task[Any, Any]) -> BatchPredictor:
    """Return the predictor with the task's length limit unless the config sets one."""
    is_open = predictor.config.max_new_tokens is None
    return predictor.changed(max_new_tokens=task.max_new_tokens) if is_open else predictor


def _keys(batch: RequestBatch[Any]) -> set[Any]:
    return {request.key for group in batch for request in group}


@dataclass(frozen=True, kw_only=True)
class _Prepared(Generic[Item]):
    """A batch with opened images: requests to the predictor, and the items of each."""

    requests: list[GenerationRequest]
    overlays: list[list[ItemRequest[Item]]]


def _answer_batches(
    predictor: BatchPredictor, task: Task[Item, Record], own: Sequence[RequestBatch[Item]]
) -> Iterator[tuple[RequestBatch[Item], list[Record]]]:
    """Yield batches with their records. The images of the next batch are loaded while the model runs."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        opened = deque(pool.submit(_prepare, predictor, batch) for batch in own[:1])
        for index, batch in enumerate(own):
            prepared = opened.popleft().result()
            opened.extend(pool.submit(_prepare, predictor, following) for following in own[index + 1 : index + 2])
            yield batch, list(_answer(predictor, task, prepared))


def _prepare(predictor: BatchPredictor, batch: RequestBatch[Item]) -> _Prepared[Item]:
    """Open the images of a batch and decode its regions. Raises: DataError."""
    prepared: _Prepared[Item] = _Prepared(requests=[], overlays=[])
    for group in batch:
        image = predictor.prepare(_open_image(group))
        for overlay in _by_overlay(group):
            prompts = overlay[0].prompts()
            texts = [request.text for request in overlay]
            prepared.requests.append(GenerationRequest(image=image, prompts=prompts, questions=texts))
            prepared.overlays.append(overlay)
    return prepared


def _answer(predictor: BatchPredictor, task: Task[Item, Record], prepared: _Prepared[Item]) -> Iterator[Record]:
    """Yield the records of one batch."""
    outputs = _ask(predictor, prepared.requests, prepared.overlays)
    retries = _retry(predictor, task, prepared, outputs)
    for number, overlay in enumerate(prepared.overlays):
        for index, (request, output) in enumerate(zip(overlay, outputs[number], strict=True)):
            yield task.record(request, retries.get((number, index), output), predictor.config.mask)


def _ask(
    predictor: BatchPredictor, requests: Sequence[GenerationRequest], overlays: Sequence[Sequence[ItemRequest[Any]]]
) -> list[list[PredictorOutput]]:
    """Return the outputs for every request. Raises: DataError naming the item with non-finite outputs."""
    try:
        return predictor.ask_many(requests)
    except NotFiniteError as error:
        request = overlays[error.request][error.question]
        raise DataError(
            f"item {request.key} of image {request.image_id} ({request.source_image.path}): {error}"
        ) from None


def _retry(
    predictor: BatchPredictor,
    task: Task[Any, Any],
    prepared: _Prepared[Any],
    outputs: Sequence[Sequence[PredictorOutput]],
) -> dict[tuple[int, int], PredictorOutput]:
    """Return for each answer without a mask its text with the masks of a retry with a forced answer."""
    if not task.retries_without_mask or predictor.config.answer != "generated":
        return {}
    again = [[i for i, output in enumerate(own) if len(output.masks_NHW) == 0] for own in outputs]
    forced = _ask(
        predictor.changed(answer="forced"),
        [
            replace(request, questions=[request.questions[i] for i in indices])
            for request, indices in zip(prepared.requests, again, strict=True)
        ],
        [[own[i] for i in indices] for own, indices in zip(prepared.overlays, again, strict=True)],
    )
    return {
        (number, index): replace(outputs[number][index], masks_NHW=own.masks_NHW, scores=own.scores, is_retry=True)
        for number, indices in enumerate(again)
        for index, own in zip(indices, forced[number], strict=True)
    }


def _by_overlay(group: Sequence[ItemRequest[Item]]) -> list[list[ItemRequest[Item]]]:
    """Return the items of one image grouped by visual prompts, in order of occurrence."""
    overlays: dict[tuple[Any, ...], list[ItemRequest[Item]]] = {}
    for request in group:
        overlays.setdefault(request.overlay_key(), []).append(request)
    return list(overlays.values())


def _open_image(group: Sequence[ItemRequest[Any]]) -> Image.Image:
    """Open the common image of all requests of a group."""
    first = group[0]
    other = next((request for request in group if request.source_image != first.source_image), None)
    if other is not None:
        raise DataError(
            f"image {first.image_id}: found {first.source_image} for item {first.key} and {other.source_image} for "
            f"item {other.key}, expected one image of one size; repair the annotations"
        )
    return first.source_image.open(f"image {first.image_id}")


def _requests(task: Task[Item, Any], prompt: str) -> list[ItemRequest[Item]]:
    """Return the requests of all items. Raises: DataError for duplicate keys."""
    requests = task.requests(prompt)
    seen: set[Any] = set()
    for request in requests:
        if request.key in seen:
            raise DataError(
                f"{task.kind}: found item {request.key} twice, expected every item once; repair the annotations"
            )
        seen.add(request.key)
    return requests


def _check_prompt_ids(predictor: BatchPredictor, requests: Sequence[ItemRequest[Any]]) -> None:
    """Check before inference that the model has a token for every region. Raises: DataError."""
    number = predictor.processor.settings.num_visual_prompts
    for request in requests:
        highest = max(request.prompt_ids, default=-1)
        if highest >= number:
            raise DataError(
                f"item {request.key}: found <Prompt{highest}>, expected prompts below {number}, the number of prompt "
                "tokens of this checkpoint; use a checkpoint with more, or remove the item from the file"
            )


def protocol_of(
    predictor: BatchPredictor,
    task: Task[Any, Any],
    *,
    checkpoint: str,
    hashes: Mapping[str, str],
    precision: str,
    eval_entry: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that a prediction file depends on. `hashes`: of the model's files by name."""
    limit = predictor.config.max_new_tokens
    tokens = task.max_new_tokens if limit is None else limit
    # The batch size does not affect answers. Its field keeps its old name, because files are compared byte by byte.
    settings = {name: value for name, value in vars(predictor.config).items() if name != "max_batch_tokens"}
    return {
        "checkpoint": checkpoint,
        "weights_sha256": weights_hash(Path(checkpoint), hashes),
        "model_files": dict(hashes),
        "model_sha256": hash_of(hashes),
        "precision": precision,
        "predict": settings | {"token_budget": None, "max_new_tokens": tokens},
        "eval": dict(eval_entry),
        "task": task.kind,
        "retries_without_mask": task.retries_without_mask,
        "questions_sha256": _digest(task.requests(predictor.config.prompt)),
    }


def _digest(requests: Sequence[ItemRequest[Any]]) -> str:
    """Return a hash of all requests, to detect predictions for other annotations."""
    digest = hashlib.sha256()
    for request in requests:
        source_image = [request.source_image.path.name, request.source_image.size_hw, request.source_image.is_upright]
        asked = [request.key, request.image_id, source_image, request.text, request.prompt_ids, request.regions]
        digest.update(json.dumps(asked, sort_keys=True).encode())
    return digest.hexdigest()


def _claim(output: Path, protocol: dict[str, Any]) -> None:
    """Create the folder, or check that its content was made with the same protocol."""
    file = output / "protocol.json"
    text = json.dumps(protocol, indent=1, sort_keys=True) + "\n"
    if dist.rank() == 0:
        if not file.is_file() and any(output.glob("part-*.jsonl")):
            raise ConfigError(
                f"{output}: found answers without protocol.json, expected both; choose another output folder, or "
                "delete this one"
            )
        if file.is_file() and file.read_bytes() != text.encode():
            raise ConfigError(
                f"{file}: found predictions of another protocol ({_changes(file, json.loads(text))}), expected the "
                "same one; choose another output folder, or delete this one"
            )
        with write_errors(file):
            replace_text(file, text)
    dist.barrier()


def _changes(file: Path, protocol: Mapping[str, Any]) -> str:
    """Return a description of the differences between a protocol and the one in a file."""
    try:
        found = dict(_flat_leaves(json.loads(file.read_text())))
    except (OSError, ValueError, TypeError, RecursionError):
        return "the file cannot be read"
    expected = dict(_flat_leaves(protocol))
    changed = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    named = [f"{key} {found.get(key)!r:.60} there, {expected.get(key)!r:.60} now" for key in changed]
    return f"differing in {'; '.join(named[:6])}{' and more' if len(named) > 6 else ''}"


def _flat_leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries, each with its keys joined by dots."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flat_leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def _read_parts(output: Path, task: Task[Any, Record]) -> dict[Any, Record]:
    """Return the records of all ranks so far by key. Equal answers in two files count once.

    Raises: DataError for two different answers to one item, naming the file of the second.
    """
    by_key: dict[Any, Record] = {}
    first: dict[Any, Path] = {}
    for part in sorted(output.glob("part-*.jsonl")):
        for record in read_records(part, task.format):
            key = task.format.key(record)
            if by_key.setdefault(key, record) != record:
                raise DataError(
                    f"{part}: found another answer for {task.format.key_name} {key} than in {first[key]}, expected "
                    "one; two evaluations wrote to one folder. Remove the line from one of the files, or from both to "
                    "evaluate it again"
                )
            first.setdefault(key, part)
    return by_key


def _complete(output: Path, task: Task[Any, Record], keys: Sequence[Any]) -> list[Record]:
    """Return one record per key, in order. Raises: DataError if one is missing or of another benchmark."""
    answered = _read_parts(output, task)
    unanswered = [key for key in keys if key not in answered]
    alien = answered.keys() - set(keys)
    if unanswered or alien:
        raise DataError(
            f"{output}: found answers to {len(answered)} items, {len(unanswered)} items unanswered and {len(alien)} "
            f"answers to no item{f', such as {min(map(str, alien))}' if alien else ''}, expected one for each of "
            f"{len(keys)} items; run again to resume, remove lines that answer no item"
        )
    return [answered[key] for key in keys]


def _progress(own: Sequence[RequestBatch[Any]], name: str, shown: bool) -> "tqdm[Any]":
    """Return a progress bar over images, on rank 0."""
    num_images = sum(len(batch) for batch in own)
    return tqdm(total=num_images, desc=name, unit="image", disable=not shown or dist.rank() != 0)


def _write_merged(path: Path, record_format: RecordFormat[Record, Any], records: Sequence[Record]) -> None:
    """Write all records to one file atomically."""
    working = path.with_name(f".{path.name}")
    working.unlink(missing_ok=True)
    with RecordWriter(working, record_format) as writer:
        for record in records:
            writer.write(record)
    os.replace(working, path)

"""Asking every item of a task exactly once, over any number of processes, and going on after a kill.

Place in the flow: `run.py` builds tasks and calls `evaluate`, which returns the records that the task then scores.
Images are dealt to ranks in turn; each rank writes its records as they come into a file of its own, there is no
communication before the end, and a run that was killed goes on with the items that no file holds yet.

    <output>/protocol.json                what asked the questions: hashes of checkpoint and questions, settings, eval
    <output>/part-0.jsonl part-1.jsonl    records of each rank, one line per item
    <output>/predictions.jsonl            all of them in the order of the annotations, written at the end

An image is opened once for all its items. Items with the same visual prompts share its encoded prefix; other prompts
mean another prefix, encoded one after another, but the answers of one image are generated as one batch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError
from pixel_sail.evaluation.predict import Predictor, Reply
from pixel_sail.evaluation.record_files import Record, RecordFormat, RecordWriter, read_records
from pixel_sail.evaluation.task import Answered, Asked, Item, Question, Task, by_image
from pixel_sail.types import DataError


def evaluate(
    predictor: Predictor, task: Task[Item, Record], output: Path, *, protocol: dict[str, Any], progress: bool = True
) -> list[Record]:
    """Ask every item exactly once, continuing what `output` already holds; return all records on every rank, in order.

    Raises: ConfigError when `output` was made with another protocol; RuntimeError when an item stayed unanswered.
    """
    asked = _pair(task, predictor.config.prompt)
    _check_prompt_ids(predictor, asked)
    _claim(output, protocol)
    done = {task.format.key(record) for record in _read_parts(output, task)}
    # Every rank has read what is done before any rank adds to it, so that all deal out the same remainder.
    dist.barrier()
    remaining = by_image([pair for pair in asked if pair.question.key not in done])
    own = remaining[dist.rank() :: dist.world_size()]
    with RecordWriter(output / f"part-{dist.rank()}.jsonl", task.format) as writer:
        for group in _progress(own, output.name, progress):
            for record in _answer_group(predictor, task, group):
                writer.write(record)
            writer.sync()
    dist.barrier()
    ordered = _complete(output, task, [pair.question.key for pair in asked])
    if dist.rank() == 0:
        _write_merged(output / "predictions.jsonl", task.format, ordered)
    dist.barrier()
    return ordered


def answer_own(predictor: Predictor, task: Task[Item, Record]) -> tuple[list[Item], list[Record]]:
    """Return this rank's share of the items and their records, without files: validation during training."""
    groups = by_image(_pair(task, predictor.config.prompt))[dist.rank() :: dist.world_size()]
    items = [pair.item for group in groups for pair in group]
    records = [answer_image(predictor, task, [pair.item for pair in group]) for group in groups]
    return items, [record for group in records for record in group]


def answer_image(predictor: Predictor, task: Task[Item, Record], items: Sequence[Item]) -> list[Record]:
    """Return the records of items about one image, in the order of the items. Raises: DataError."""
    asked = [Asked(item=item, question=task.question(item, predictor.config.prompt)) for item in items]
    by_key = {task.format.key(record): record for record in _answer_group(predictor, task, asked)}
    return [by_key[pair.question.key] for pair in asked]


def _answer_group(predictor: Predictor, task: Task[Item, Record], group: Sequence[Asked[Item]]) -> Iterator[Record]:
    """Yield the records of one image, overlay by overlay."""
    if predictor.config.max_new_tokens is None:
        predictor = predictor.changed(max_new_tokens=task.max_new_tokens)
    image = _open_image([pair.question for pair in group])
    overlays = _by_overlay(group)
    for overlay, replies in zip(overlays, _ask(predictor, image, overlays), strict=True):
        retries = _retry(predictor, task, image, overlay, replies)
        for index, (pair, reply) in enumerate(zip(overlay, replies, strict=True)):
            answered = Answered(
                question=pair.question,
                reply=retries.get(index, reply),
                is_retry=index in retries,
                mask_rule=predictor.config.mask,
            )
            yield task.record(pair.item, answered)


def _retry(
    predictor: Predictor,
    task: Task[Any, Any],
    image: Image.Image,
    overlay: Sequence[Asked[Any]],
    replies: Sequence[Reply],
) -> dict[int, Reply]:
    """Return, for each answer without a mask that is to be forced, its text with the masks of the forced answer."""
    if not task.retries_without_mask or predictor.config.answer != "generated":
        return {}
    again = [index for index, reply in enumerate(replies) if len(reply.masks_NHW) == 0]
    if not again:
        return {}
    (forced,) = _ask(predictor.changed(answer="forced"), image, [[overlay[index] for index in again]])
    return {
        index: replace(replies[index], masks_NHW=reply.masks_NHW, scores=reply.scores)
        for index, reply in zip(again, forced, strict=True)
    }


def _ask(predictor: Predictor, image: Image.Image, overlays: Sequence[Sequence[Asked[Any]]]) -> list[list[Reply]]:
    """Return the replies to every overlay's questions."""
    asked = [(overlay[0].question.prompts(), [pair.question.text for pair in overlay]) for overlay in overlays]
    if len(asked) == 1:
        return [predictor.ask(image, asked[0][1], asked[0][0])]
    return predictor.ask_overlays(image, asked)


def _by_overlay(group: Sequence[Asked[Item]]) -> list[list[Asked[Item]]]:
    """Return the items of one image grouped by what is painted on it, in the order they come."""
    overlays: dict[tuple[Any, ...], list[Asked[Item]]] = {}
    for pair in group:
        overlays.setdefault(pair.question.overlay_key(), []).append(pair)
    return list(overlays.values())


def _open_image(questions: Sequence[Question]) -> Image.Image:
    """Open the photo that all questions of a group must be about."""
    first = questions[0]
    other = next((question for question in questions if question.photo != first.photo), None)
    if other is not None:
        raise DataError(
            f"image {first.image_id}: found {first.photo} for item {first.key} and {other.photo} for item {other.key}, "
            "expected one photo of one size; repair the annotations"
        )
    return first.photo.open(f"image {first.image_id}")


def _pair(task: Task[Item, Any], prompt: str) -> list[Asked[Item]]:
    """Return all items with their questions. Raises: DataError when two items have one name."""
    asked = [Asked(item=item, question=task.question(item, prompt)) for item in task.items]
    seen: set[Any] = set()
    for pair in asked:
        if pair.question.key in seen:
            raise DataError(
                f"{task.kind}: found item {pair.question.key} twice, expected every item once; repair the annotations"
            )
        seen.add(pair.question.key)
    return asked


def _check_prompt_ids(predictor: Predictor, asked: Sequence[Asked[Any]]) -> None:
    """Find out before hours of work whether the model has a token for every region. Raises: DataError."""
    number = predictor.processor.settings.num_visual_prompts
    for pair in asked:
        highest = max(pair.question.prompt_ids, default=-1)
        if highest >= number:
            raise DataError(
                f"item {pair.question.key}: found <Prompt{highest}>, expected prompts below {number}, the number that "
                "this checkpoint has tokens for; use one with more, or leave the item out of the file"
            )


def protocol_of(
    predictor: Predictor, task: Task[Any, Any], *, checkpoint: str, weights_sha256: str, precision: str, eval_node: Any
) -> dict[str, Any]:
    """Return everything that a prediction file depends on."""
    limit = predictor.config.max_new_tokens
    tokens = task.max_new_tokens if limit is None else limit
    return {
        "checkpoint": checkpoint,
        "weights_sha256": weights_sha256,
        "precision": precision,
        "predict": vars(predictor.config) | {"batch_size": None, "max_new_tokens": tokens},
        "eval": eval_node,
        "task": task.kind,
        "retries_without_mask": task.retries_without_mask,
        "questions_sha256": _digest(task.questions(predictor.config.prompt)),
    }


def _digest(questions: Sequence[Question]) -> str:
    """Return a hash of all that is asked, so that predictions for other annotations are not taken for these."""
    digest = hashlib.sha256()
    for question in questions:
        photo = [question.photo.path.name, question.photo.size_hw, question.photo.is_upright]
        asked = [question.key, question.image_id, photo, question.text, question.prompt_ids, question.regions]
        digest.update(json.dumps(asked, sort_keys=True).encode())
    return digest.hexdigest()


def _claim(output: Path, protocol: dict[str, Any]) -> None:
    """Create the folder, or check that what it holds was made with the same protocol."""
    file = output / "protocol.json"
    text = json.dumps(protocol, indent=1, sort_keys=True) + "\n"
    if dist.rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.read_text() != text:
            raise ConfigError(
                f"{file}: found predictions of another protocol (checkpoint, settings, eval or data changed); "
                "expected the same one. Choose another output folder, or remove this one"
            )
        file.write_text(text)
    dist.barrier()


def _read_parts(output: Path, task: Task[Any, Record]) -> list[Record]:
    """Return the records of all ranks so far."""
    return [record for part in sorted(output.glob("part-*.jsonl")) for record in read_records(part, task.format)]


def _complete(output: Path, task: Task[Any, Record], keys: Sequence[Any]) -> list[Record]:
    """Return one record per key, in order; RuntimeError when one is missing, double or of another benchmark."""
    merged = _read_parts(output, task)
    answered = {task.format.key(record): record for record in merged}
    unanswered = [key for key in keys if key not in answered]
    if unanswered or len(merged) != len(keys):
        raise RuntimeError(
            f"{output}: {len(merged)} predictions for {len(keys)} items, {len(unanswered)} unanswered; "
            "remove the folder and run again"
        )
    return [answered[key] for key in keys]


def _progress(groups: Iterable[list[Asked[Item]]], name: str, shown: bool) -> Iterator[list[Asked[Item]]]:
    """Yield the groups, with a progress bar on rank 0."""
    return iter(tqdm(groups, desc=name, unit="image", disable=not shown or dist.rank() != 0))


def _write_merged(path: Path, record_format: RecordFormat[Record, Any], records: Sequence[Record]) -> None:
    """Write all records into one file, complete or not at all."""
    working = path.with_name(f".{path.name}")
    working.unlink(missing_ok=True)
    with RecordWriter(working, record_format) as writer:
        for record in records:
            writer.write(record)
    os.replace(working, path)

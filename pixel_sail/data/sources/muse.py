"""MUSE: several questions per image, each answered with the masks of several objects.

A record of `MUSE_train.json` becomes a `Sample` with all questions of an image as turns. One record:

    {"file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640, "ann_list": [{"category_id": 51}],
     "questions": ["What could I drink tea from?"], "text_answers": ["The mug {seg} next to the pot."],
     "answers": [[{"segmentation": [[30.5, 12.0, ...]], "category_name": "mug", "rephrased_name": "white mug"}]]}

Images of 2017 have `coco_url` instead of `file_name`. If `text_answers` is missing or null, the answer comes from a
template; an object's `rephrased_name` is used in nine of ten cases, as released.

Errors of the released loader that do not occur here: polygons were summed, not united; masks and conversations of every
visited item stayed in memory; an item whose text has another number of {seg} than objects, or that is unusable, was
replaced by a random one. Here the first is a DataError, the second is skipped and counted.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.fields import ImageFolders, field, folders, stated_hw, strings
from pixel_sail.data.images import find_image
from pixel_sail.data.masks import ShowsPixels, decode_segmentation
from pixel_sail.data.records import Records, open_records
from pixel_sail.data.templates.muse import muse_answer, muse_question
from pixel_sail.types import DataError, Sample, SizeHW, Source, Turn

logger = logging.getLogger(__name__)

REPHRASED_FRACTION = 0.9
"""Probability of the rephrased name for an object that has one (released)."""

SLOT = "{seg}"


def load(*, annotations: str | Path, image_dir: ImageFolders, name: str = "muse") -> Source:
    """Return the training source: the `_target_` of `configs/source/muse.yaml`.

    annotations: the JSON file. image_dir: the folders of the COCO images of train2014, train2017 and val2017; an image
    has the same number in all of them. Raises: DataError.
    """
    return MuseSource(open_records(annotations), image_dir, name=name)


class MuseSource:
    """One item per image that has a question about an object; questions without objects are skipped and counted."""

    def __init__(self, records: Records, image_dir: ImageFolders, *, name: str) -> None:
        self.name = name
        self._records = records
        self._folders = folders(image_dir)
        self._items = self._usable_items()

    def __len__(self) -> int:
        """Return the number of images with a usable question."""
        return len(self._items)

    def image_path(self, index: int) -> Path:
        """Return the image of an item."""
        number = int(self._items[index])
        return find_image(self._folders, _file_name(self._records[number], self._where(number)))

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return all questions about an image in file order; `rng` samples the templates. Raises: DataError."""
        number = int(self._items[index])
        record, where = self._records[number], self._where(number)
        file_name, image_hw = _file_name(record, where), stated_hw(record, where)
        if image_hw is None:
            raise DataError(f"{where}: found no height and width, expected both; repair the record")
        in_pixels = partial(shows_pixels, self._records)
        turns = [
            _turn(question, objects, text, image_hw, f"{where}, question {number_in_item}", rng, in_pixels)
            for number_in_item, (question, objects, text) in enumerate(_questions(record, where))
            if objects
        ]
        if not turns:
            raise DataError(f"{where}: found no question with an object, expected one; remove the record")
        return Sample(
            sample_id=f"{self.name}/item={number}/{file_name}",
            source=self.name,
            image_path=find_image(self._folders, file_name),
            image_hw=image_hw,
            turns=tuple(turns),
        )

    def _where(self, number: int) -> str:
        return f"{self._records.where}[{number}]"

    def _usable_items(self) -> NDArray[np.int64]:
        usable = []
        num_questions = num_without_object = 0
        for number, record in enumerate(self._records):
            try:
                is_empty = isinstance(record, dict) and record.get("ann_list") == []
                questions = [] if is_empty else _questions(record, self._where(number))
            except DataError:
                usable.append(number)  # `get` raises the same error, and its caller counts bad samples.
                continue
            num_questions += len(questions)
            num_without_object += sum(not objects for _, objects, _ in questions)
            if any(objects for _, objects, _ in questions):
                usable.append(number)
        if len(usable) < len(self._records) or num_without_object:
            logger.warning(
                "source %s (%s): skipped %d of %d images without a question about an object, and %d of %d questions",
                self.name, self._records.where, len(self._records) - len(usable), len(self._records),
                num_without_object, num_questions,
            )  # fmt: skip
        return np.array(usable, dtype=np.int64)


def _questions(record: object, where: str) -> list[tuple[str, list[Any], str | None]]:
    """Return (question, objects of the answer, text of the answer or None) of every question of a record."""
    questions, answers = strings(record, "questions", where), field(record, "answers", list, where)
    texts = record.get("text_answers") if isinstance(record, dict) else None
    texts = [None] * len(questions) if texts is None else field(record, "text_answers", list, where)
    if not len(questions) == len(answers) == len(texts):
        counts = f"{len(questions)} questions, {len(answers)} answers and {len(texts)} text_answers"
        raise DataError(f"{where}: found {counts}, expected equally many; repair the record")
    for objects, text in zip(answers, texts, strict=True):
        if not isinstance(objects, list) or not isinstance(text, str | None):
            raise DataError(
                f"{where}: found an answer of type {type(objects).__name__} with a text of type {type(text).__name__}, "
                "expected a list of objects and a string or null; repair the record"
            )
    return list(zip(questions, answers, texts, strict=True))


def _turn(
    question: str,
    objects: list[Any],
    text: str | None,
    image_hw: SizeHW,
    where: str,
    rng: np.random.Generator,
    in_pixels: ShowsPixels,
) -> Turn:
    """Return one question with its answer and one mask per object."""
    if text is not None and text.count(SLOT) != len(objects):
        raise DataError(
            f"{where}: found {text.count(SLOT)} slots {SLOT} in the text answer and {len(objects)} objects, expected "
            "one slot for every object; repair the record"
        )
    masks = []
    for item in objects:
        if not isinstance(item, dict) or "segmentation" not in item:
            raise DataError(f"{where}: found an object without segmentation, expected one; repair the record")
        masks.append(decode_segmentation(item["segmentation"], image_hw, where, in_pixels))
    asked = muse_question(question, rng)
    answer = muse_answer([_name(item, where, rng) for item in objects], rng) if text is None else text
    return Turn(question=asked, answer=answer.replace(SLOT, "[SEG]").strip(), masks=tuple(masks))


def _name(item: dict[str, Any], where: str, rng: np.random.Generator) -> str:
    """Return a name for an object, sampled if it has two."""
    is_rephrased = rng.random() < REPHRASED_FRACTION and item.get("rephrased_name") is not None
    return field(item, "rephrased_name" if is_rephrased else "category_name", str, where).strip()


def _file_name(record: object, where: str) -> str:
    """Return the image file name, from the field of either year."""
    if isinstance(record, dict) and "file_name" not in record and "coco_url" in record:
        return field(record, "coco_url", str, where).rsplit("/", maxsplit=1)[-1]
    return field(record, "file_name", str, where)

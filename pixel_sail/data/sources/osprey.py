"""Osprey-724K: questions and answers about marked regions, and descriptions of regions.

Builds `Sample`s with visual prompts from Osprey's JSON files through `data/regions.py`. The five files have records
like this one (`description` in one of them only), in which regions are named `<region1>`, `<region2>`, ...:

    {"file_name": "000000222016.jpg", "height": 640, "width": 480, "annotation": [{"segmentation": [[...]]}, ...],
     "conversations": [{"from": "human", "value": "What is <region1>?"}, {"from": "gpt", "value": "A red bus."}],
     "description": ["<region1>: A red bus that ...", ...]}

    -> Turn(question="What is <Prompt11>?", answer="A red bus."), prompts=(VisualPrompt(prompt_id=11, mask=...),)

Differences from the released loader:
- It replaced region names piece by piece, so `<region10>` became `<<Prompt3>0>`. Here a name is replaced as a whole.
- It replaced an item with more regions than prompt tokens by a random one. Here as many of its turns are used as there
  are tokens for all their regions, resampled every time, in file order.
- An item without regions ended the run. Here it is skipped at construction and counted.
- It removed everything up to the last colon of a description. Here only the label `<region1>:` is removed.
- It ordered the painting of prompts by their masks and not by the boxes or points made of them, which could hide one:
  see `PixelSailProcessor.paint_prompts`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.conversations import conversation_turns, may_have_turns
from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.images import MAX_SIDE_PX, find_image
from pixel_sail.data.masks import ShowsPixels, decode_segmentation
from pixel_sail.data.prompts import MASK_ONLY
from pixel_sail.data.records import Records, open_records
from pixel_sail.data.region_names import name_regions, named_regions, renumber, split_label
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.templates.region import (
    REGION_ANSWER,
    SINGLE_WORD_SUFFIX,
    describe_question,
    detailed_question,
    name_question,
)
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, Sample, SizeHW, Source

logger = logging.getLogger(__name__)

CONTENTS = ("conversations", "description")
"""Field of the records to use."""


def load(
    *,
    annotations: str | Path,
    image_dirs: Sequence[str | Path],
    name: str,
    content: str = "conversations",
    single_word_answers: bool = False,
    regions_per_sample: int = 5,
    prompt_fractions: Mapping[str, float] = MASK_ONLY,
    num_prompts: int = 15,
    absent_fraction: float = 0.05,
    absent_questions: str = OURS,
) -> Source:
    """Return one of Osprey's files as a training source.

    annotations: the JSON file. image_dirs: image folders, searched in this order. content: one of CONTENTS.
    single_word_answers: every question of a conversation requests one word. regions_per_sample: maximum described
    regions per sample; conversations show all regions. prompt_fractions, num_prompts, absent_fraction: see
    `RegionSettings`. absent_questions: with `ours`, conversations use the same questions for absent regions as for
    others; with `released`, a request for a long description in every file. Raises: DataError, ValueError.
    """
    if content not in CONTENTS:
        raise DataError(f"source {name}: found content {content!r}, expected one of {CONTENTS}; correct the config")
    settings = RegionSettings(
        num_prompts=num_prompts, fractions=dict(prompt_fractions), absent_fraction=absent_fraction
    )
    settings.check_count(name, regions_per_sample)
    return OspreySource(
        open_records(annotations),
        [Path(folder) for folder in image_dirs],
        settings,
        name=name,
        content=content,
        single_word_answers=single_word_answers,
        regions_per_sample=regions_per_sample,
        absent_questions=absent_questions,
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Turns of one sample; their placeholders and regions are region numbers of the record."""

    turns: list[RegionTurn]
    shown: list[int]


class OspreySource:
    """One item per record that has a region and text about it."""

    def __init__(
        self,
        records: Records,
        image_dirs: Sequence[Path],
        settings: RegionSettings,
        *,
        name: str,
        content: str,
        single_word_answers: bool = False,
        regions_per_sample: int = 5,
        absent_questions: str = OURS,
    ) -> None:
        """Find the usable records. Raises: DataError, also without an image folder."""
        if not image_dirs:
            raise DataError(f"source {name}: found no image_dirs, expected at least one folder; correct the config")
        self.name = name
        self._records = records
        self._image_dirs = tuple(image_dirs)
        self._settings = settings
        self._content = content
        self._question_suffix = SINGLE_WORD_SUFFIX if single_word_answers else ""
        if is_released(name, "absent_questions", absent_questions) or content == "description":
            self._absent_question = detailed_question
        else:
            self._absent_question = name_question if single_word_answers else describe_question
        self._regions_per_sample = regions_per_sample
        self._numbers = self._usable()

    def __len__(self) -> int:
        """Return the number of usable records."""
        return len(self._numbers)

    def image_path(self, index: int) -> Path:
        """Return the image path of an item: where it exists, or the first candidate. Raises: DataError."""
        number = int(self._numbers[index])
        record = _checked_record(self._records[number], f"{self._records.where}[{number}]")
        return find_image(self._image_dirs, record["file_name"])

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return item `index` with turns and regions sampled from `rng`. Raises: DataError with file, record and
        region."""
        number = int(self._numbers[index])
        where = f"{self._records.where}[{number}]"
        record = _checked_record(self._records[number], where)
        size_hw = record["height"], record["width"]
        regions = record["annotation"]
        in_pixels = partial(shows_pixels, self._records)
        if self._content == "conversations":
            asked = self._conversation(record, len(regions), rng, where)
        else:
            asked = self._descriptions(record, len(regions), rng, where)
        return region_sample(
            _renumbered(asked),
            [_mask(regions[region], size_hw, f"{where}, region {region + 1}", in_pixels) for region in asked.shown],
            rng,
            self._settings,
            sample_id=f"{self.name}/record={number}",
            source=self.name,
            image_path=find_image(self._image_dirs, record["file_name"]),
            image_hw=size_hw,
            absent_question=self._absent_question,
        )

    def _conversation(self, record: dict[str, Any], num_regions: int, rng: np.random.Generator, where: str) -> _Asked:
        """Return the conversation with all regions shown, or as much of it as there are prompt tokens for."""
        pairs = conversation_turns(record.get("conversations"), where)
        turns = [
            RegionTurn(
                question=name_regions(question, num_regions, where) + self._question_suffix,
                answer=name_regions(answer, num_regions, where),
            )
            for question, answer in pairs
        ]
        if num_regions <= self._settings.num_prompts:
            return _Asked(turns=turns, shown=list(range(num_regions)))
        needed = [named_regions(turn.question, turn.answer) for turn in turns]
        chosen, marked = self._fitting(needed, rng.permutation(len(turns)).tolist(), len(turns), where)
        return _Asked(turns=[turns[i] for i in sorted(chosen)], shown=marked)

    def _descriptions(self, record: dict[str, Any], num_regions: int, rng: np.random.Generator, where: str) -> _Asked:
        """Return 1 .. `regions_per_sample` described regions; regions mentioned in their descriptions are shown as
        well."""
        texts = record.get("description")
        if not isinstance(texts, list) or len(texts) != num_regions:
            found = f"{len(texts)} descriptions" if isinstance(texts, list) else f"description = {shown(texts)}"
            raise DataError(f"{where}: found {found}, expected one for each of {num_regions} regions; repair the file")
        described = {}
        for region, text in enumerate(texts):
            if text_of_region := _description(text, region, num_regions, f"{where}, description {region + 1}"):
                described[region] = text_of_region
        order = [list(described)[i] for i in rng.permutation(len(described))]
        count = int(rng.integers(1, self._regions_per_sample + 1))
        needed = [{region} | named_regions(described[region]) for region in order]
        chosen, marked = self._fitting(needed, list(range(len(order))), count, where)
        turns = [
            RegionTurn(question=detailed_question(rng), answer=REGION_ANSWER + described[order[i]], region=order[i])
            for i in chosen
        ]
        return _Asked(turns=turns, shown=marked)

    def _fitting(self, needed: list[set[int]], order: list[int], count: int, where: str) -> tuple[list[int], list[int]]:
        """Go through `order` and take up to `count` entries as long as their regions fit into the prompt tokens.

        Returns the entries and the regions.
        """
        chosen: list[int] = []
        marked: set[int] = set()
        for i in order:
            if len(chosen) < count and len(marked | needed[i]) <= self._settings.num_prompts:
                chosen.append(i)
                marked |= needed[i]
        if not chosen:
            raise DataError(
                f"{where}: found no turn about at most {self._settings.num_prompts} regions, expected one, as there "
                "are no more prompt tokens; raise num_prompts and model.num_visual_prompts or remove the record"
            )
        return chosen, sorted(marked)

    def _usable(self) -> NDArray[np.int32]:
        """Return the numbers of the records with regions and text; log how many lack them or have many regions."""
        numbers, num_large = [], 0
        for number, record in enumerate(self._records):
            regions = record.get("annotation") if isinstance(record, dict) else "malformed"
            if regions is None or regions == [] or not self._has_text(record):
                continue
            numbers.append(number)
            num_large += isinstance(regions, list) and len(regions) > self._settings.num_prompts
        num_left_out = len(self._records) - len(numbers)
        if num_left_out:
            logger.warning(
                "source %s: skipped %d of %d records, they have no region or no text about it",
                *(self.name, num_left_out, len(self._records)),
            )
        if num_large:
            logger.warning(
                "source %s: %d records have more than %d regions; only turns with a prompt token for each are used",
                *(self.name, num_large, self._settings.num_prompts),
            )
        return np.array(numbers, dtype=np.int32)

    def _has_text(self, record: Any) -> bool:
        """Return whether a record has text or is malformed, in which case `get` raises the error."""
        if not isinstance(record, dict):
            return True
        if self._content == "conversations":
            return may_have_turns(record.get("conversations"))
        texts = record.get("description")
        return not isinstance(texts, list) or any(not isinstance(text, str) or split_label(text)[1] for text in texts)


def _checked_record(record: Any, where: str) -> dict[str, Any]:
    """Return a record with a valid file name, size and list of regions."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected an object; repair the file")
    for key, kind in (("file_name", str), ("height", int), ("width", int), ("annotation", list)):
        value = record.get(key)
        if type(value) is not kind or not value:
            raise DataError(
                f"{where}: found {key} = {shown(value)}, expected a {kind.__name__} of content; repair the file"
            )
        if isinstance(value, int) and not 1 <= value <= MAX_SIDE_PX:
            raise DataError(
                f"{where}: found {key} = {shown(value)}, expected 1 .. {MAX_SIDE_PX} pixels; repair the file"
            )
    return record


def _mask(region: Any, size_hw: SizeHW, where: str, in_pixels: ShowsPixels) -> BoolMask:
    segmentation = region.get("segmentation") if isinstance(region, dict) else None
    mask = decode_segmentation(segmentation, size_hw, where, in_pixels)
    if not mask.any():
        raise DataError(f"{where}: found a segmentation without pixels, expected at least one; repair the file")
    return mask


def _description(text: Any, region: int, num_regions: int, where: str) -> str:
    """Return the description of a region without its label, with placeholders for other regions."""
    if not isinstance(text, str):
        raise DataError(f"{where}: found {shown(text)}, expected text; repair the file")
    label, rest = split_label(text)
    if label not in (None, region):
        raise DataError(
            f"{where}: found the label of region {label + 1}, expected region {region + 1}; repair the file"
        )
    return name_regions(rest, num_regions, where)


def _renumbered(asked: _Asked) -> list[RegionTurn]:
    """Return the turns with regions renumbered among the shown ones."""
    numbers = {region: index for index, region in enumerate(asked.shown)}
    return [
        RegionTurn(
            question=renumber(turn.question, numbers),
            answer=renumber(turn.answer, numbers),
            region=None if turn.region is None else numbers[turn.region],
        )
        for turn in asked.turns
    ]

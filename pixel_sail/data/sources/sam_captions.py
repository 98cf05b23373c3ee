"""Detailed captions of objects in SA-1B images: the training set of PerBench's captions.

Object_caption_data_train_split.json becomes `Sample`s with visual prompts through `data/regions.py`:

    [{"image_name": "sa_1.jpg", "object_annotations": [{"segmentation": {"size": [1365, 2048], "counts": "..."},
      "caption": "The object highlighted by a yellow edge is a red mug on a desk."}, ...]}, ...]

    -> Turn(question="Describe <Prompt4> as precisely as you can. Please provide as detailed as possible.",
            answer="<Prompt4>: The object is a red mug on a desk."), and so on for up to five objects

Differences from the released loader:
- It grouped objects by five at construction, so the same ones always occurred together. Here an image has the same
  number of items, but each samples its objects from all of the image's.
- It removed mentions of the yellow outline word by word, which left broken sentences: see `templates/marker.py`.
- It cached decoded masks forever, which filled the memory of every worker. Here nothing is cached.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.images import image_file
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.prompts import MASK_ONLY
from pixel_sail.data.records import Records, open_records
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.sources.perbench import stated_rle
from pixel_sail.data.templates.marker import remove_marker
from pixel_sail.data.templates.region import DETAILED_SUFFIX, REGION_ANSWER, detailed_question
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, Sample, Source

logger = logging.getLogger(__name__)


def load(
    *,
    annotations: str | Path,
    image_dir: str | Path,
    name: str = "sam_captions",
    regions_per_sample: int = 5,
    prompt_fractions: Mapping[str, float] = MASK_ONLY,
    num_prompts: int = 15,
    absent_fraction: float = 0.05,
) -> Source:
    """Return the file as a training source.

    annotations: the JSON file. image_dir: image folder. regions_per_sample: maximum objects per sample.
    prompt_fractions, num_prompts, absent_fraction: see `RegionSettings`. Raises: DataError, ValueError.
    """
    settings = RegionSettings(
        num_prompts=num_prompts, fractions=dict(prompt_fractions), absent_fraction=absent_fraction
    )
    settings.check_count(name, regions_per_sample)
    records = open_records(annotations)
    return SamCaptionSource(records, Path(image_dir), settings, name=name, regions_per_sample=regions_per_sample)


class SamCaptionSource:
    """ceil(n / regions_per_sample) items per image with n captions, each with nearly the same number of objects."""

    def __init__(
        self,
        records: Records,
        image_dir: Path,
        settings: RegionSettings,
        *,
        name: str,
        regions_per_sample: int = 5,
    ) -> None:
        """Count the captions of every image; those without text are skipped and counted."""
        self.name = name
        self._records = records
        self._image_dir = image_dir
        self._settings = settings
        self._regions_per_sample = regions_per_sample
        self._numbers = self._items()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._numbers)

    def image_path(self, index: int) -> Path:
        """Return the image of an item. Raises: DataError."""
        number = int(self._numbers[index])
        return image_file(self._image_dir, _image_name(self._records[number], f"{self._records.where}[{number}]"))

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return objects sampled from all of an item's image. Raises: DataError with file, record and object."""
        number = int(self._numbers[index])
        where = f"{self._records.where}[{number}]"
        record = self._records[number]
        image_name = _image_name(record, where)
        captions = _captions(record, where)
        num_items = -(-len(captions) // self._regions_per_sample)
        order = rng.permutation(len(captions))[: -(-len(captions) // num_items)]
        sampled = [list(captions.items())[i] for i in order]
        masks = [_mask(record["object_annotations"][place], f"{where}, object {place}") for place, _ in sampled]
        turns = [
            RegionTurn(question=detailed_question(rng) + DETAILED_SUFFIX, answer=REGION_ANSWER + text, region=region)
            for region, (_, text) in enumerate(sampled)
        ]
        sizes = sorted({mask.shape for mask in masks})
        if len(sizes) > 1:
            raise DataError(f"{where}: found masks of sizes {sizes}, expected one size; repair the file")
        return region_sample(
            turns,
            masks,
            rng,
            self._settings,
            sample_id=f"{self.name}/record={number}/item={index}",
            source=self.name,
            image_path=image_file(self._image_dir, image_name),
            image_hw=(masks[0].shape[0], masks[0].shape[1]),
            absent_question=lambda rng: detailed_question(rng) + DETAILED_SUFFIX,
        )

    def _items(self) -> NDArray[np.int32]:
        """Return the record number of every item."""
        numbers = []
        num_objects = num_without = num_empty = 0
        for number, record in enumerate(self._records):
            objects = record.get("object_annotations") if isinstance(record, dict) else None
            if not isinstance(objects, list) or any(_text_of(item) is None for item in objects):
                numbers.append(number)  # Malformed; `get` raises the error.
                continue
            num_usable = sum(1 for item in objects if remove_marker(item["caption"]))
            num_objects += len(objects)
            num_without += len(objects) - num_usable
            num_empty += num_usable == 0
            numbers += [number] * -(-num_usable // self._regions_per_sample)
        if num_without or num_empty:
            logger.warning(
                "source %s: skipped %d of %d captions, they are empty or only describe the marker that their writer "
                "saw; %d of %d images have no caption",
                *(self.name, num_without, num_objects, num_empty, len(self._records)),
            )
        return np.array(numbers, dtype=np.int32)


def _captions(record: Any, where: str) -> dict[int, str]:
    """Return the non-empty captions, without the marker, by the index of their objects in the record."""
    objects = record.get("object_annotations")
    if not isinstance(objects, list):
        raise DataError(f"{where}: found object_annotations = {shown(objects)}, expected a list; repair the file")
    found = {}
    for place, item in enumerate(objects):
        text = _text_of(item)
        if text is None:
            raise DataError(f"{where}, object {place}: found no caption, expected text; repair the file")
        if caption := remove_marker(text):
            found[place] = caption
    return found


def _text_of(item: Any) -> str | None:
    caption = item.get("caption") if isinstance(item, dict) else None
    return caption if isinstance(caption, str) else None


def _image_name(record: Any, where: str) -> str:
    image_name = record.get("image_name") if isinstance(record, dict) else None
    if not isinstance(image_name, str) or not image_name:
        raise DataError(f"{where}: found image_name = {shown(image_name)}, expected a file name; repair the file")
    return image_name


def _mask(item: dict[str, Any], where: str) -> BoolMask:
    mask = decode_rle(stated_rle(item.get("segmentation"), where))
    if not mask.any():
        raise DataError(f"{where}: found a segmentation without pixels, expected at least one; repair the file")
    return mask

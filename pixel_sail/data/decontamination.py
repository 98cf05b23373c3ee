"""Decontamination: removes evaluation images from the training sources.

`training/loop.py` passes every source through `without_images` before mixing. RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO
annotate the same COCO images with different splits, and most other sources use COCO images too, so that a model would
be evaluated on images it was trained on:

    evaluation_image_ids([HeldOut(root="data/ref_seg", dataset="refcocog", splits=["val", "test"])]) -> {581857, ...}
    "coco/train2017/000000581857.jpg" -> COCO image 581857, removed

Images of other collections have other names and are never removed. GQA and Visual Genome reuse COCO images under their
own numbers, which only their own tables map to COCO.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixel_sail.data.refer_annotations import split_image_ids
from pixel_sail.types import DataError, Sample, Source

logger = logging.getLogger(__name__)

_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)


@dataclass(kw_only=True)
class HeldOut:
    """Splits of one REFER dataset whose images are removed from training."""

    root: str
    dataset: Any
    """Folder name, or a list of alternatives, of which the first that exists is read."""
    split_by: str | None = None
    splits: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class DecontaminationConfig:
    """Which images are removed from training."""

    enabled: bool = True
    """False keeps evaluation images in the mixture; the log says so."""
    held_out: list[HeldOut] = field(default_factory=list)
    """Splits to remove. Empty for data that shares no images with a benchmark."""


def evaluation_image_ids(held_out: Sequence[HeldOut]) -> frozenset[int]:
    """Return the COCO ids of all images in these splits. Raises: DataError when a file or split is missing."""
    found: set[int] = set()
    for entry in held_out:
        try:
            found |= split_image_ids(entry.root, entry.dataset, entry.splits, split_by=entry.split_by)
        except DataError as error:
            raise DataError(
                f"decontamination: {error}. The evaluation splits are needed to remove their images from training; get "
                "the file, remove the entry from data.decontamination.held_out, or set "
                "data.decontamination.enabled=false"
            ) from error
    return frozenset(found)


def coco_image_id(path: Path | None) -> int | None:
    """Return the COCO number of an image from its file name, None for an image of another collection."""
    match = None if path is None else _COCO_NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def without_images(source: Source, excluded: frozenset[int]) -> Source:
    """Return the source without the items on these COCO images; their number is logged."""
    if not excluded:
        return source
    kept = [index for index in range(len(source)) if coco_image_id(source.image_path(index)) not in excluded]
    dropped = len(source) - len(kept)
    logger.info(
        "source %s: removed %d of %d items, their images belong to evaluation", source.name, dropped, len(source)
    )
    return source if not dropped else _Part(source, np.array(kept, dtype=np.int64))


class _Part:
    """A subset of the items of a source."""

    def __init__(self, source: Source, kept: np.ndarray) -> None:
        self.name = source.name
        self._source = source
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        return self._source.get(int(self._kept[index]), rng)

    def image_path(self, index: int) -> Path | None:
        return self._source.image_path(int(self._kept[index]))

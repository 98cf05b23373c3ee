"""Training samples from captions whose phrases have masks, in any file format.

`grandf.py`, `refcocog_gcg.py` and `flickr_gcg.py` read their formats into `CaptionRecord`s. This source finds the
phrases (`data/phrases.py`), unites the masks of each, and builds one turn per image:

    CaptionRecord(caption="A dog and two cups", phrases=(MaskedPhrase(text="two cups", segmentations=(rle, rle)), ...))
    -> Turn(question="What is in this image? ...", answer="<p> A dog </p> [SEG] and <p> two cups </p> [SEG]",
            masks=(<dog>, <both cups>))

Errors of the released loaders that do not occur here: overlapping or repeated spans nested tags; capitalized phrases
were searched in a lower-cased caption, not found, and marked at its end; a phrase was found inside a longer word; only
the first span of a phrase counted; masks were summed, not united; an image without phrases was replaced by a random
one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.fields import ImageFolders, folders
from pixel_sail.data.image_sizes import stored_hw
from pixel_sail.data.images import find_image
from pixel_sail.data.masks import ShowsPixels, decode_segmentation, union_masks
from pixel_sail.data.phrases import Phrase, Placement, mark_caption, place_phrases
from pixel_sail.data.remarks import remark
from pixel_sail.data.templates.grounded_caption import caption_question
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, Sample, SizeHW, Turn

logger = logging.getLogger(__name__)

SPAN_OF_OTHER_WORDS = "span of other words"
"""Topic of the remarks about phrases that are not where the file says."""


@dataclass(frozen=True, kw_only=True)
class MaskedPhrase:
    """One phrase of the file."""

    phrase: Phrase
    segmentations: tuple[object, ...]
    """COCO segmentations in any format, at least one; their union is the mask of the phrase."""
    where: str
    """File, record and phrase, for error messages."""


@dataclass(frozen=True, kw_only=True)
class CaptionRecord:
    """One caption of the file."""

    item_id: str
    file_name: str
    """Image file name, as stored."""
    image_hw: SizeHW | None
    """None if the file states no size."""
    caption: str
    phrases: tuple[MaskedPhrase, ...]
    shows_pixels: ShowsPixels
    """Whether the file has coordinates above 1."""
    num_unmasked: int = 0
    """Phrases of the file without a mask, or skipped by the dataset's recipe."""

    def placement(self) -> Placement:
        """Return the spans of the phrases in the caption."""
        return place_phrases(self.caption, [item.phrase for item in self.phrases])


class CaptionLayout(Protocol):
    """One file format."""

    where: str
    """The file, for error messages."""

    def __len__(self) -> int:
        """Return the number of captions in the file."""
        ...

    def read(self, index: int) -> CaptionRecord:
        """Return one caption. Raises: DataError with file and record."""
        ...


class GroundedCaptionSource:
    """One item per caption that has a phrase with a mask; one turn per item.

    The constructor reads the file once, to skip captions without any such phrase and to count unused phrases; both
    numbers are logged. A malformed record is kept, and `get` raises its error.
    """

    def __init__(self, layout: CaptionLayout, image_dir: ImageFolders, *, name: str, templates: str = OURS) -> None:
        """`templates`: `ours` also samples the evaluation's question; `released` does not. Raises: DataError."""
        self.name = name
        self._released_templates = is_released(name, "templates", templates)
        self._layout = layout
        self._folders = folders(image_dir)
        self._items = self._usable_items()

    def __len__(self) -> int:
        """Return the number of captions with a phrase that has a mask."""
        return len(self._items)

    def image_path(self, index: int) -> Path:
        """Return the image of an item."""
        return find_image(self._folders, self._layout.read(int(self._items[index])).file_name)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return the caption of item `index` with all its phrases; only the question is random.

        If the file states no size, the stored image size is used, since COCO counts stored pixels. Raises: DataError.
        """
        record = self._layout.read(int(self._items[index]))
        sample_id = f"{self.name}/{record.item_id}"
        placement = record.placement()
        if not placement.spans:
            raise DataError(f"{sample_id}: found no phrase in the caption, expected one; remove the caption")
        image_path = find_image(self._folders, record.file_name)
        image_hw = record.image_hw if record.image_hw is not None else stored_hw(image_path, sample_id)
        masks = tuple(_united(record, marked.phrases, image_hw) for marked in placement.spans)
        question = caption_question(rng, as_released=self._released_templates)
        answer = mark_caption(record.caption, placement, sample_id)
        return Sample(
            sample_id=sample_id,
            source=self.name,
            image_path=image_path,
            image_hw=image_hw,
            turns=(Turn(question=question, answer=answer, masks=masks),),
        )

    def _usable_items(self) -> NDArray[np.int64]:
        usable = []
        num_phrases = num_unmasked = num_lost = num_overlapped = 0
        for index in range(len(self._layout)):
            try:
                record = self._layout.read(index)
            except DataError:
                usable.append(index)  # `get` raises the same error, and its caller counts bad samples.
                continue
            placement = record.placement()
            num_phrases += len(record.phrases) + record.num_unmasked
            num_unmasked += record.num_unmasked
            num_lost += len(placement.not_found)
            num_overlapped += len(placement.overlapped)
            for i in placement.misplaced:
                _remark_misplaced(record, i, self._layout.where)
            if placement.spans:
                usable.append(index)
        num_left_out = len(self._layout) - len(usable)
        if num_left_out or num_unmasked or num_lost or num_overlapped:
            logger.warning(
                "source %s (%s): skipped %d of %d captions without a phrase to mark; of %d phrases, %d have no mask, "
                "%d are not in their caption and %d overlap a longer one; these stay plain text",
                self.name, self._layout.where, num_left_out, len(self._layout),
                num_phrases, num_unmasked, num_lost, num_overlapped,
            )  # fmt: skip
        return np.array(usable, dtype=np.int64)


def _remark_misplaced(record: CaptionRecord, index: int, file: str) -> None:
    """Remark that a stated span contains other words than its phrase."""
    item = record.phrases[index]
    assert item.phrase.span is not None, "only a stated span can be wrong"
    held = record.caption[slice(*item.phrase.span)]
    message = f"the span {list(item.phrase.span)} holds {shown(held)}, the phrase is {shown(item.phrase.text)}; skipped"
    remark(SPAN_OF_OTHER_WORDS, file, item.where, message)


def _united(record: CaptionRecord, indices: tuple[int, ...], image_hw: SizeHW) -> BoolMask:
    """Return the union of all masks of the phrases at one span."""
    masks = [
        decode_segmentation(segmentation, image_hw, record.phrases[index].where, record.shows_pixels)
        for index in indices
        for segmentation in record.phrases[index].segmentations
    ]
    return union_masks(masks, image_hw)

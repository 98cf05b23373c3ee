"""Flickr30k grounded captions: COCO format with a caption per image, and spans and a SAM mask per annotation.

`grounded_caption.py` builds the samples from `flickr_mergedGT_GCG_train.json`. One image and its annotations:

    {"id": 7, "file_name": "1000092795.jpg", "height": 500, "width": 333, "caption": "Two young guys look up"}
    {"id": 1, "image_id": 7, "bbox": [10, 20, 90, 200], "area": 18000, "tokens_positive": [[0, 14]], "sam_mask": {...}}
    {"id": 2, "image_id": 7, "bbox": [120, 25, 80, 190], "area": 15200, "tokens_positive": [[0, 14]], "sam_mask": {...}}

Annotations of the same span, as the two guys above, become one phrase with both masks; an annotation with several spans
marks each. As in the released recipe, captions of fewer than three words, images with a side under 32 pixels, and
annotations that are marked `ignore`, have no area, or are outside the image are skipped and counted. For differences
from the released loader see `grounded_caption.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from pixel_sail.data.coordinates import check_pixels, shows_pixels
from pixel_sail.data.details import OURS
from pixel_sail.data.fields import ImageFolders, field, stated_hw
from pixel_sail.data.phrases import Phrase, Span
from pixel_sail.data.records import open_records
from pixel_sail.data.sources.grounded_caption import CaptionRecord, GroundedCaptionSource, MaskedPhrase
from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW, Source

MIN_WORDS = 3
MIN_SIDE_PX = 32
"""Both limits as in the released recipe."""


def load(
    *, annotations: str | Path, image_dir: ImageFolders, name: str = "flickr30k_gcg", templates: str = OURS
) -> Source:
    """Return the training source: the `_target_` of `configs/source/flickr30k_gcg.yaml`.

    annotations: the JSON file. image_dir: one image folder, or several to search. templates: see
    `GroundedCaptionSource`. Raises: DataError, ValueError.
    """
    return GroundedCaptionSource(FlickrLayout(annotations), image_dir, name=name, templates=templates)


class FlickrLayout:
    """Images of this format with their annotations."""

    def __init__(self, annotations: str | Path) -> None:
        self._images = open_records(annotations, "images")
        self._annotations = open_records(annotations, "annotations")
        self._annotations_of = self._annotations.lookup("image_id")
        self.where = str(annotations)

    def __len__(self) -> int:
        """Return the number of captions in the file."""
        return len(self._images)

    def read(self, index: int) -> CaptionRecord:
        """Return one caption. Raises: DataError with file and record."""
        where = f"{self._images.where}[{index}]"
        image = self._images[index]
        image_id, file_name = field(image, "id", int, where), field(image, "file_name", str, where)
        caption, image_hw = field(image, "caption", str, where), stated_hw(image, where)
        if image_hw is None:
            raise DataError(f"{where}: found no height and width, expected both; repair the record")
        phrases: list[MaskedPhrase] = []
        num_left_out = 0
        for number in self._annotations_of.all(image_id):
            annotation = self._annotations[number]
            at = f"{self._annotations.where}[{number}] of image {image_id}"
            if _is_left_out(annotation, caption, image_hw, at):
                num_left_out += 1
                continue
            for span in _spans(annotation, at):
                segmentation = field(annotation, "sam_mask", dict, at)
                phrases.append(MaskedPhrase(phrase=Phrase(span=span), segmentations=(segmentation,), where=at))
        return CaptionRecord(
            item_id=f"image={image_id}",
            file_name=file_name,
            image_hw=image_hw,
            caption=caption,
            shows_pixels=partial(shows_pixels, self._annotations),
            phrases=tuple(phrases),
            num_unmasked=num_left_out,
        )


def _is_left_out(annotation: dict[str, Any], caption: str, image_hw: SizeHW, where: str) -> bool:
    """Return whether the recipe skips this annotation."""
    if len(caption.split()) < MIN_WORDS or min(image_hw) < MIN_SIDE_PX or annotation.get("ignore"):
        return True
    box, area = field(annotation, "bbox", list, where), annotation.get("area")
    if len(box) != 4 or not isinstance(area, int | float) or not all(isinstance(side, int | float) for side in box):
        raise DataError(
            f"{where}: found bbox {shown(box)} and area {shown(area)}, expected [x, y, w, h] and a number; repair it"
        )
    if min(box[2:]) > 0 and not all(float(side).is_integer() for side in box):
        check_pixels(box, image_hw, f"{where}: bbox")
    x, y, width, height = box
    shown_width = min(x + width, image_hw[1]) - max(x, 0)
    shown_height = min(y + height, image_hw[0]) - max(y, 0)
    return shown_width <= 0 or shown_height <= 0 or area <= 0 or width < 1 or height < 1


def _spans(annotation: dict[str, Any], where: str) -> list[Span]:
    spans = field(annotation, "tokens_positive", list, where)
    for span in spans:
        if not isinstance(span, list) or len(span) != 2 or not all(type(value) is int for value in span):
            raise DataError(
                f"{where}: found tokens_positive {shown(spans)}, expected [[start, end], ...]; repair the record"
            )
    return [(start, end) for start, end in spans]

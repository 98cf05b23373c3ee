"""GranD-f and OpenPSG grounded captions: one record per image, phrases with spans and lists of RLE masks.

`grounded_caption.py` builds the samples from `GranDf_HA_GCG_train.json` or `OpenPsgGCG_train.json`. One record:

    {"file_name": "sa_10010541.jpg", "height": 1500, "width": 2250, "image_id": "sa_10010541",
     "caption": "A man holds two cups.",
     "groundings": {"A man": {"token_positives": [0, 5], "rle_masks": [{"size": [1500, 2250], "counts": "..."}]},
                    "two cups": {"token_positives": [12, 20], "rle_masks": [{...}, {...}]}, "morning": null}}

A record without a size has that of its masks. For differences from the released loader see `grounded_caption.py`.
"""

from functools import partial
from pathlib import Path

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.details import OURS
from pixel_sail.data.fields import ImageFolders, field, stated_hw
from pixel_sail.data.phrases import Phrase, Span
from pixel_sail.data.records import open_records
from pixel_sail.data.sources.grounded_caption import CaptionRecord, GroundedCaptionSource, MaskedPhrase
from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW, Source


def load(*, annotations: str | Path, image_dir: ImageFolders, name: str = "grandf", templates: str = OURS) -> Source:
    """Return the training source: the `_target_` of `configs/source/grandf.yaml` and `openpsg_gcg.yaml`.

    annotations: the JSON file. image_dir: one image folder, or several to search. templates: see
    `GroundedCaptionSource`. Raises: DataError, ValueError.
    """
    return GroundedCaptionSource(GrandfLayout(annotations), image_dir, name=name, templates=templates)


class GrandfLayout:
    """Records of this format."""

    def __init__(self, annotations: str | Path) -> None:
        self._records = open_records(annotations)
        self.where = str(annotations)

    def __len__(self) -> int:
        """Return the number of captions in the file."""
        return len(self._records)

    def read(self, index: int) -> CaptionRecord:
        """Return one caption. Raises: DataError with file and record."""
        where = f"{self.where}[{index}]"
        record = self._records[index]
        file_name, caption = field(record, "file_name", str, where), field(record, "caption", str, where)
        groundings = {} if record.get("groundings") is None else field(record, "groundings", dict, where)
        phrases = [
            MaskedPhrase(
                phrase=Phrase(text=text, span=_span(item, f"{where}, {shown(text)}")),
                segmentations=tuple(field(item, "rle_masks", list, f"{where}, {shown(text)}")),
                where=f"{where}, {shown(text)}",
            )
            for text, item in groundings.items()
            if item is not None and item != {}
        ]
        masked = tuple(phrase for phrase in phrases if phrase.segmentations)
        return CaptionRecord(
            item_id=f"item={index}/{file_name}",
            file_name=file_name,
            image_hw=stated_hw(record, where) or _size_of_masks(masked),
            caption=caption,
            shows_pixels=partial(shows_pixels, self._records),
            phrases=masked,
            num_unmasked=len(groundings) - len(masked),
        )


def _span(grounding: object, where: str) -> Span | None:
    """Return the stated span of a phrase, None without one."""
    if isinstance(grounding, dict) and grounding.get("token_positives") is None:
        return None
    span = field(grounding, "token_positives", list, where)
    if len(span) != 2 or not all(type(value) is int for value in span):
        raise DataError(f"{where}: found token_positives {shown(span)}, expected [start, end]; repair the record")
    return span[0], span[1]


def _size_of_masks(phrases: tuple[MaskedPhrase, ...]) -> SizeHW | None:
    """Return the size stated by the first mask; the others are compared when they are decoded."""
    first = phrases[0].segmentations[0] if phrases else None
    size = first.get("size") if isinstance(first, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        return size[0], size[1]
    return None

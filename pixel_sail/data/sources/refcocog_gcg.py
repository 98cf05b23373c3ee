"""RefCOCOg grounded captions: a caption per image composed of referring expressions, each with its polygons.

`grounded_caption.py` builds the samples from `RefCOCOg_GCG_train.json`. One record is an object with one key:

    {"519404": {"img_file_name": "COCO_train2014_000000519404.jpg",
                "caption": "The standing man wears a striped tie next to a boy.",
                "refs": [{"sentence": "a striped tie", "bbox": [16, 45, 28, 41], "segmentation": [[16.2, 84.9, ...]]}]}}

The file states no size, so the image is opened for it. The caption keeps its capitals, unless `letters=released`. For
differences from the released loader see `grounded_caption.py`; it also truncated a phrase that another one overlapped.
"""

from functools import partial
from pathlib import Path

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.fields import ImageFolders, field, stated_hw
from pixel_sail.data.phrases import Phrase
from pixel_sail.data.records import open_records
from pixel_sail.data.sources.grounded_caption import CaptionRecord, GroundedCaptionSource, MaskedPhrase
from pixel_sail.texts import shown
from pixel_sail.types import DataError, Source


def load(
    *,
    annotations: str | Path,
    image_dir: ImageFolders,
    name: str = "refcocog_gcg",
    templates: str = OURS,
    letters: str = OURS,
) -> Source:
    """Return the training source: the `_target_` of `configs/source/refcocog_gcg.yaml`.

    annotations: the JSON file. image_dir: one image folder, or several to search. templates: see
    `GroundedCaptionSource`. letters: `ours` keeps captions as stored; `released` lower-cases them. Raises: DataError,
    ValueError.
    """
    layout = RefcocogLayout(annotations, lower_case=is_released(name, "letters", letters))
    return GroundedCaptionSource(layout, image_dir, name=name, templates=templates)


class RefcocogLayout:
    """Records of this format."""

    def __init__(self, annotations: str | Path, *, lower_case: bool = False) -> None:
        self._records = open_records(annotations)
        self._lower_case = lower_case
        self.where = str(annotations)

    def __len__(self) -> int:
        """Return the number of captions in the file."""
        return len(self._records)

    def read(self, index: int) -> CaptionRecord:
        """Return one caption. Raises: DataError with file and record."""
        where = f"{self.where}[{index}]"
        outer = self._records[index]
        if not isinstance(outer, dict) or len(outer) != 1:
            raise DataError(f"{where}: found {type(outer).__name__}, expected an object of one key; repair the record")
        ((key, record),) = outer.items()
        where = f"{where} ({shown(key)[1:-1]})"
        file_name, caption = field(record, "img_file_name", str, where), field(record, "caption", str, where)
        refs = field(record, "refs", list, where)
        phrases = []
        for ref in refs:
            sentence = field(ref, "sentence", str, where)
            if ref.get("segmentation"):
                at = f"{where}, {shown(sentence)}"
                segmentations = (ref["segmentation"],)
                phrases.append(MaskedPhrase(phrase=Phrase(text=sentence), segmentations=segmentations, where=at))
        return CaptionRecord(
            item_id=f"item={index}/{key}",
            file_name=file_name,
            image_hw=stated_hw(record, where),
            caption=caption.lower() if self._lower_case else caption,
            shows_pixels=partial(shows_pixels, self._records),
            phrases=tuple(phrases),
            num_unmasked=len(refs) - len(phrases),
        )

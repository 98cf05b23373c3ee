"""RefCOCOg region captions, for evaluation: one marked object, one expression to compare a description with.

Reads Finetune_refcocog_val_with_mask.json into `RegionCaption`s. The file is in COCO format, but its "images" are
expressions, so one image occurs several times:

    {"images": [{"id": 0, "file_name": "COCO_train2014_000000380440.jpg", "height": 640, "width": 424,
                 "caption": "the man in yellow coat"}, ...],
     "annotations": [{"id": 0, "image_id": 0, "segmentation": [[...]]}, ...]}

    -> RegionCaption(item_id="0", image_path=.../COCO_train2014_000000380440.jpg, region={"size": [640, 424], ...},
                     references=("the man in yellow coat",), ...)

The released loader uses the annotation whose own id equals the image id; here it is the one whose image_id does.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.images import MAX_SIDE_PX, find_image
from pixel_sail.data.masks import merge_to_rle
from pixel_sail.data.records import open_records
from pixel_sail.texts import shown
from pixel_sail.types import DataError, RegionCaption


def load_region_captions(
    annotations: str | Path, *, image_dir: str | Path, captions: str | Path | None = None
) -> list[RegionCaption]:
    """Return every item in file order.

    captions: file in COCO's caption format ({"annotations": [{"image_id": ..., "caption": ...}]}, ids as numbers or
    text) whose captions are the references; by default, the caption of each "image". Raises: DataError.
    """
    images = open_records(annotations, "images")
    regions = open_records(annotations, "annotations")
    region_of_image = regions.lookup("image_id")
    references = None if captions is None else _read_captions(captions)
    in_pixels = partial(shows_pixels, regions)
    result = []
    for number, image_id in enumerate(images.integers("id").tolist()):
        image = images[number]
        where = f"{images.where}[{number}], id {image_id}"
        size_hw = _positive(image, "height", where), _positive(image, "width", where)
        place = region_of_image.one(image_id)
        result.append(
            RegionCaption(
                item_id=str(image_id),
                image_path=find_image([Path(image_dir)], _text(image, "file_name", where)),
                image_hw=size_hw,
                region=merge_to_rle(
                    [regions[place].get("segmentation")], size_hw, f"{regions.where}[{place}]", in_pixels
                ),
                references=_references(image, image_id, references, captions, where),
            )
        )
    return result


def _references(
    image: dict[str, Any],
    image_id: int,
    references: Mapping[int, tuple[str, ...]] | None,
    captions: str | Path | None,
    where: str,
) -> tuple[str, ...]:
    if references is None:
        return (_text(image, "caption", where),)
    if image_id not in references:
        raise DataError(
            f"{where}: found no caption with image_id {image_id} in {captions}, expected one; check the pair"
        )
    return references[image_id]


def _read_captions(path: str | Path) -> dict[int, tuple[str, ...]]:
    """Return the captions of every image in file order."""
    records = open_records(path, "annotations")
    found: dict[int, list[str]] = defaultdict(list)
    for number, record in enumerate(records):
        where = f"{records.where}[{number}]"
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if type(image_id) not in (int, str) or not str(image_id).isdecimal():
            raise DataError(f"{where}: found image_id = {shown(image_id)}, expected a number; repair the file")
        found[int(str(image_id))].append(_text(record, "caption", where))
    return {image_id: tuple(texts) for image_id, texts in found.items()}


def _text(record: Any, key: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: found {key} = {shown(value)}, expected text; repair the file")
    return value


def _positive(record: Any, key: str, where: str) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not int or not 1 <= value <= MAX_SIDE_PX:
        raise DataError(f"{where}: found {key} = {shown(value)}, expected 1 .. {MAX_SIDE_PX} pixels; repair the file")
    return value

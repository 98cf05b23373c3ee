"""Writes RefShapes as COCO panoptic segmentation and as Pix2Cap-COCO: objects are things, the background is stuff.

`formats.py` calls `write_panoptic` with its records, one per image. It writes, below the dataset:

    panoptic/annotations/panoptic_train.json                    images, annotations, categories
    panoptic/annotations/panoptic_train/COCO_train2014_000000000001.png   colors are segment ids
    pix2cap/pix2cap_coco_train.json                             the same with a description per segment

One segment, for example; its pixels are (193, 225, 1), since 193 + 256 * 225 + 256**2 * 1 = 123329:

    {"id": 123329, "category_id": 4, "iscrowd": 0, "bbox": [17, 70, 47, 41], "area": 1012,
     "description": "A large plain red star in the bottom left of the image, nearest to a small blue ring."}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from pixel_sail.rle import bounding_box
from pixel_sail.types import BoolMask, DataError, Json

PANOPTIC_FOLDER = "panoptic"
PIX2CAP_FOLDER = "pix2cap"
BACKGROUND = "background"

_ID_STEP = 123329
"""Segment k of an image has the id (k + 1) * step modulo 2**24: with an odd step all ids and colors differ."""


def write_panoptic(
    out: Path, records: Sequence[Mapping[str, Any]], categories: Mapping[str, int], *, split: str = "train"
) -> None:
    """Write the panoptic JSON, its PNGs and the Pix2Cap JSON of these images below `out`.

    Each record holds "image" ({"id", "file_name", "height", "width"}), "objects" ({"category_id", "segmentation" as
    RLE, "area", "bbox"}; masks that do not overlap) and "descriptions" (one text per object). categories: thing names
    and their ids; the background gets the id after the last.
    Raises: DataError if masks overlap, cover the whole image, or descriptions are missing.
    """
    background_id = max(categories.values()) + 1
    things = [{"id": index, "name": name, "supercategory": "shape", "isthing": 1} for name, index in categories.items()]
    stuff = {"id": background_id, "name": BACKGROUND, "supercategory": BACKGROUND, "isthing": 0}
    png_folder = out / PANOPTIC_FOLDER / "annotations" / f"panoptic_{split}"
    png_folder.mkdir(parents=True)
    described = [_annotation(record, background_id, png_folder) for record in records]
    plain = [
        {**item, "segments_info": [_without_text(segment) for segment in item["segments_info"]]} for item in described
    ]
    header = {"info": {"description": "RefShapes"}, "images": [record["image"] for record in records]}
    pix2cap_file = out / PIX2CAP_FOLDER / f"pix2cap_coco_{split}.json"
    for file, annotations in ((png_folder.with_suffix(".json"), plain), (pix2cap_file, described)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**header, "annotations": annotations, "categories": [*things, stuff]}))


def _annotation(record: Mapping[str, Any], background_id: int, png_folder: Path) -> Json:
    """Write the PNG of one image and return its entry, with descriptions."""
    image, objects, texts = record["image"], record["objects"], record["descriptions"]
    where = f"RefShapes image {image['id']}"
    if len(texts) != len(objects):
        raise DataError(f"{where}: found {len(texts)} descriptions, expected one for each of {len(objects)} objects")
    masks = [coco_mask.decode(item["segmentation"]).astype(bool) for item in objects]
    owners = np.sum(masks, axis=0, dtype=np.int64) if masks else np.zeros((image["height"], image["width"]), np.int64)
    background: BoolMask = owners == 0
    if owners.max() > 1 or not background.any():
        raise DataError(f"{where}: found overlapping masks or no background, expected every pixel to have one owner")
    colours = np.zeros((*background.shape, 3), dtype=np.uint8)
    infos: list[Json] = []
    for item, mask, text in zip(objects, masks, texts, strict=True):
        segment_id = _paint(colours, mask, len(infos))
        kept = {key: item[key] for key in ("category_id", "bbox", "area")}
        infos.append({"id": segment_id, **kept, "iscrowd": 0, "description": text})
    bounds = bounding_box(background)
    assert bounds is not None, "checked above"
    x0, y0, x1, y1 = bounds
    infos.append({
        "id": _paint(colours, background, len(infos)), "category_id": background_id, "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(background.sum()),
        "description": f"The muddy, cluttered background around {len(objects)} shapes.",
    })  # fmt: skip
    png = png_folder / Path(image["file_name"]).with_suffix(".png").name
    Image.fromarray(colours).save(png)
    return {"image_id": image["id"], "file_name": png.name, "segments_info": infos}


def _paint(colours: np.ndarray[Any, Any], mask: BoolMask, number: int) -> int:
    """Paint the pixels of segment `number` in its color and return its id."""
    segment_id = (number + 1) * _ID_STEP % 256**3
    colours[mask] = (segment_id % 256, segment_id // 256 % 256, segment_id // 65536)
    return segment_id


def _without_text(segment: Json) -> Json:
    return {key: value for key, value in segment.items() if key != "description"}

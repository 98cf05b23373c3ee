"""Reads human expressions with a box instead of a mask (RefCOCOS), for evaluation.

Each record of a JSON list becomes an `Expression` whose target is the whole box, scored by `evaluation/refer_seg.py`.
One record, with the keys that are read:

    {"image_id": 9400, "local_image": "val2017/000000009400.jpg", "expression": "the person looking at an apple laptop",
     "bbox_xyxy": [2.16, 95.43, 104.63, 192.51], "height": 480, "width": 640}

"bbox_xyxy" is (left, top, right, bottom) in pixels, null for no target. A box covers the pixels whose centers are in
it. An object fills only part of its box, so even its perfect mask has an IoU below 1: compare such scores between
models only, never with scores on masks.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pixel_sail.data.coordinates import check_pixels, shows_pixels
from pixel_sail.data.fields import field, stated_hw
from pixel_sail.data.images import image_file
from pixel_sail.data.records import open_records
from pixel_sail.rle import encode_mask
from pixel_sail.texts import shown
from pixel_sail.types import RLE, DataError, Expression, SizeHW


def load(*, annotations: str | Path, image_dir: str | Path) -> list[Expression]:
    """Return every record in file order; ref_id is its index, sent_id is 0.

    image_dir: folder of the image names. Raises: DataError.
    """
    records = open_records(annotations)
    return [
        _expression(record, number, Path(image_dir), f"{records.where}[{number}]", partial(shows_pixels, records))
        for number, record in enumerate(records)
    ]


def _expression(record: Any, number: int, image_dir: Path, where: str, in_pixels: Callable[[], bool]) -> Expression:
    size_hw = stated_hw(record, where)
    if size_hw is None:
        raise DataError(f"{where}: found neither height nor width, expected both; repair the record")
    text = field(record, "expression", str, where)
    if not text.strip():
        raise DataError(f"{where}: found an empty expression, expected words; repair the record")
    return Expression(
        ref_id=number,
        sent_id=0,
        image_id=field(record, "image_id", int, where),
        image_path=image_file(image_dir, field(record, "local_image", str, where)),
        image_hw=size_hw,
        text=text,
        target=_box_rle(record, size_hw, where, in_pixels),
    )


def _box_rle(record: dict[str, Any], size_hw: SizeHW, where: str, in_pixels: Callable[[], bool]) -> RLE | None:
    """Return the pixels whose centers are in the box, None for no target."""
    # A missing key is damage: no target must be stated as null.
    box = record.get("bbox_xyxy", "nothing")
    if box is None:
        return None
    is_numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if not is_numbers or not (0 <= box[0] < box[2] <= size_hw[1] and 0 <= box[1] < box[3] <= size_hw[0]):
        raise DataError(
            f"{where}: found bbox_xyxy = {shown(box)}, expected [left, top, right, bottom] inside the image of "
            f"{size_hw} (height, width), or null; repair the record"
        )
    check_pixels(box, size_hw, f"{where}: bbox_xyxy", in_pixels)
    # The center of pixel i is at i + 0.5.
    left, top, right, bottom = (math.ceil(value - 0.5) for value in box)
    mask = np.zeros(size_hw, dtype=bool)
    mask[top:bottom, left:right] = True
    if not mask.any():
        raise DataError(
            f"{where}: found bbox_xyxy = {shown(box)} without a pixel, expected a larger box; repair the record"
        )
    return encode_mask(mask)

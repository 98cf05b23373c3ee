"""Masks as COCO run-length encodings that fit into JSON, and their boxes.

Used by everything that writes masks. Reading and validation is in `data/masks.py`. A 2 x 2 mask whose left column is
set: {"size": [2, 2], "counts": "022"}.
"""

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pixel_sail.types import RLE, BoolMask, DataError

BoxXYXY = tuple[int, int, int, int]
"""First and one past the last column and row of a region: x0, y0, x1, y1 in pixels."""


def encode_mask(mask: BoolMask) -> RLE:
    """Return a mask as compressed RLE with `counts` as str, ready for JSON. Raises: DataError unless 2-D bool."""
    check_mask(mask, "encode_mask")
    return json_safe(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def check_mask(mask: BoolMask, where: str) -> None:
    """Raise DataError unless the mask is boolean and has two axes."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise DataError(
            f"{where}: found shape {mask.shape} of {mask.dtype}, expected [height, width] of bool; "
            "compare with a threshold first, sums of masks are not masks"
        )


def json_safe(rle: RLE) -> RLE:
    """Return an RLE of pycocotools with plain Python numbers and text."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def bounding_box(mask: BoolMask) -> BoxXYXY | None:
    """Return the smallest box around a mask, None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encode_as_released(values_HW: NDArray[np.uint8]) -> RLE:
    """Return a map with values above 1 as the released evaluation encodes it.

    The encoder starts a new run wherever the value changes, column by column, and treats every second run as mask. A
    border between two values above 0 therefore turns one of them into background and may invert what follows.
    """
    return json_safe(coco_mask.encode(np.asfortranarray(values_HW)))

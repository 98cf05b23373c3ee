"""Masks as COCO run-length encodings that fit into JSON.

Place in the flow: below everything that writes masks: predictions, the drawn benchmark. Reading, with its checks, is in
`data/masks.py`. A 2 x 2 mask whose left column is set: {"size": [2, 2], "counts": "022"}.
"""

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.types import RLE, BoolMask, DataError


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
    """Return what pycocotools made with plain numbers and text."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}

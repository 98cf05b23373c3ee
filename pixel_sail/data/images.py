"""Opening images: one function that either returns an upright RGB image of the expected size or says what is wrong.

Place in the flow: training (`data/packing.py`) and inference open every image here. A message looks like

    refcoco/train/image=9: /data/train2014/COCO_9.jpg: cannot be decoded (image file is truncated); replace the file
"""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pixel_sail.types import DataError, SizeHW

EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright; 1 is upright already."""


def load_image(path: str | Path, *, where: str, expected_hw: SizeHW | None = None) -> Image.Image:
    """Return the image as 8-bit RGB.

    EXIF orientation is applied, unless the stored orientation is the one with the expected size (annotation files count
    pixels as stored). 16-bit images are scaled to 8 bits, other modes converted.
    Raises: DataError when the file is missing, cannot be decoded, or has another size than the annotations state.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            image = _upright(opened, expected_hw)
    except FileNotFoundError:
        raise DataError(f"{where}: {path}: no such image file; check configs/paths and the image folder") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise DataError(f"{where}: {path}: cannot be decoded ({error}); replace the file") from error
    if expected_hw is not None and (image.height, image.width) != tuple(expected_hw):
        raise DataError(
            f"{where}: {path}: image is {(image.height, image.width)} (height, width), annotations say "
            f"{tuple(expected_hw)}; the image folder does not belong to these annotations"
        )
    return _to_rgb(image)


def _upright(image: Image.Image, expected_hw: SizeHW | None) -> Image.Image:
    """Return the image turned by its EXIF orientation, or as stored where that is what the annotations count."""
    if expected_hw is not None and (image.height, image.width) == tuple(expected_hw):
        return image.copy()
    # Only the orientation tag is read: ImageOps.exif_transpose writes all tags back, which damaged ones do not survive.
    turn = EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image.copy() if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB of any mode."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values * 255.0 / 65535.0).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")

"""Reads the size of an image without decoding it, for annotation files that do not state it.

Sources whose polygons have no size (RefCOCOg-GCG, ReasonSeg) call it before they decode masks. The right size depends
on what the annotators saw:

    a phone image stored as 3000 x 4000 with the EXIF orientation "turn by 90 degrees":
    stored_hw -> (3000, 4000)   COCO counts pixels as stored
    upright_hw -> (4000, 3000)  most tools show, and ReasonSeg counts, the upright image
"""

from pathlib import Path

from PIL import ExifTags, Image

from pixel_sail.data.images import DECODING_ERRORS, EXIF_TURNS, existing_file, open_image, pillow_reason
from pixel_sail.types import DataError, MissingDataError, SizeHW

_SIDEWAYS = range(5, 9)
"""EXIF orientations that swap height and width."""


def stored_hw(path: Path, where: str) -> SizeHW:
    """Return the stored size. Raises: DataError if the file is missing or not an image."""
    return _read(path, where)[0]


def upright_hw(path: Path, where: str) -> SizeHW:
    """Return the size after applying the EXIF orientation. Raises: DataError if the file is missing or not an image."""
    (height, width), orientation = _read(path, where)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def turn_of(path: Path, where: str) -> Image.Transpose | None:
    """Return the transposition that makes the stored image upright, None if it is. Raises: DataError if the file is
    missing or not an image."""
    orientation = _read(path, where)[1]
    return EXIF_TURNS.get(orientation) if isinstance(orientation, int) else None


def _read(path: Path, where: str) -> tuple[SizeHW, object]:
    path = existing_file(path)
    try:
        with open_image(path) as image:
            return (image.height, image.width), image.getexif().get(ExifTags.Base.Orientation, 1)
    except FileNotFoundError:
        raise MissingDataError(
            f"{where}: {path}: no such image file; check configs/paths and the image folder"
        ) from None
    except DECODING_ERRORS as error:
        raise DataError(f"{where}: {path}: cannot be read ({pillow_reason(error)}); replace the file") from error

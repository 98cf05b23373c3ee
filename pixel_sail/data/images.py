"""Opens images: returns an upright RGB image of the expected size or raises an error that says what is wrong.

Training (`data/packing.py`) and inference open every image here. Sources whose annotations refer to several image
folders look files up with `find_image`. An error message:

    refcoco/train/image=9: /data/train2014/COCO_9.jpg: cannot be decoded (image file is truncated); replace the file
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pixel_sail.data.remarks import remark
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
"""EXIF orientation -> transposition that makes the image upright; 1 is upright already."""

BACKGROUND_RGB = (255, 255, 255)
"""Color behind transparent pixels: white, the page on which viewers and browsers show an image."""

MAX_16_BIT = 65535

MAX_SIDE_PX = 65_535
"""Largest side of a JPEG. A file that states a larger one is wrong, and a mask of that size would exhaust memory."""

RASTER_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF"),
    *("PPM", "TGA", "PCX", "SGI", "ICO", "DDS", "QOI"),
)
"""Pillow's names of the supported formats, all decoded by Pillow itself. Others, such as EPS, are vector graphics, for
which Pillow starts external programs regardless of the file name."""

DECODING_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
)
"""Exceptions that Pillow raises on damaged files, found by altering bytes of files of all formats. RuntimeError (the
base of NotImplementedError) comes from AVIF and DDS, MemoryError from the sizes that a damaged JPEG 2000 states."""

OTHER_FORM = "Unicode form of a file name"
"""Topic of the remarks about files found under the other Unicode form of their name."""

LOW_LEVELS = "dark 16-bit image"
"""Topic of the remarks about files whose levels use only the lowest bits."""

_USED_16_BITS = 14
"""Cameras of 10 to 14 bits store their levels in 16-bit files."""

_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")


def find_image(folders: Sequence[Path], file_name: str) -> Path:
    """Return the image file of this name in the first folder that has it, else its path in the first folder.

    COCO images have one number but two names: `COCO_train2014_000000000009.jpg` in the 2014 folders and
    `000000000009.jpg` in the 2017 folders. If the first name is not found, the second is tried.
    """
    match = _COCO_2014.fullmatch(file_name)
    names = [file_name] if match is None else [file_name, match[1]]
    paths = [image_file(folder, name) for name in names for folder in folders]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def image_file(folder: Path, file_name: str) -> Path:
    """Return the file of this name in a folder, in either Unicode form (see `existing_file`)."""
    path = folder / file_name
    return path if file_name.isascii() else existing_file(path)


def existing_file(path: Path) -> Path:
    """Return the path under which a file exists: the same letters may be composed or decomposed Unicode.

    macOS writes decomposed names ("e" and an accent), most other programs composed ones, and archives keep either. The
    exact name is tried first; if none exists, the path is returned unchanged.
    """
    # Path.exists raises an error for names that are too long.
    if str(path).isascii() or os.path.exists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        forms = dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
        present = next((found / form for form in forms if os.path.exists(found / form)), None)
        if present is None:
            return path
        found = present
    remark(OTHER_FORM, str(path.parent), str(found), "found under the other Unicode form of the requested name")
    return found


@cache
def _readable_formats() -> tuple[str, ...]:
    """Return the supported raster formats that this version of Pillow has."""
    Image.init()
    return tuple(name for name in RASTER_FORMATS if name in Image.OPEN)


def open_image(source: str | Path | BinaryIO, formats: Sequence[str] = ()) -> Image.Image:
    """Open an image file, identified by its content, as one of `formats`, by default any supported format.

    The only call of Pillow's `open` in the project. Raises: the exceptions in `_DECODING_ERRORS`.
    """
    tried = tuple(formats) or _readable_formats()
    if isinstance(source, str | Path) and Path(source).exists() and not Path(source).is_file():
        raise UnidentifiedImageError(f"{source} is no regular file")
    try:
        return Image.open(source, formats=tried)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(
            f"it is none of {', '.join(tried)}; vector graphics such as EPS, PDF or SVG are not read, convert them"
        ) from None


def check_format(image: Image.Image, where: str) -> None:
    """Raise DataError, before decoding, if an image opened elsewhere has a format that is not supported here."""
    if image.format is not None and image.format not in _readable_formats():
        raise DataError(
            f"{where}: found an image of the format {image.format}, expected one of {', '.join(_readable_formats())}; "
            "convert it"
        )


def load_image(path: str | Path, *, where: str, expected_hw: SizeHW | None = None) -> Image.Image:
    """Return the image as 8-bit RGB.

    EXIF orientation is applied, unless the stored orientation has the expected size (annotation files count pixels as
    stored). Transparent pixels become white. 16-bit gray is scaled to 8 bits; other modes (bilevel, gray, palette,
    CMYK, ...) are converted. The first frame of an animation is used. Raises: DataError when the file is missing,
    cannot be decoded, has another size than the annotations state, or has pixel values without a known range.
    """
    path = existing_file(Path(path))
    try:
        with open_image(path) as opened:
            is_16_bit = _is_16_bit(opened)
            opened.load()
            image: Image.Image = _upright(opened, expected_hw)
    except FileNotFoundError:
        raise DataError(f"{where}: {path}: no such image file; check configs/paths and the image folder") from None
    except DECODING_ERRORS as error:
        raise DataError(f"{where}: {path}: cannot be decoded ({pillow_reason(error)}); replace the file") from error
    if expected_hw is not None and (image.height, image.width) != tuple(expected_hw):
        raise DataError(
            f"{where}: {path}: image is {(image.height, image.width)} (height, width), annotations say "
            f"{tuple(expected_hw)}; the image folder does not belong to these annotations"
        )
    if is_16_bit:
        _remark_low_levels(image, path, where)
    return _to_rgb(image, f"{where}: {path}")


def pillow_reason(error: BaseException) -> str:
    """Return the message of a Pillow error, or its class name if it has none."""
    return str(error) or type(error).__name__


def rgb_image(image: Image.Image, *, where: str) -> Image.Image:
    """Return an image opened elsewhere as `load_image` returns a file: upright, 8-bit RGB.

    Raises: DataError when it cannot be decoded, has pixel values without a known range, or has an unsupported format,
    such as EPS.
    """
    check_format(image, where)
    try:
        image.load()
        upright = _upright(image, None)
    except DECODING_ERRORS as error:
        raise DataError(f"{where}: the image cannot be decoded ({pillow_reason(error)}); open another file") from error
    return _to_rgb(upright, where)


def _is_16_bit(opened: Image.Image) -> bool:
    """Return whether an unread file has 16-bit levels; of color images Pillow keeps only the upper 8 bits."""
    return opened.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(opened, "tile", ()))


def _remark_low_levels(image: Image.Image, path: Path, where: str) -> None:
    """Log that an image is nearly black because its 16-bit file holds levels of 14 bits or fewer."""
    if image.mode.startswith("I"):
        largest = int(np.asarray(image).max(initial=0))
    else:
        # Of 16-bit colors Pillow keeps the upper 8 bits. The alpha channel is ignored.
        largest = 256 * max(int(band.getextrema()[1]) for band in image.split()[:3])  # type: ignore[arg-type]
    if 0 < largest < 1 << _USED_16_BITS:
        remark(
            LOW_LEVELS,
            str(path.parent),
            f"{where}: {path}",
            f"the largest level is about {largest} of {MAX_16_BIT}, so the image is nearly black; a camera of "
            f"{largest.bit_length()} bits wrote 16-bit files, scale their levels up if this is not meant",
        )


def _upright(image: Image.Image, expected_hw: SizeHW | None) -> Image.Image:
    """Return the image turned by its EXIF orientation, or as stored if that has the annotated size."""
    if expected_hw is not None and (image.height, image.width) == tuple(expected_hw):
        return image
    # Read only the orientation tag: ImageOps.exif_transpose writes all tags back and fails on damaged ones.
    turn = EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Return 8-bit RGB of any mode, on white where it is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, where)
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    page = Image.new("RGBA", image.size, (*BACKGROUND_RGB, 255))
    return Image.alpha_composite(page, opaque).convert("RGB")


def _to_8_bit(image: Image.Image, where: str) -> Image.Image:
    """Return 16-bit gray levels as 8 bits; the level marked as transparent becomes white."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > MAX_16_BIT:
        raise DataError(
            f"{where}: found pixel values {values.min():g} .. {values.max():g} of mode {image.mode!r}, expected whole "
            f"numbers 0 .. {MAX_16_BIT}, for which black and white are defined; convert the file to 8 bits"
        )
    grey = (values * 255.0 / MAX_16_BIT).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = BACKGROUND_RGB[0]
    return Image.fromarray(grey)

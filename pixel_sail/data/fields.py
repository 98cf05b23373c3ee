"""Reads typed fields of annotation records, with errors that say what is wrong.

The sources parse records of `data/records.py` with it. An error message:

    RefCOCOg_GCG_train.json[17]: found caption = None, expected str; repair the record
"""

from pathlib import Path
from typing import TypeVar

from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW

T = TypeVar("T")

MAX_PIXELS = 1 << 28
"""No image has more; a mask of a mistyped size would exhaust memory."""

ImageFolders = str | Path | list[str | Path]
"""One folder, or several in which images are looked up."""


def field(record: object, name: str, kind: type[T], where: str) -> T:
    """Return a required field of this type. Raises: DataError."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {shown(record)}, expected an object with {name!r}; repair the record")
    value = record.get(name)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise DataError(f"{where}: found {name} = {shown(value)}, expected {kind.__name__}; repair the record")
    return value


def strings(record: object, name: str, where: str) -> list[str]:
    """Return a field that must be a list of strings. Raises: DataError."""
    values = field(record, name, list, where)
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{where}: found {shown(value)} among {name}, expected texts only; repair the record")
    return values


def stated_hw(record: object, where: str) -> SizeHW | None:
    """Return (height, width) as stated by the record, None if neither is. Raises: DataError."""
    if isinstance(record, dict) and record.get("height") is None and record.get("width") is None:
        return None
    height, width = field(record, "height", int, where), field(record, "width", int, where)
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"{where}: found height {height} and width {width}, expected at least 1 and no more than {MAX_PIXELS} "
            "pixels; repair the record"
        )
    return height, width


def folders(paths: ImageFolders) -> list[Path]:
    """Return the folders of a config value, which may be one or several."""
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]

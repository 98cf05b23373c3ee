"""Rejects coordinates that are fractions of the image (0 .. 1) instead of pixels.

Readers of polygons, boxes or points from a file or a command line check them before painting. Many exporters write
fractions; painted as pixels they would all be the pixel in the upper left corner:

    [0.1, 0.2, 0.6, 0.2, 0.6, 0.8] in an image of 640 x 480   ->  rejected: they look like fractions
    [0, 0, 1, 0, 1, 1, 0, 1] in the same image                ->  the corner pixel, if other regions of the file
                                                                  extend further; else rejected

Percentages cannot be distinguished from pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from pixel_sail.data.records import Records
from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW

_LARGEST_FRACTION = 1.05
"""Exporters round, and enlarge by half a pixel."""

_LARGEST_OVERHANG = 0.5
"""How far a fraction may lie beyond the left or upper border."""

_SMALLEST_IMAGE_PX = 8
"""In an image with a smaller side a region of one pixel is plausible."""

_MAX_DEPTH = 12
_KEYS = frozenset({"segmentation", "bbox_xyxy", "points"})
_MAX_RECORDS = 10_000

_KNOWN: WeakKeyDictionary[Records, bool] = WeakKeyDictionary()

ADVICE = (
    "such coordinates look like fractions of the image, expected pixels; multiply x by the width and y by the height "
    "when the file is written"
)


def look_like_fractions(numbers: Sequence[float], size_hw: SizeHW) -> bool:
    """Return whether all coordinates of a region lie in 0 .. 1 of an image that is larger."""
    if not numbers or min(size_hw) < _SMALLEST_IMAGE_PX:
        return False
    return min(numbers) >= -_LARGEST_OVERHANG and max(numbers) <= _LARGEST_FRACTION


def check_pixels(
    numbers: Sequence[float], size_hw: SizeHW, where: str, shows_pixels: Callable[[], bool] | None = None
) -> None:
    """Raise DataError for coordinates of one region that look like fractions.

    Whole and half numbers may be the corner pixel; `shows_pixels` returns whether other regions of the file are larger,
    in which case they are (None: unknown).
    """
    if not look_like_fractions(numbers, size_hw):
        return
    is_grid = all(float(2 * number).is_integer() for number in numbers)
    if is_grid and shows_pixels is not None and shows_pixels():
        return
    raise DataError(
        f"{where}: found coordinates {shown(list(numbers))} within 0 .. 1 in an image of {size_hw} (height, width); "
        f"{ADVICE}"
    )


def shows_pixels(records: Records) -> bool:
    """Return whether a file has a polygon, box or point with a coordinate above 1; computed on first use.

    COCO's `bbox` is not evidence, as some exporters leave it in pixels.
    """
    if records not in _KNOWN:
        _KNOWN[records] = any(_is_beyond(records[i], _MAX_DEPTH) for i in range(min(len(records), _MAX_RECORDS)))
    return _KNOWN[records]


def _is_beyond(value: object, depth: int, is_region: bool = False) -> bool:
    if is_region and type(value) in (int, float):
        return value > _LARGEST_FRACTION  # type: ignore[operator]
    if depth == 0:
        return False
    if isinstance(value, dict):
        # A run-length encoding counts pixels anyway and says nothing about polygons.
        inner: Iterable[tuple[object, bool]] = ((item, key in _KEYS) for key, item in value.items())
        return any(_is_beyond(item, depth - 1, below) for item, below in inner)
    if isinstance(value, list):
        return any(_is_beyond(item, depth - 1, is_region) for item in value)
    return False

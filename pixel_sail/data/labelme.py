"""Converts shapes of LabelMe files to masks.

`data/sources/reasonseg.py` reads files of this format and paints their shapes with it. One shape:

    {"label": "target", "shape_type": "rectangle", "points": [[60.0, 50.0], [10.0, 10.0]]}   ->  51 x 41 pixels

A shape without `shape_type` is a polygon. Coordinates are pixel indices: polygons, rectangles and masks include their
outline, a circle its radius. Lines and points have no area and are rejected.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from pixel_sail.data.fields import field
from pixel_sail.data.images import DECODING_ERRORS, open_image, pillow_reason
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, SizeHW

Coordinate = TypeVar("Coordinate", int, float)

_MAX_COORDINATE_PX = 100_000

Points = tuple[tuple[float, float], ...]
"""(x, y) in pixels."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of a file."""

    points: Points
    kind: str
    """LabelMe's shape_type: one of PAINTERS, or mask."""
    pixels: BoolMask | None
    """Pixels of a mask, within the rectangle of its two points."""
    where: str
    """File and shape number, for error messages."""
    is_ignored: bool = False


def read_shape(record: object, where: str, *, is_ignored: bool) -> Shape:
    """Return a checked shape. Raises: DataError, also for a kind without an area or an unknown kind."""
    points = _points(record, where)
    assert isinstance(record, dict), "a record without points was rejected"
    kind = record.get("shape_type") or "polygon"
    if not isinstance(kind, str) or (kind != "mask" and kind not in PAINTERS):
        raise DataError(
            f"{where}: found shape_type {shown(kind)}, expected one of {(*PAINTERS, 'mask')}; lines and points have no "
            "area, draw the region as a polygon"
        )
    counts = _NUM_POINTS.get(kind)
    if counts is not None and len(points) not in counts:
        raise DataError(
            f"{where}: found a {kind} of {len(points)} points, expected {' or '.join(map(str, counts))}; repair it"
        )
    (left, top), (right, bottom) = _corners(points)
    if kind == "rectangle" and not all(x in (left, right) and y in (top, bottom) for x, y in points):
        raise DataError(f"{where}: found a rectangle that is turned, expected upright sides; draw it as a polygon")
    pixels = _mask_pixels(record, points, where) if kind == "mask" else None
    return Shape(points=points, kind=kind, pixels=pixels, where=where, is_ignored=is_ignored)


def paint_shape(shape: Shape, size_hw: SizeHW) -> BoolMask:
    """Return a shape as a mask at image resolution, clipped to the image."""
    if shape.pixels is None:
        return PAINTERS[shape.kind](shape.points, size_hw)
    mask = np.zeros(size_hw, dtype=np.bool_)
    left, top = _corners(_whole(shape.points))[0]
    height, width = shape.pixels.shape
    rows, columns = slice(max(top, 0), max(top + height, 0)), slice(max(left, 0), max(left + width, 0))
    shown_part = shape.pixels[max(-top, 0) :, max(-left, 0) :]
    target = mask[rows, columns]
    target[:] = shown_part[: target.shape[0], : target.shape[1]]
    return mask


def _polygon(points: Points, size_hw: SizeHW) -> BoolMask:
    """Return the polygon of the points truncated to integers, as the ReasonSeg benchmark paints it."""
    whole = _whole(points)
    canvas = Image.new("1", (size_hw[1], size_hw[0]))
    ImageDraw.Draw(canvas).polygon(whole if len(whole) > 1 else whole * 2, fill=1, outline=1)
    return np.array(canvas, dtype=np.bool_)


def _rectangle(points: Points, size_hw: SizeHW) -> BoolMask:
    """Return the pixels from one corner to the other, both included."""
    (left, top), (right, bottom) = _corners(_whole(points))
    mask = np.zeros(size_hw, dtype=np.bool_)
    mask[max(top, 0) : max(bottom + 1, 0), max(left, 0) : max(right + 1, 0)] = True
    return mask


def _circle(points: Points, size_hw: SizeHW) -> BoolMask:
    """Return the pixels at most as far from the first point as the second point is."""
    (x, y), (edge_x, edge_y) = points
    rows, columns = np.ogrid[: size_hw[0], : size_hw[1]]
    squared = (columns - x) ** 2 + (rows - y) ** 2
    inside: BoolMask = squared <= math.hypot(edge_x - x, edge_y - y) ** 2 + _ROUNDING
    return inside


PAINTERS: dict[str, Callable[[Points, SizeHW], BoolMask]] = {
    "polygon": _polygon,
    "rectangle": _rectangle,
    "circle": _circle,
}
"""Painter of each kind except masks, which have their own pixels."""

_NUM_POINTS = {"rectangle": (2, 4), "circle": (2,), "mask": (2,)}
"""A rectangle may list all four corners, as X-AnyLabeling writes it; a circle has its center and a point on it."""

_ROUNDING = 1e-6


def _points(record: object, where: str) -> Points:
    points = field(record, "points", list, where)
    for point in points:
        is_pair = isinstance(point, list) and len(point) == 2 and all(type(value) in (int, float) for value in point)
        if not is_pair or not all(abs(value) <= _MAX_COORDINATE_PX for value in point):
            raise DataError(
                f"{where}: found point {shown(point)}, expected [x, y] within {_MAX_COORDINATE_PX} px; repair the file"
            )
    if not points:
        raise DataError(f"{where}: found no points, expected a polygon; repair the file")
    return tuple((x, y) for x, y in points)


def _whole(points: Points) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in points]


def _corners(
    points: Sequence[tuple[Coordinate, Coordinate]],
) -> tuple[tuple[Coordinate, Coordinate], tuple[Coordinate, Coordinate]]:
    """Return the upper left and the lower right corner of some points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return (min(xs), min(ys)), (max(xs), max(ys))


def _mask_pixels(record: dict[str, object], points: Points, where: str) -> BoolMask:
    """Return the pixels of a mask, which LabelMe stores as a PNG of the size of its rectangle."""
    text = field(record, "mask", str, where)
    try:
        with open_image(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as opened:
            pixels = np.asarray(opened.convert("L")) > 0
    except DECODING_ERRORS as error:
        raise DataError(
            f"{where}: found a mask that is not a PNG ({pillow_reason(error)}), expected one; repair it"
        ) from error
    (left, top), (right, bottom) = _corners(_whole(points))
    if pixels.shape != (bottom - top + 1, right - left + 1):
        raise DataError(
            f"{where}: found a mask of {pixels.shape} (height, width) for the points {shown(points)}, expected "
            f"{(bottom - top + 1, right - left + 1)}; repair the file"
        )
    if not pixels.any():
        raise DataError(f"{where}: found a mask without a pixel, expected at least one; repair the file")
    return pixels

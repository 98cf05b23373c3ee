"""Converts segmentations of annotation files to and from boolean masks; the only module that decodes COCO
segmentations.

Sources decode the masks of a `Turn` (training) or `Expression.target` (evaluation) with it.

A segmentation is a list of polygons, a run-length encoding, or (in RRSIS-D) a list of encodings. Polygons of fewer than
three points among valid ones are skipped with a remark. Parts are always united, never summed: pycocotools starts a new
run wherever the value changes, so a mask that holds a 2 returns from an encode-decode round trip with holes or inverted
columns. A polygon inside another one is filled as well, as COCO has no holes.
Example: two overlapping squares [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]] on a 4x4 image are 7 pixels, and
as RLE {"size": [4, 4], "counts": "02210O3"}: the runs 0 2 2 3 2 2 5 down the columns, background first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.data.coordinates import check_pixels
from pixel_sail.data.remarks import remark
from pixel_sail.rle import check_mask, encode_as_released, json_safe
from pixel_sail.texts import shown
from pixel_sail.types import RLE, BoolMask, DataError, SizeHW

ShowsPixels = Callable[[], bool]
"""Returns whether the file of a segmentation has coordinates above 1, see `data/coordinates.py`."""

SHORT_POLYGON = "short polygon"
"""Topic of the remarks about skipped polygons."""

_MIN_POLYGON_NUMBERS = 6
_MAX_COORDINATE_PX = 100_000
"""Larger coordinates cannot belong to an image, and pycocotools would allocate memory in proportion."""


def decode_segmentation(
    segmentation: object, size_hw: SizeHW, where: str, shows_pixels: ShowsPixels | None = None
) -> BoolMask:
    """Return one instance as a mask at image resolution, from any COCO format.

    Formats: list of polygons (united), compressed RLE (`counts` str or bytes), uncompressed RLE (`counts` list), list
    of RLEs (united). `where` names file and annotation in errors. Raises: DataError.
    """
    return decode_rle(_to_rle(segmentation, size_hw, where, shows_pixels))


def merge_to_rle(
    segmentations: Sequence[object], size_hw: SizeHW, where: str, shows_pixels: ShowsPixels | None = None
) -> RLE:
    """Return the union of one or more instances, of any COCO format, as RLE. Raises: DataError."""
    if not segmentations:
        raise DataError(f"{where}: found no segmentation, expected at least one; use None for an absent target")
    parts = [_to_rle(segmentation, size_hw, where, shows_pixels) for segmentation in segmentations]
    return json_safe(coco_mask.merge(parts, intersect=False))


def summed_as_released(
    segmentations: Sequence[object], size_hw: SizeHW, where: str, shows_pixels: ShowsPixels | None = None
) -> RLE | None:
    """Return the target that the released evaluation computes from these instances, None if it is their union.

    The release sums the polygons of each instance, unites the sums of several instances bitwise (gRefCOCO), and encodes
    the result, in which 2s and 3s start a new run: the overlap of two polygons becomes a hole, and what follows in
    column order may be inverted. One of 1,236 real COCO instances has such an overlap. Raises: DataError.
    """
    polygons = [
        _checked_polygons(segmentation, size_hw, where, shows_pixels) if _is_polygons(segmentation) else None
        for segmentation in segmentations
    ]
    if not any(own is not None and _overlap(own, size_hw) for own in polygons):
        return None
    sums = [
        decode_segmentation(segmentation, size_hw, where).astype(np.uint8)
        if own is None
        else coco_mask.decode(coco_mask.frPyObjects(own, *size_hw)).sum(axis=2).astype(np.uint8)
        for segmentation, own in zip(segmentations, polygons, strict=True)
    ]
    return encode_as_released(np.bitwise_or.reduce(sums))


def _is_polygons(segmentation: object) -> TypeGuard[Sequence[object]]:
    return isinstance(segmentation, list | tuple) and not any(isinstance(part, dict) for part in segmentation)


def _overlap(polygons: Sequence[Sequence[float]], size_hw: SizeHW) -> bool:
    parts = coco_mask.frPyObjects(list(polygons), *size_hw)
    return int(coco_mask.area(parts).sum()) > int(coco_mask.area(coco_mask.merge(parts, intersect=False)))


def union_masks(masks: Sequence[BoolMask], size_hw: SizeHW) -> BoolMask:
    """Return the pixels that are in any of the masks; all False without masks. Raises: DataError."""
    union: BoolMask = np.zeros(size_hw, dtype=np.bool_)
    for index, mask in enumerate(masks):
        check_mask(mask, f"union_masks: mask {index}")
        if mask.shape != tuple(size_hw):
            raise DataError(
                f"union_masks: mask {index} is {mask.shape}, expected (height, width) {tuple(size_hw)}; "
                "unite masks of one image only"
            )
        union |= mask
    return union


def decode_rle(rle: RLE) -> BoolMask:
    """Return a checked compressed RLE (see `check_rle`) as a mask."""
    return np.ascontiguousarray(coco_mask.decode(rle)).astype(np.bool_)


def check_rle(rle: object, size_hw: SizeHW | None, where: str) -> RLE:
    """Return a compressed RLE after checking its size and that its runs cover the image exactly.

    pycocotools reads past its buffers on malformed counts, so every RLE from a file is checked here first. `size_hw`
    None accepts any size. Raises: DataError.
    """
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str | bytes):
        raise DataError(
            f"{where}: found {shown(rle)}, expected a compressed RLE {{'size': [height, width], 'counts': str}}; "
            "write masks with encode_mask"
        )
    height, width = _checked_size(rle, size_hw, where)
    counts: bytes = rle["counts"].encode("utf-8", "surrogatepass") if isinstance(rle["counts"], str) else rle["counts"]
    runs = _run_lengths(counts)
    if runs is None:
        raise DataError(
            f"{where}: found RLE counts {shown(rle['counts'])} that do not parse, expected COCO's compressed counts; "
            "the text was cut or altered, write the file again"
        )
    _check_runs(runs, (height, width), where)
    return {"size": [height, width], "counts": counts.decode("ascii")}


def _to_rle(segmentation: object, size_hw: SizeHW, where: str, shows_pixels: ShowsPixels | None) -> RLE:
    """Return any COCO segmentation as compressed RLE."""
    if isinstance(segmentation, list | tuple) and any(isinstance(part, dict) for part in segmentation):
        if not all(isinstance(part, dict) for part in segmentation):
            raise DataError(
                f"{where}: found polygons and run-length encodings in one list, expected one kind; repair it"
            )
        parts = [_to_rle(part, size_hw, f"{where}: part {i}", None) for i, part in enumerate(segmentation)]
        union: RLE = coco_mask.merge(parts, intersect=False)
        return union
    if isinstance(segmentation, list | tuple):
        polygons = _checked_polygons(segmentation, size_hw, where, shows_pixels)
        merged: RLE = coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw), intersect=False)
        return merged
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        height, width = _checked_size(segmentation, size_hw, where)
        runs = segmentation["counts"]
        if not all(type(run) is int for run in runs):
            raise DataError(f"{where}: found RLE counts {shown(runs)}, expected integers; repair the annotation")
        _check_runs(runs, (height, width), where)
        compressed: RLE = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        return compressed
    if isinstance(segmentation, dict):
        return check_rle(segmentation, size_hw, where)
    raise DataError(
        f"{where}: found a segmentation of type {type(segmentation).__name__}, expected a list of polygons or an RLE "
        "dict; repair the annotation"
    )


def _checked_polygons(
    polygons: Sequence[object], size_hw: SizeHW, where: str, shows_pixels: ShowsPixels | None
) -> list[list[float]]:
    """Return the polygons [x0, y0, x1, y1, ...] in pixels, without those of fewer than three points."""
    if not polygons:
        raise DataError(f"{where}: found an empty polygon list, expected at least one polygon; repair the annotation")
    checked = [_checked_polygon(polygon, f"{where}: polygon {index}") for index, polygon in enumerate(polygons)]
    short = [index for index, polygon in enumerate(checked) if len(polygon) < _MIN_POLYGON_NUMBERS]
    if len(short) == len(checked):
        raise DataError(
            f"{where}: polygon 0: found {len(checked[0])} numbers, expected at least {_MIN_POLYGON_NUMBERS} (x, y "
            "pairs of three points) in one polygon; repair the annotation"
        )
    if short:
        message = f"skipped {len(short)} of {len(checked)} polygons, polygon {short[0]} has fewer than three points"
        remark(SHORT_POLYGON, where.partition(": ")[0], where, message)
    kept = [polygon for polygon in checked if len(polygon) >= _MIN_POLYGON_NUMBERS]
    check_pixels([value for polygon in kept for value in polygon], size_hw, where, shows_pixels)
    return kept


def _checked_polygon(polygon: object, where: str) -> list[float]:
    if not isinstance(polygon, list | tuple):
        raise DataError(
            f"{where}: found {shown(polygon)}, expected a list [x0, y0, x1, y1, ...]; wrap a single polygon in a list"
        )
    if len(polygon) % 2:
        raise DataError(
            f"{where}: found {len(polygon)} numbers, expected an even count of at least {_MIN_POLYGON_NUMBERS} "
            "(x, y pairs of three points); repair the annotation"
        )
    for value in polygon:
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _MAX_COORDINATE_PX:
            raise DataError(
                f"{where}: found coordinate {shown(value)}, expected a finite number within {_MAX_COORDINATE_PX} px; "
                "repair the annotation"
            )
    return list(polygon)


def _checked_size(rle: dict[str, Any], size_hw: SizeHW | None, where: str) -> SizeHW:
    """Return the size stated by an RLE, which must be that of its image."""
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(s) is int and s > 0 for s in size):
        raise DataError(f"{where}: found RLE size {shown(size)}, expected [height, width]; repair the annotation")
    if size_hw is not None and tuple(size) != tuple(size_hw):
        raise DataError(
            f"{where}: found RLE size {shown(list(size))}, expected {list(size_hw)} (height, width of the image); "
            "the mask belongs to another image or has its sides swapped"
        )
    return size[0], size[1]


def _check_runs(runs: list[int], size_hw: SizeHW, where: str) -> None:
    num_pixels = size_hw[0] * size_hw[1]
    if min(runs, default=0) < 0 or sum(runs) != num_pixels:
        raise DataError(
            f"{where}: found RLE runs that cover {sum(runs)} pixels (shortest run {min(runs, default=0)}), expected "
            f"{num_pixels} = {size_hw[0]} x {size_hw[1]}; the counts were cut or belong to another image"
        )


def _run_lengths(counts: bytes) -> list[int] | None:
    """Return the run lengths of COCO's compressed counts, None if the bytes are invalid.

    Format: each run is written in base-32 digits, lowest first, one per byte as 48 + digit, plus 32 if more digits
    follow. Bit 16 of the last digit is the sign. From the fourth run on, the number is the difference to the run two
    before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        digit = byte - 48
        if not 0 <= digit < 64 or shift > 35:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs if shift == 0 else None

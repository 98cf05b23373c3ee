"""An `instances.json` gone through record by record, without stopping at a wrong one.

Place in the flow: `refer_files.py` checks the refs against what this returns. Every record's fields, sizes and polygon
coordinates are looked at; masks are decoded only for the chosen annotations, since a file holds up to 200,000.

Example: {"id": 10, "image_id": 1, "segmentation": {"size": [640, 480], "counts": "..."}} for an image of (480, 640) is
"mask size: found [640, 480], expected [480, 640]".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixel_sail.data.checking.findings import Findings, Kind, Share
from pixel_sail.data.masks import decode_segmentation
from pixel_sail.data.records import Records, open_records
from pixel_sail.types import DataError, SizeHW

OUTSIDE_TOLERANCE_PX = 1.0
"""Annotators draw up to the border; a point further out than this belongs to another image or is damaged."""


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One photo as the file states it."""

    file_name: str | None
    size_hw: SizeHW | None


@dataclass(kw_only=True)
class Instances:
    """What is known of a file after it was gone through; wrong records are left out of the tables."""

    is_read: bool = False
    images: dict[int, ImageRow] = field(default_factory=dict)
    image_of_annotation: dict[int, int] = field(default_factory=dict)
    masks: Share = field(default_factory=Share)
    empty_masks: int = 0


def read_instances(
    path: Path, findings: Findings, *, is_chosen: Callable[[int], bool], is_used: Callable[[int], bool], progress: bool
) -> Instances:
    """Return the images and annotations of a COCO file; everything wrong goes to `findings`.

    `is_chosen` says for an annotation id whether its mask is decoded, `is_used` whether any ref needs it.
    """
    result = Instances()
    try:
        image_rows, annotation_rows = open_records(path, "images"), open_records(path, "annotations")
    except DataError as error:
        findings.trouble(Kind.UNREADABLE_FILE, path, str(error).removeprefix(f"{path}: "))
        return result
    result.is_read = True
    folder = path.parent.name
    for number in tqdm(range(len(image_rows)), desc=f"{folder}: images", disable=not progress, leave=False):
        row = _parse(image_rows, number, Kind.IMAGE_RECORD, findings)
        if row is not None:
            _read_image(row, f"{path}: images[{number}]", result, findings)
    for number in tqdm(range(len(annotation_rows)), desc=f"{folder}: annotations", disable=not progress, leave=False):
        row = _parse(annotation_rows, number, Kind.ANNOTATION_RECORD, findings)
        if row is not None:
            _read_annotation(row, f"{path}: annotations[{number}]", result, findings, is_chosen, is_used)
    return result


def _parse(rows: Records, number: int, kind: Kind, findings: Findings) -> dict[str, Any] | None:
    """Return one record, None (and trouble) when it is not a JSON object."""
    try:
        row = rows[number]
    except DataError as error:
        findings.trouble(kind, f"{rows.where}[{number}]", str(error))
        return None
    if not isinstance(row, dict):
        findings.trouble(
            kind, f"{rows.where}[{number}]", f"found {str(row)[:60]!r}, expected an object; repair the file"
        )
        return None
    return row


def _read_image(row: dict[str, Any], where: str, result: Instances, findings: Findings) -> None:
    image_id = row.get("id")
    if type(image_id) is not int:
        findings.trouble(Kind.IMAGE_RECORD, where, f"found id {image_id!r}, expected an integer; repair the file")
        return
    where = f"{where}, id {image_id}"
    if image_id in result.images:
        findings.trouble(Kind.DUPLICATE_IMAGE_ID, where, "found the id again, expected each once; repair the file")
        return
    file_name, height, width = (row.get(key) for key in ("file_name", "height", "width"))
    if not isinstance(file_name, str) or not file_name:
        findings.trouble(Kind.IMAGE_RECORD, where, f"found file_name {file_name!r}, expected a name; repair the file")
        file_name = None
    size_hw = None
    if type(height) is int and type(width) is int and height > 0 and width > 0:
        size_hw = (height, width)
    else:
        found = f"found height {height!r} and width {width!r}"
        findings.trouble(Kind.IMAGE_RECORD, where, f"{found}, expected positive integers; repair the file")
    result.images[image_id] = ImageRow(file_name=file_name, size_hw=size_hw)


def _read_annotation(
    row: dict[str, Any],
    where: str,
    result: Instances,
    findings: Findings,
    is_chosen: Callable[[int], bool],
    is_used: Callable[[int], bool],
) -> None:
    annotation_id, image_id = row.get("id"), row.get("image_id")
    if type(annotation_id) is not int or type(image_id) is not int:
        found = f"found id {annotation_id!r} and image_id {image_id!r}"
        findings.trouble(Kind.ANNOTATION_RECORD, where, f"{found}, expected integers; repair the file")
        return
    where = f"{where}, id {annotation_id}"
    if annotation_id in result.image_of_annotation:
        findings.trouble(Kind.DUPLICATE_ANNOTATION_ID, where, "found the id again, expected each once; repair the file")
        return
    result.image_of_annotation[annotation_id] = image_id
    image = result.images.get(image_id)
    if image is None:
        if is_used(annotation_id):
            found = f"found image_id {image_id}"
            findings.trouble(Kind.UNKNOWN_ID, where, f"{found}, expected one of the images; repair the file")
        return
    if image.size_hw is not None:
        _check_mask(row.get("segmentation"), image.size_hw, where, result, findings, is_chosen(annotation_id))


def _check_mask(
    segmentation: object, size_hw: SizeHW, where: str, result: Instances, findings: Findings, is_chosen: bool
) -> None:
    problems = segmentation_problems(segmentation, size_hw)
    for kind, message in problems:
        findings.trouble(kind, where, message)
    is_damaged = any(kind is not Kind.OUTSIDE_IMAGE for kind, _ in problems)
    if is_damaged or not is_chosen:
        # Damaged ones outside the sample are named, but the share is that of the sample.
        result.masks += Share(checked=int(is_chosen))
        return
    try:
        has_pixels = bool(decode_segmentation(segmentation, size_hw, where).any())
    except DataError as error:
        findings.trouble(Kind.BAD_MASK, where, str(error).removeprefix(f"{where}: "))
        result.masks += Share(checked=1)
        return
    if not has_pixels:
        findings.trouble(Kind.EMPTY_MASK, where, "found no pixel in the image, expected at least one; repair the file")
    result.empty_masks += not has_pixels
    result.masks += Share(checked=1, sound=int(has_pixels and not problems))


def segmentation_problems(segmentation: object, size_hw: SizeHW) -> list[tuple[Kind, str]]:
    """Return what is wrong with a segmentation as far as it shows without decoding it."""
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != list(size_hw):
            return [(Kind.MASK_SIZE, f"found size {size!r}, expected {list(size_hw)} (height, width of the image)")]
        return []
    if not isinstance(segmentation, list) or not segmentation:
        return [(Kind.BAD_MASK, f"found {str(segmentation)[:60]}, expected polygons or an RLE; repair the file")]
    problems = []
    for number, polygon in enumerate(segmentation):
        if not _is_polygon(polygon):
            found = f"found polygon {number} = {str(polygon)[:60]}"
            problems.append((Kind.BAD_MASK, f"{found}, expected finite x, y pairs of three points; repair the file"))
        elif (reach := _reach_outside(polygon, size_hw)) > OUTSIDE_TOLERANCE_PX:
            found = f"found polygon {number} {reach:.1f} px outside the image"
            expected = f"expected points within {size_hw} (height, width)"
            problems.append((Kind.OUTSIDE_IMAGE, f"{found}, {expected}; image and annotation do not belong together"))
    return problems


def _is_polygon(polygon: object) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in polygon)


def _reach_outside(polygon: Sequence[float], size_hw: SizeHW) -> float:
    """Return how far the outermost point lies beyond the image, in pixels; 0 or less when all are inside."""
    xs, ys = polygon[::2], polygon[1::2]
    return max(-min(xs), max(xs) - size_hw[1], -min(ys), max(ys) - size_hw[0])

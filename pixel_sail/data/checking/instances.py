"""Checks an `instances.json` record by record, without stopping at a wrong one.

`refer_files.py` checks the refs against the result. The fields, sizes and polygon coordinates of all records are
checked; masks are decoded only for selected annotations, since a file has up to 200,000.

Example: {"id": 10, "image_id": 1, "segmentation": {"size": [640, 480], "counts": "..."}} for an image of (480, 640) is
"mask size: found [640, 480], expected [480, 640]".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixel_sail.data.checking.areas import AreaCheck
from pixel_sail.data.checking.findings import FindingKind, Findings, SoundFraction
from pixel_sail.data.coordinates import check_pixels, shows_pixels
from pixel_sail.data.masks import decode_segmentation
from pixel_sail.data.records import Records, open_records
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW

OUTSIDE_TOLERANCE_PX = 1.0
"""Annotators mark up to the border; a point further out belongs to another image or is damaged."""


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One image as stated by the file."""

    file_name: str | None
    size_hw: SizeHW | None


@dataclass(kw_only=True)
class Instances:
    """The valid records of a checked file."""

    is_read: bool = False
    images: dict[int, ImageRow] = field(default_factory=dict)
    image_of_annotation: dict[int, int] = field(default_factory=dict)
    masks: SoundFraction = field(default_factory=SoundFraction)
    empty_masks: int = 0
    in_pixels: Callable[[], bool] | None = None
    """Returns whether the file has coordinates above 1."""
    areas: AreaCheck = field(default_factory=AreaCheck)


def read_instances(
    path: Path, findings: Findings, *, is_chosen: Callable[[int], bool], is_used: Callable[[int], bool], progress: bool
) -> Instances:
    """Return the images and annotations of a COCO file; every defect is added to `findings`.

    `is_chosen` returns whether the mask of an annotation id is decoded, `is_used` whether any ref refers to it.
    """
    result = Instances()
    try:
        image_rows, annotation_rows = open_records(path, "images"), open_records(path, "annotations")
    except DataError as error:
        findings.trouble(FindingKind.UNREADABLE_FILE, path, str(error).removeprefix(f"{path}: "))
        return result
    result.is_read = True
    result.in_pixels = partial(shows_pixels, annotation_rows)
    folder = path.parent.name
    for number in tqdm(range(len(image_rows)), desc=f"{folder}: images", disable=not progress, leave=False):
        row = _parse(image_rows, number, FindingKind.IMAGE_RECORD, findings)
        if row is not None:
            _read_image(row, f"{path}: images[{number}]", result, findings)
    for number in tqdm(range(len(annotation_rows)), desc=f"{folder}: annotations", disable=not progress, leave=False):
        row = _parse(annotation_rows, number, FindingKind.ANNOTATION_RECORD, findings)
        if row is not None:
            _read_annotation(row, f"{path}: annotations[{number}]", result, findings, is_chosen, is_used)
    result.areas.report(path, findings)
    return result


def _parse(rows: Records, number: int, kind: FindingKind, findings: Findings) -> dict[str, Any] | None:
    """Return one record, None (and a trouble) if it is not a JSON object."""
    try:
        row = rows[number]
    except DataError as error:
        findings.trouble(kind, f"{rows.where}[{number}]", str(error))
        return None
    if not isinstance(row, dict):
        findings.trouble(kind, f"{rows.where}[{number}]", f"found {shown(row)}, expected an object; repair the file")
        return None
    return row


def _read_image(row: dict[str, Any], where: str, result: Instances, findings: Findings) -> None:
    image_id = row.get("id")
    if type(image_id) is not int:
        findings.trouble(
            FindingKind.IMAGE_RECORD, where, f"found id {shown(image_id)}, expected an integer; repair the file"
        )
        return
    where = f"{where}, id {image_id}"
    if image_id in result.images:
        findings.trouble(
            FindingKind.DUPLICATE_IMAGE_ID, where, "found the id again, expected each once; repair the file"
        )
        return
    file_name, height, width = (row.get(key) for key in ("file_name", "height", "width"))
    if not isinstance(file_name, str) or not file_name:
        findings.trouble(
            FindingKind.IMAGE_RECORD, where, f"found file_name {shown(file_name)}, expected a name; repair the file"
        )
        file_name = None
    size_hw = None
    if type(height) is int and type(width) is int and height > 0 and width > 0:
        size_hw = (height, width)
    else:
        found = f"found height {shown(height)} and width {shown(width)}"
        findings.trouble(FindingKind.IMAGE_RECORD, where, f"{found}, expected positive integers; repair the file")
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
        found = f"found id {shown(annotation_id)} and image_id {shown(image_id)}"
        findings.trouble(FindingKind.ANNOTATION_RECORD, where, f"{found}, expected integers; repair the file")
        return
    where = f"{where}, id {annotation_id}"
    if annotation_id in result.image_of_annotation:
        findings.trouble(
            FindingKind.DUPLICATE_ANNOTATION_ID, where, "found the id again, expected each once; repair the file"
        )
        return
    result.image_of_annotation[annotation_id] = image_id
    image = result.images.get(image_id)
    if image is None:
        if is_used(annotation_id):
            found = f"found image_id {image_id}"
            findings.trouble(FindingKind.UNKNOWN_ID, where, f"{found}, expected one of the images; repair the file")
        return
    if image.size_hw is not None:
        _check_mask(row, image.size_hw, where, result, findings, is_chosen(annotation_id))


def _check_mask(
    row: dict[str, Any], size_hw: SizeHW, where: str, result: Instances, findings: Findings, is_chosen: bool
) -> None:
    segmentation = row.get("segmentation")
    problems = segmentation_problems(segmentation, size_hw, result.in_pixels)
    for kind, message in problems:
        findings.trouble(kind, where, message)
    if short := short_polygons(segmentation):
        found = f"found {len(short)} polygons with fewer than three points, the first is polygon {short[0]}"
        findings.note(FindingKind.SHORT_POLYGON, where, f"{found}; they are skipped, the others painted")
    is_damaged = any(kind is not FindingKind.OUTSIDE_IMAGE for kind, _ in problems)
    if is_damaged or not is_chosen:
        # Damaged ones outside the sample are reported, but the fraction is that of the sample.
        result.masks += SoundFraction(checked=int(is_chosen))
        return
    try:
        with collect_remarks():  # A short polygon was noted above.
            num_pixels = int(decode_segmentation(segmentation, size_hw, where, result.in_pixels).sum())
    except DataError as error:
        findings.trouble(FindingKind.BAD_MASK, where, str(error).removeprefix(f"{where}: "))
        result.masks += SoundFraction(checked=1)
        return
    has_pixels = num_pixels > 0
    result.areas.add(num_pixels, row, where)
    if not has_pixels:
        findings.trouble(
            FindingKind.EMPTY_MASK, where, "found no pixel in the image, expected at least one; repair the file"
        )
    result.empty_masks += not has_pixels
    result.masks += SoundFraction(checked=1, sound=int(has_pixels and not problems))


def segmentation_problems(
    segmentation: object, size_hw: SizeHW, in_pixels: Callable[[], bool] | None = None
) -> list[tuple[FindingKind, str]]:
    """Return the defects of a segmentation that can be detected without decoding it."""
    if isinstance(segmentation, list) and segmentation and all(isinstance(part, dict) for part in segmentation):
        return [problem for part in segmentation for problem in segmentation_problems(part, size_hw)]
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != list(size_hw):
            return [
                (
                    FindingKind.MASK_SIZE,
                    f"found size {shown(size)}, expected {list(size_hw)} (height, width of the image)",
                )
            ]
        return []
    if not isinstance(segmentation, list) or not segmentation:
        return [(FindingKind.BAD_MASK, f"found {shown(segmentation)}, expected polygons or an RLE; repair the file")]
    problems = []
    short = short_polygons(segmentation)
    kept = [polygon for number, polygon in enumerate(segmentation) if number not in short]
    if all(_is_polygon(polygon) for polygon in kept):
        try:
            check_pixels([value for polygon in kept for value in polygon], size_hw, "", in_pixels)
        except DataError as error:
            return [(FindingKind.FRACTIONS, str(error).removeprefix(": "))]
    for number, polygon in enumerate(segmentation):
        if number in short:
            continue
        if not _is_polygon(polygon):
            found = f"found polygon {number} = {shown(polygon)}"
            problems.append(
                (FindingKind.BAD_MASK, f"{found}, expected finite x, y pairs of three points; repair the file")
            )
        elif (reach := _reach_outside(polygon, size_hw)) > OUTSIDE_TOLERANCE_PX:
            found = f"found polygon {number} {reach:.1f} px outside the image"
            expected = f"expected points within {size_hw} (height, width)"
            problems.append(
                (FindingKind.OUTSIDE_IMAGE, f"{found}, {expected}; image and annotation do not belong together")
            )
    return problems


def short_polygons(segmentation: object) -> list[int]:
    """Return which polygons have fewer than three points while another has them; the reader skips them."""
    parts = segmentation if isinstance(segmentation, list) else []
    if not any(isinstance(part, list) and len(part) >= 6 for part in parts):
        return []
    return [number for number, part in enumerate(parts) if _is_even_list(part) and len(part) < 6]


def _is_even_list(polygon: object) -> bool:
    if not isinstance(polygon, list) or len(polygon) % 2:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in polygon)


def _is_polygon(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and _is_even_list(polygon)


def _reach_outside(polygon: Sequence[float], size_hw: SizeHW) -> float:
    """Return how far the outermost point is outside the image, in pixels; 0 or less if all are inside."""
    xs, ys = polygon[::2], polygon[1::2]
    return max(-min(xs), max(xs) - size_hw[1], -min(ys), max(ys) - size_hw[0])

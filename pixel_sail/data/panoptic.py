"""Reads COCO panoptic annotations: a JSON list of segments per image, and a PNG whose colors are segment ids.

Used by the sources `coco_panoptic`, `coco_semantic`, `coco_vp` and, since Pix2Cap-COCO has the same format with a
description per segment, `pix2cap_seg` and `pix2cap_vp`.

One record of `annotations`. The pixels of its segment have the color (77, 85, 127) in the PNG, since 77 + 256 * 85 +
256**2 * 127 = 8345037. Black pixels are unlabeled:

    {"image_id": 9, "file_name": "000000000009.png",
     "segments_info": [{"id": 8345037, "category_id": 51, "iscrowd": 0, "bbox": [0, 14, 434, 374], "area": 24315}]}

Records are read one at a time; records and masks are not cached.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.fingerprint import add_to_fingerprint
from pixel_sail.data.images import DECODING_ERRORS, existing_file, image_file, open_image, pillow_reason
from pixel_sail.data.records import open_records
from pixel_sail.data.remarks import STATED_AREA, areas_differ, remark
from pixel_sail.files import sha256
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, SizeHW

logger = logging.getLogger(__name__)

ANNOTATION_FOLDERS = ("Annotations/annotations", "annotations")
"""Folders below the COCO folder into which `annotations_trainval2017.zip` and its panoptic counterpart are unpacked."""

PNG_FOLDERS = ("Images", ".", "images")
"""Folders below the COCO folder that contain train2017 and val2017."""

UNLABELLED = 0
"""Id of the pixels without a segment."""

_RESERVED_TEXT = ("[SEG]", "<Prompt", "{region")
"""Strings that a description must not contain, as they would become a mask or a prompt later."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One entry of `segments_info`."""

    segment_id: int
    category_id: int
    is_crowd: bool
    """Several objects annotated as one group."""
    description: str
    """Pix2Cap's text, "" without one."""
    area: float | None = None
    """In pixels, as stated by the file."""


@dataclass(frozen=True, kw_only=True)
class PanopticImage:
    """One checked record."""

    where: str
    """File and record, for error messages."""
    image_id: int
    image_hw: SizeHW
    image_path: Path
    png_path: Path
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class Category:
    """One entry of `categories`."""

    name: str
    is_thing: bool


class PanopticFile:
    """The records of one panoptic JSON file and the folders of their PNGs and images."""

    def __init__(self, file: Path, *, png_dir: Path, image_dir: Path, lists_all: bool = True) -> None:
        """Open the file. `lists_all`: every colored pixel must belong to a listed segment. Raises: DataError."""
        self.file = file
        self.png_dir = png_dir
        self.image_dir = image_dir
        self.lists_all = lists_all
        self._annotations = open_records(file, "annotations")
        self._images = open_records(file, "images")
        self._image_numbers = self._images.lookup("id")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._annotations)

    def usable(
        self, has_content: Callable[[Sequence[Segment]], bool], *, source: str, content: str
    ) -> NDArray[np.int64]:
        """Return the numbers of the records whose segments have content; log how many have none.

        A malformed record is kept, so that reading it raises the error. Raises: DataError if an image has two records.
        """
        numbers: list[int] = []
        image_ids: Counter[int] = Counter()
        for number in range(len(self)):
            try:
                image_id, _, segments = self._record(number)
            except DataError:
                numbers.append(number)
                continue
            image_ids[image_id] += 1
            if has_content(segments):
                numbers.append(number)
        repeated = sorted(image_id for image_id, count in image_ids.items() if count > 1)
        if repeated:
            raise DataError(
                f"{self._annotations.where}: found {len(repeated)} images with several records, for example image_id "
                f"{repeated[0]}, expected one record per image; repair the file"
            )
        if len(numbers) < len(self):
            logger.warning(
                "source %s: skipped %d of %d images without %s", source, len(self) - len(numbers), len(self), content
            )
        return np.array(numbers, dtype=np.int64)

    def image(self, number: int) -> PanopticImage:
        """Return one record. Raises: DataError with the file and the record if it is malformed."""
        image_id, file_name, segments = self._record(number)
        where = f"{self._annotations.where}[{number}] (image_id {image_id})"
        stated = self._images[self._image_numbers.one(image_id)]
        height, width = (_integer(stated, side, f"{self._images.where}: id {image_id}") for side in ("height", "width"))
        if min(height, width) < 1:
            raise DataError(f"{where}: found an image of {height} x {width}, expected positive sides; repair the file")
        return PanopticImage(
            where=where,
            image_id=image_id,
            image_hw=(height, width),
            image_path=self._image_path(file_name, stated.get("file_name")),
            png_path=self.png_dir / file_name,
            segments=segments,
        )

    def masks(self, image: PanopticImage) -> dict[int, BoolMask]:
        """Return the mask [H, W] of every segment by segment id; masks do not overlap.

        Raises: DataError if the PNG has another size than the file states, lacks a listed segment, or (`lists_all`) has
        an unlisted segment.
        """
        ids_HW = read_segment_ids(image.png_path, image.image_hw, image.where)
        masks: dict[int, BoolMask] = {}
        unlisted: BoolMask = ids_HW != UNLABELLED
        for segment in image.segments:
            mask: BoolMask = ids_HW == segment.segment_id
            if not mask.any():
                raise DataError(
                    f"{image.where}: found no pixel of segment {segment.segment_id} in {image.png_path}, expected "
                    "every listed segment to have some; file and PNG folder do not belong together"
                )
            masks[segment.segment_id] = mask
            unlisted &= ~mask
            self._compare_area(segment, int(mask.sum()), image.where)
        if self.lists_all and unlisted.any():
            raise DataError(
                f"{image.where}: found {int(unlisted.sum())} pixels of unlisted segments (one is "
                f"{int(ids_HW[unlisted][0])}) in {image.png_path}, expected only the {len(masks)} listed ones; file "
                "and PNG folder do not belong together"
            )
        return masks

    def _compare_area(self, segment: Segment, num_pixels: int, where: str) -> None:
        """Remark that the area in the PNG differs from the stated one: one of them was changed without the other."""
        if segment.area is not None and areas_differ(num_pixels, segment.area):
            found = f"segment {segment.segment_id} has {num_pixels} pixels in the PNG, the file states {segment.area:g}"
            remark(STATED_AREA, self._annotations.where, where, found)

    def _record(self, number: int) -> tuple[int, str, tuple[Segment, ...]]:
        """Return image id, PNG name and segments of one record."""
        where = f"{self._annotations.where}[{number}]"
        record = self._annotations[number]
        image_id = _integer(record, "image_id", where)
        file_name, infos = record.get("file_name"), record.get("segments_info")
        if not isinstance(file_name, str) or not file_name.endswith(".png"):
            raise DataError(
                f"{where}: found file_name = {shown(file_name)}, expected the name of a PNG; repair the file"
            )
        if not isinstance(infos, list):
            raise DataError(f"{where}: found segments_info = {shown(infos)}, expected a list; repair the file")
        segments = tuple(_segment(info, f"{where}: segments_info[{i}]") for i, info in enumerate(infos))
        if len({segment.segment_id for segment in segments}) < len(segments):
            raise DataError(f"{where}: found a segment id twice, expected different ids; repair the file")
        return image_id, file_name, segments

    def _image_path(self, png_name: str, stated_name: object) -> Path:
        """Return the image path: named like the PNG (release), or, if only that exists, as in `images`."""
        path = image_file(self.image_dir, str(Path(png_name).with_suffix(".jpg")))
        if isinstance(stated_name, str) and not os.path.isfile(path):
            stated = image_file(self.image_dir, stated_name)
            return stated if os.path.isfile(stated) else path
        return path


def open_panoptic(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    lists_all: bool = True,
) -> PanopticFile:
    """Return the panoptic file of a COCO split, for example `train2017`, in any of the usual layouts.

    root: the COCO folder, with `Annotations/annotations/panoptic_{split}.json` and `Images/{split}/`, or with
    `annotations/panoptic_{split}.json` and `{split}/`; the PNGs are in `panoptic_{split}/` next to the JSON.
    annotations, png_dir, image_dir: override these paths. Images may be missing until one is opened. Raises: DataError.
    """
    root = Path(root)
    jsons = [root / folder / f"panoptic_{split}.json" for folder in ANNOTATION_FOLDERS]
    pngs = [root / folder / f"panoptic_{split}" for folder in ANNOTATION_FOLDERS]
    folders = [root / folder / split for folder in PNG_FOLDERS]
    file = Path(annotations) if annotations is not None else next(filter(Path.is_file, jsons), None)
    folder = Path(png_dir) if png_dir is not None else next(filter(Path.is_dir, pngs), None)
    if file is None:
        raise DataError(f"found none of {[str(path) for path in jsons]}, expected one; unpack it or correct root")
    if folder is None or not folder.is_dir():
        tried = [str(path) for path in ([folder] if folder is not None else pngs)]
        raise DataError(f"found none of {tried}, expected the folder of panoptic PNGs; unpack it or correct the path")
    found_dir = Path(image_dir) if image_dir is not None else next(filter(Path.is_dir, folders), folders[0])
    return PanopticFile(file, png_dir=folder, image_dir=found_dir, lists_all=lists_all)


def load_categories(file: Path) -> dict[int, Category]:
    """Return the categories of a panoptic file by id. Raises: DataError."""
    result: dict[int, Category] = {}
    for index, record in enumerate(open_records(file, "categories")):
        where = f"{file}: categories[{index}]"
        category_id, is_thing = _integer(record, "id", where), _integer(record, "isthing", where)
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: found name = {shown(name)}, expected text; repair the file")
        if category_id in result or is_thing not in (0, 1):
            raise DataError(f"{where}: found id {category_id}, isthing {is_thing}, expected a new id and 0 or 1")
        result[category_id] = Category(name=name, is_thing=bool(is_thing))
    return result


def load_class_file(path: str | Path, known: Sequence[int]) -> dict[int, str]:
    """Return the name of every known category from a text file of lines `id:name,synonym,...`; the first name is used.

    Lines may have other ids too, since the published lists cover all of COCO's. Raises: DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: found no such file, expected lines id:name,synonym,...; correct class_file")
    add_to_fingerprint(path, sha256(path))
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        head, colon, rest = line.partition(":")
        if line.strip() and (not colon or not head.strip().isdecimal() or int(head) in names):
            raise DataError(
                f"{path}: line {number}: found {shown(line)}, expected id:name,synonym,... with an id of its own"
            )
        if line.strip():
            names[int(head)] = rest.split(",")[0].strip()
    absent = [category_id for category_id in known if names.get(category_id, "") in ("", "invalid_class_id")]
    if absent:
        raise DataError(f"{path}: found no name for the categories {absent}, expected one for each; add their lines")
    return {category_id: names[category_id] for category_id in known}


def segments_by_category(image: PanopticImage, known: Sequence[int]) -> dict[int, list[Segment]]:
    """Return the segments of every category, by ascending id. Raises: DataError for an unknown category."""
    groups: dict[int, list[Segment]] = {}
    for segment in sorted(image.segments, key=lambda segment: segment.category_id):
        if segment.category_id not in known:
            raise DataError(
                f"{image.where}: found category_id {segment.category_id} of segment {segment.segment_id}, expected "
                f"one of the {len(known)} categories; the class list belongs to another file"
            )
        groups.setdefault(segment.category_id, []).append(segment)
    return groups


def read_segment_ids(path: Path, size_hw: SizeHW, where: str) -> NDArray[np.int32]:
    """Return the segment id of every pixel [H, W] of a panoptic PNG. Raises: DataError."""
    path = existing_file(path)
    try:
        with open_image(path) as opened:
            opened.load()
            mode, pixels = opened.mode, np.asarray(opened)
    except FileNotFoundError:
        raise DataError(f"{where}: {path}: found no such PNG, expected it; unpack the panoptic PNGs") from None
    except DECODING_ERRORS as error:
        raise DataError(f"{where}: {path}: cannot be decoded ({pillow_reason(error)}); replace the file") from error
    if mode != "RGB":
        raise DataError(f"{where}: {path}: found a PNG of mode {mode}, expected 8-bit RGB; use the panoptic PNGs")
    rgb = pixels.astype(np.int32)
    if rgb.shape[:2] != tuple(size_hw):
        raise DataError(
            f"{where}: {path}: found a PNG of {rgb.shape[:2]} (height, width), expected {tuple(size_hw)} as the file "
            "states; file and PNG folder do not belong together"
        )
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def _segment(info: object, where: str) -> Segment:
    segment_id = _integer(info, "id", where)
    assert isinstance(info, dict), "_integer accepts nothing else"
    is_crowd, description, area = info.get("iscrowd", 0), info.get("description", ""), info.get("area")
    if not 0 < segment_id < 256**3:
        raise DataError(f"{where}: found id {segment_id}, expected 1 .. {256**3 - 1}, a colour; repair the file")
    if is_crowd not in (0, 1):
        raise DataError(f"{where}: found iscrowd = {shown(is_crowd)}, expected 0 or 1; repair the file")
    if not isinstance(description, str):
        raise DataError(f"{where}: found description = {shown(description)}, expected text; repair the file")
    reserved = [text for text in _RESERVED_TEXT if text in description]
    if reserved:
        raise DataError(f"{where}: found {reserved[0]!r} in a description, expected plain text; repair the file")
    return Segment(
        segment_id=segment_id,
        category_id=_integer(info, "category_id", where),
        is_crowd=bool(is_crowd),
        description=description.strip(),
        area=area if isinstance(area, int | float) else None,
    )


def _integer(record: object, field: str, where: str) -> int:
    value: Any = record.get(field) if isinstance(record, dict) else None
    if type(value) is not int:
        raise DataError(f"{where}: found {field} = {shown(value)}, expected an integer; repair the file")
    return value

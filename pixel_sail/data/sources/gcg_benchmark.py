"""Reads the validation and test files of grounded caption generation, as items to score.

Two COCO-style files per split become `GroundedCaption`s. From `val_gcg_coco_caption_gt.json`:

    {"images": [{"id": "sa_10010541"}],
     "annotations": [{"id": 1, "image_id": "sa_10010541", "caption": "A man and a cup.", "labels": ["A man", "a cup"]}]}

From `val_gcg_coco_mask_gt.json`; the masks of an image are in the order of its labels:

    {"images": [{"id": "sa_10010541", "height": 1500, "width": 2250}],
     "annotations": [{"id": 1, "image_id": "sa_10010541", "category_id": 1, "segmentation": {"size": [...], ...}}]}

The file of an image is `<id>.jpg`. If the numbers of labels and masks of an image differ, the released scorer prints
the exception and continues with too few. Here such a file is rejected, unless `refuse_unpaired=false`.
"""

import logging
from collections import defaultdict
from functools import partial
from pathlib import Path

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.fields import ImageFolders, field, folders, stated_hw, strings
from pixel_sail.data.image_sizes import stored_hw
from pixel_sail.data.images import find_image
from pixel_sail.data.masks import merge_to_rle
from pixel_sail.data.records import Records, open_records
from pixel_sail.texts import shown
from pixel_sail.types import DataError, GroundedCaption, SizeHW

logger = logging.getLogger(__name__)


def load(
    *, root: str | Path, split: str, image_dir: ImageFolders, refuse_unpaired: bool = True
) -> list[GroundedCaption]:
    """Return every image of a split, in caption file order.

    root: folder of the two files. split: val or test. image_dir: one image folder, or several to search.
    refuse_unpaired: False keeps images whose numbers of phrases and masks differ, and logs how many. The image size is
    read from the image record, else from its masks, else from the image file. Raises: DataError with file and image.
    """
    captions_file = Path(root) / f"{split}_gcg_coco_caption_gt.json"
    masks_file = Path(root) / f"{split}_gcg_coco_mask_gt.json"
    captions, masks = open_records(captions_file, "annotations"), open_records(masks_file, "annotations")
    captions_of, masks_of = _numbers_by_image(captions), _numbers_by_image(masks)
    sizes = _stated_sizes(open_records(masks_file, "images"))
    in_pixels = partial(shows_pixels, masks)
    items = []
    unpaired: list[str] = []
    for number, image in enumerate(open_records(captions_file, "images")):
        image_id = _image_id(image, "id", f"{captions_file}: images[{number}]")
        where = f"{captions_file}: image {image_id}"
        written = [captions[i] for i in captions_of.pop(image_id, ())]
        if not written:
            raise DataError(f"{where}: found no caption, expected one; download the file again")
        segmentations = [masks[i].get("segmentation") for i in masks_of.pop(image_id, ())]
        path = find_image(folders(image_dir), f"{image_id}.jpg")
        image_hw = sizes.get(image_id) or stated_hw(image, where) or _size_of_first(segmentations)
        image_hw = image_hw if image_hw is not None else stored_hw(path, where)
        phrases = strings(written[0], "labels", where)
        if len(phrases) != len(segmentations):
            unpaired.append(f"{image_id} ({len(phrases)} phrases, {len(segmentations)} masks)")
        items.append(
            GroundedCaption(
                image_id=image_id,
                image_path=path,
                image_hw=image_hw,
                captions=tuple(field(record, "caption", str, where) for record in written),
                phrases=tuple(phrases),
                masks=tuple(
                    merge_to_rle([segmentation], image_hw, f"{masks_file}: image {image_id}, mask {i}", in_pixels)
                    for i, segmentation in enumerate(segmentations)
                ),
            )
        )
    _check_rest(captions_of, captions_file, captions_file)
    _check_rest(masks_of, masks_file, captions_file)
    _report_unpaired(unpaired, len(items), masks_file, refuse=refuse_unpaired)
    return items


def _numbers_by_image(records: Records) -> dict[str, list[int]]:
    numbers = defaultdict(list)
    for number, record in enumerate(records):
        numbers[_image_id(record, "image_id", f"{records.where}[{number}]")].append(number)
    return dict(numbers)


def _stated_sizes(images: Records) -> dict[str, SizeHW | None]:
    sizes = {}
    for number, image in enumerate(images):
        where = f"{images.where}[{number}]"
        image_hw = stated_hw(image, where)
        sizes[_image_id(image, "id", where)] = image_hw
    return sizes


def _image_id(record: object, name: str, where: str) -> str:
    """Return an id as text; files have names like sa_10010541, but numbers are accepted."""
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not int and not isinstance(value, str):
        raise DataError(f"{where}: found {name} = {shown(value)}, expected a text or a number; download the file again")
    return str(value)


def _size_of_first(segmentations: list[object]) -> SizeHW | None:
    """Return the size stated by the first mask; the others are compared when they are read."""
    first = segmentations[0] if segmentations else None
    size = first.get("size") if isinstance(first, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        return size[0], size[1]
    return None


def _check_rest(rest: dict[str, list[int]], file: Path, captions_file: Path) -> None:
    if rest:
        raise DataError(
            f"{file}: found annotations of {len(rest)} images, such as {next(iter(rest))}, that are not among the "
            f"images of {captions_file}; download both files of one split again"
        )


def _report_unpaired(unpaired: list[str], num_images: int, file: Path, *, refuse: bool) -> None:
    if not unpaired:
        return
    found = f"{len(unpaired)} of {num_images} images whose numbers of phrases and masks differ, first {unpaired[0]}"
    if refuse:
        raise DataError(
            f"{file}: found {found}; expected a mask for every phrase. Download both files of one split, or set "
            "refuse_unpaired=false to score them unchanged"
        )
    logger.warning("%s: kept %s", file, found)

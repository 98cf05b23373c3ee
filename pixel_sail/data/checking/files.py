"""Checks single files: size, hash, and whether an image matches its annotations.

`refer_files.py` and `items.py` check files with these functions. Example:

    check_image(Path("COCO_9.jpg"), (480, 640), findings)  ->  False, and findings hold "unreadable image"
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixel_sail.data.checking.findings import FileFact, FindingKind, Findings
from pixel_sail.data.checking.known import expected_images, expected_megabytes
from pixel_sail.data.images import existing_file, load_image
from pixel_sail.files import is_hidden, sha256
from pixel_sail.types import DataError, SizeHW

SIZE_TOLERANCE = 0.02
"""Published sizes are rounded, in megabytes of either 10**6 or 2**20 bytes; a match of either is accepted."""

ABSENT_IMAGE = "found no such file, expected an image; unpack the images again"
ABSENT_IMAGES = "found no such folder, expected images; see what to download"
ANNOTATION_SUFFIXES = (".json", ".jsonl", ".p", ".csv", ".txt", ".parquet")


def file_fact(path: Path, findings: Findings) -> FileFact | None:
    """Return size and SHA-256 of a file, None (and a trouble) if it is missing; note an unexpected size."""
    if not path.is_file():
        findings.trouble(
            FindingKind.MISSING_FILE, path, "found no such file, expected annotations; see what to download"
        )
        return None
    num_bytes = path.stat().st_size
    known = expected_megabytes(path.name)
    if known is not None:
        readings = (num_bytes / 1e6, num_bytes / 2**20)
        if all(abs(reading / known - 1) > SIZE_TOLERANCE for reading in readings):
            findings.note(
                FindingKind.FILE_SIZE,
                path,
                f"found {readings[0]:.1f} MB, published are {known} MB; a part or another release",
            )
    return FileFact(path=str(path), num_bytes=num_bytes, sha256=sha256(path))


def check_image(path: Path, expected_hw: SizeHW | None, findings: Findings) -> bool:
    """Return whether an image can be decoded completely and has the stated size; report what is wrong."""
    path = existing_file(path)
    if not os.path.isfile(path):
        findings.trouble(FindingKind.MISSING_IMAGE, path, ABSENT_IMAGE)
        return False
    try:
        image = load_image(path, where="image")
    except DataError as error:
        findings.trouble(FindingKind.UNREADABLE_IMAGE, path, str(error).removeprefix(f"image: {path}: "))
        return False
    if expected_hw is None or (image.height, image.width) == tuple(expected_hw):
        return True
    try:
        # Annotations may count pixels as stored, before the EXIF orientation is applied.
        load_image(path, where="image", expected_hw=expected_hw)
    except DataError as error:
        findings.trouble(FindingKind.IMAGE_SIZE, path, str(error).removeprefix(f"image: {path}: "))
        return False
    return True


def annotation_files(item: object, depth: int = 4) -> list[Path]:
    """Return the annotation files that a source refers to, itself or through objects of this package."""
    found: dict[Path, None] = {}
    for value in vars(item).values() if hasattr(item, "__dict__") else ():
        if isinstance(value, Path):
            if value.suffix in ANNOTATION_SUFFIXES and value.is_file():
                found[value] = None
        elif depth and type(value).__module__.startswith("pixel_sail."):
            found |= dict.fromkeys(annotation_files(value, depth - 1))
    return list(found)


def check_source_paths(arguments: Mapping[str, Any], findings: Findings) -> bool:
    """Return whether every path among the arguments of a source exists; of a list of folders one is enough.

    Only annotation files and folders are checked. Images are counted in folders with a published number of images.
    """
    is_complete = True
    for key, value in arguments.items():
        paths = [Path(text) for text in (value if isinstance(value, list) else [value]) if _is_path(key, text)]
        if paths and not any(path.exists() for path in paths):
            is_complete = False
            what = "file" if paths[0].suffix else "folder"
            subject = ", ".join(str(path) for path in paths)
            findings.trouble(FindingKind.MISSING_FILE, subject, f"found no such {what} for {key}; see what to download")
        _count_images(paths, findings)
    return is_complete


def _is_path(key: str, text: object) -> bool:
    return key != "_target_" and isinstance(text, str) and "/" in text and not any(c in text for c in "{<\n")


def _count_images(folders: Iterable[Path], findings: Findings) -> None:
    for folder in folders:
        known = expected_images(folder) if folder.is_dir() else None
        if known is None:
            continue
        count = sum(path.suffix == ".jpg" and not is_hidden(path) for path in folder.iterdir())
        if count != known[0]:
            findings.note(FindingKind.COUNT, folder, f"found {count} images, {known[0]} are known ({known[1]})")

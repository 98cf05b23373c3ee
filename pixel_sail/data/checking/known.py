"""Published sizes of the public datasets, with the origin of each number.

The data check reports them next to its own counts. They are stored in `data/known_statistics.json`:

    {"refer": {"refcoco(unc)": {"val": {"images": 1500, "refs": 3811, "sentences": 10834, "origin": "TFDS ..."}}}}
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KNOWN_FILE = Path(__file__).resolve().parent.parent / "known_statistics.json"


@dataclass(frozen=True, kw_only=True)
class KnownSplit:
    """Published size of one split; None where a number was not published."""

    images: int | None
    refs: int | None
    sentences: int | None
    origin: str


@cache
def _known() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(KNOWN_FILE.read_text())
    return content


def refer_name(dataset: str, split_by: str) -> str:
    """Return the name of a dataset and its split, for example refcocog(umd); gRefCOCO's two folder names give one."""
    name = f"{dataset}({split_by})"
    return str(_known()["same_as"].get(name, name))


def known_split(dataset: str, split_by: str, split: str) -> KnownSplit | None:
    """Return the published size of a split, None for an unpublished dataset."""
    found = _known()["refer"].get(refer_name(dataset, split_by), {}).get(split)
    return None if found is None else KnownSplit(**found)


def is_known(dataset: str, split_by: str) -> bool:
    """Return whether this is a published dataset."""
    return refer_name(dataset, split_by) in _known()["refer"]


def images_overlap_by_design(dataset: str, split_by: str) -> bool:
    """Return whether the publisher split objects instead of images, so that images are in several splits."""
    return refer_name(dataset, split_by) in _known()["image_overlap_by_design"]


def expected_megabytes(file_name: str) -> float | None:
    """Return the published size of a file, in megabytes."""
    found = _known()["file_megabytes"].get(file_name)
    return None if found is None else float(found["megabytes"])


def expected_images(folder: Path) -> tuple[int, str] | None:
    """Return the published number of images in a folder, and the origin of the number."""
    for name, entry in _known()["images_per_folder"].items():
        if folder.parts[-2:] == tuple(name.split("/")):
            return int(entry["count"]), str(entry["origin"])
    return None

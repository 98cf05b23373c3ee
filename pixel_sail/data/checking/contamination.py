"""Photos that are trained on and scored on.

Place in the flow: `evaluation/data_check.py` compares the photos of every source with those of the evaluation splits it
knows. COCO renamed its photos between releases, so the number in the name is what counts:

    coco2014/train2014/COCO_train2014_000000581857.jpg and coco/train2017/000000581857.jpg  ->  both "coco 581857"
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pixel_sail.data.checking.findings import Findings, Kind
from pixel_sail.data.decontamination import coco_image_id


def photo_key(path: Path) -> str:
    """Return the same text for the same photo, whichever release its file is from."""
    number = coco_image_id(path)
    if number is None:
        return path.name
    drawn = _drawn_dataset(path.parent)
    return coco_key(number) if drawn is None else f"{drawn} {number}"


def coco_key(number: int) -> str:
    """Return the key of a COCO photo by its number."""
    return f"coco {number}"


@cache
def _drawn_dataset(folder: Path) -> Path | None:
    """Return the RefShapes folder that a folder belongs to, None for photos: drawn pictures have names like COCO's."""
    for parent in (folder, *folder.parents[:3]):
        meta = parent / "meta.json"
        if meta.is_file() and b"generator_version" in meta.read_bytes():
            return parent
    return None


def note_contamination(
    keys: set[str], evaluated: Mapping[tuple[str, str], frozenset[str]], source: str, findings: Findings
) -> None:
    """Add a note for every evaluation split, by (dataset, split), that shares photos with a training source."""
    for (dataset, split), photos in sorted(evaluated.items()):
        shared = keys & photos
        if shared:
            found = f"found {len(shared)} of {len(keys)} photos also in the evaluation split {dataset} {split}"
            advice = "data.decontamination leaves them out of training where it names this split"
            findings.note(Kind.CONTAMINATION, source, f"{found}, which has {len(photos)}; {advice}")

"""Finds images that are used for both training and evaluation.

`evaluation/data_check.py` compares the images of every source with those of the known evaluation splits. COCO renamed
its images between releases, so images are matched by the number in their name:

    coco2014/train2014/COCO_train2014_000000581857.jpg and coco/train2017/000000581857.jpg  ->  both "coco 581857"
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pixel_sail.data.checking.findings import FindingKind, Findings
from pixel_sail.data.decontamination import coco_image_id


def contamination_key(path: Path) -> str:
    """Return the same key for the same image from any release."""
    number = coco_image_id(path)
    if number is None:
        return path.name
    synthetic = _synthetic_dataset(path.parent)
    return coco_key(number) if synthetic is None else f"{synthetic} {number}"


def coco_key(number: int) -> str:
    """Return the key of a COCO image by its number."""
    return f"coco {number}"


@cache
def _synthetic_dataset(folder: Path) -> Path | None:
    """Return the RefShapes folder that contains a folder, None for real images; synthetic images are named like
    COCO's."""
    for parent in (folder, *folder.parents[:3]):
        meta = parent / "meta.json"
        if meta.is_file() and b"generator_version" in meta.read_bytes():
            return parent
    return None


def note_contamination(
    keys: set[str], evaluated: Mapping[tuple[str, str], frozenset[str]], source: str, findings: Findings
) -> None:
    """Add a note for every evaluation split, by (dataset, split), that shares images with a training source."""
    for (dataset, split), images in sorted(evaluated.items()):
        shared = keys & images
        if shared:
            found = f"found {len(shared)} of {len(keys)} images also in the evaluation split {dataset} {split}"
            advice = "data.decontamination removes them from training if it names this split"
            findings.note(FindingKind.CONTAMINATION, source, f"{found}, which has {len(images)}; {advice}")

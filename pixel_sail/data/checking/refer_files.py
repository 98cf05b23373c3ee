"""Checks a REFER or gRefCOCO folder on disk: files, refs, annotations, masks and images.

`evaluation/data_check.py` calls `check_refer` once per folder. The loader of these files (`data/refer_annotations.py`)
stops at the first error; this module reads item by item and reports all defects in one run. Example:

    refs(unc).p: refs[7], ref_id 3   duplicate ref_id   found the id again, expected each once
    images/train2014/COCO_train2014_000000000009.jpg   missing image   ...
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pixel_sail.data.checking.files import ABSENT_IMAGE, ABSENT_IMAGES, check_image, file_fact
from pixel_sail.data.checking.findings import FileFact, FindingKind, Findings, Lengths, SoundFraction, SplitCount
from pixel_sail.data.checking.instances import Instances, read_instances
from pixel_sail.data.checking.known import images_overlap_by_design, known_split, refer_name
from pixel_sail.data.checking.refs import RefRow, check_refs
from pixel_sail.data.images import image_file
from pixel_sail.data.refer_annotations import COCO_TRAIN_FOLDERS

_REFS_FILE = re.compile(r"(?P<stem>g?refs\((?P<split_by>.+)\))\.(?P<suffix>jsonl?|p)")
_SUFFIX_ORDER = ("json", "jsonl", "p")
"""Order of preference for files with the same refs, as in the loader."""


@dataclass(frozen=True, kw_only=True)
class ReferFolder:
    """Files to check; `split_by` None means every refs file of the folder."""

    root: Path
    dataset: str
    split_by: str | None = None
    image_dir: Path | None = None

    @property
    def path(self) -> Path:
        """Return the folder with the annotation files."""
        return self.root / self.dataset

    def found_image_dir(self) -> Path:
        """Return the image folder: the given one, or the first usual one that exists."""
        if self.image_dir is not None:
            return self.image_dir
        folders = [parent / name for parent in (self.root, self.path) for name in COCO_TRAIN_FOLDERS]
        return next((folder for folder in folders if folder.is_dir()), folders[0])


@dataclass(frozen=True, kw_only=True)
class ReferCheck:
    """Results for a folder; defects are added to the `Findings` argument."""

    files: tuple[FileFact, ...]
    splits: tuple[SplitCount, ...]
    images: SoundFraction
    masks: SoundFraction
    empty_masks: int
    texts: Lengths | None
    images_by_split: dict[tuple[str, str], frozenset[Path]]
    """By (refcocog(umd), val)."""


def refs_files(folder: ReferFolder) -> list[tuple[str, Path]]:
    """Return (split_by, file) of every selected refs file; of two formats of one file, the preferred one."""
    if not folder.path.is_dir():
        return []
    found: dict[str, tuple[int, str, Path]] = {}
    for path in sorted(folder.path.iterdir()):
        match = _REFS_FILE.fullmatch(path.name)
        if match and folder.split_by in (None, match["split_by"]):
            entry = (_SUFFIX_ORDER.index(match["suffix"]), match["split_by"], path)
            found[match["stem"]] = min(entry, found.get(match["stem"], entry))
    return [(split_by, path) for _, split_by, path in found.values()]


def check_refer(folder: ReferFolder, findings: Findings, *, sample: int | None, progress: bool) -> ReferCheck:
    """Check one folder; `sample` masks and images are decoded, all of them if it is None."""
    paths = refs_files(folder)
    if not paths:
        wanted = f"refs({folder.split_by or '*'}).p or grefs({folder.split_by or '*'}).json"
        findings.trouble(
            FindingKind.MISSING_FILE,
            folder.path / wanted,
            "found no such file, expected annotations; see what to download",
        )
    instances_file = folder.path / "instances.json"
    facts = [file_fact(path, findings) for path in (*(path for _, path in paths), instances_file)]
    rows = {split_by: check_refs(path, findings) for split_by, path in paths}
    every = [row for group in rows.values() for row in group]
    used = {ann_id for row in every for ann_id in row.ann_ids}
    chosen = _choose(used, sample)
    instances = Instances()
    if instances_file.is_file():
        decode_all = sample is None or len(used) <= sample
        instances = read_instances(
            instances_file,
            findings,
            is_chosen=lambda ann_id: decode_all or ann_id in chosen,
            is_used=used.__contains__,
            progress=progress,
        )
    splits: list[SplitCount] = []
    by_split: dict[tuple[str, str], frozenset[Path]] = {}
    for split_by, path in paths:
        if instances.is_read:
            _check_ids(rows[split_by], path, instances, findings)
        splits += count_splits(rows[split_by], folder.dataset, split_by, path, findings)
        for split, group in _by_split(rows[split_by]).items():
            names = {image.file_name for row in group if (image := instances.images.get(row.image_id)) is not None}
            key = (refer_name(folder.dataset, split_by), split)
            by_split[key] = frozenset(image_file(folder.found_image_dir(), name) for name in names if name is not None)
        _check_overlap(rows[split_by], folder.dataset, split_by, path, findings)
    return ReferCheck(
        files=tuple(fact for fact in facts if fact is not None),
        splits=tuple(splits),
        images=_check_images(folder, {row.image_id for row in every}, instances, findings, sample, progress),
        masks=instances.masks,
        empty_masks=instances.empty_masks,
        texts=Lengths.of([length for row in every for length in row.text_lengths]),
        images_by_split=by_split,
    )


def count_splits(
    rows: Iterable[RefRow], dataset: str, split_by: str, path: Path, findings: Findings
) -> list[SplitCount]:
    """Return the size of every split next to the published one; a difference is noted."""
    counts = []
    for split, group in _by_split(rows).items():
        described = [row for row in group if row.text_lengths]
        known = known_split(dataset, split_by, split)
        count = SplitCount(
            file=f"{dataset}/{path.name}",
            split=split,
            images=len({row.image_id for row in described}),
            refs=len(described),
            sentences=sum(len(row.text_lengths) for row in described),
            refs_without_target=sum(not row.ann_ids for row in described),
            refs_with_several=sum(len(row.ann_ids) > 1 for row in described),
            known_images=known.images if known else None,
            known_refs=known.refs if known else None,
            known_sentences=known.sentences if known else None,
            origin=known.origin if known else "",
        )
        counts.append(count)
        pairs = {
            "images": (count.images, count.known_images),
            "refs": (count.refs, count.known_refs),
            "sentences": (count.sentences, count.known_sentences),
        }
        differing = [f"{found} of {expected} {name}" for name, (found, expected) in pairs.items()
                     if expected is not None and found != expected]  # fmt: skip
        if differing:
            found = f"found {', '.join(differing)} that are published"
            findings.note(
                FindingKind.COUNT, f"{path}: split {split}", f"{found}; a part of the dataset or another release"
            )
    return counts


def _by_split(rows: Iterable[RefRow]) -> dict[str, list[RefRow]]:
    groups: dict[str, list[RefRow]] = defaultdict(list)
    for row in rows:
        groups[row.split].append(row)
    return dict(sorted(groups.items()))


def _check_ids(rows: Iterable[RefRow], path: Path, instances: Instances, findings: Findings) -> None:
    """Add every ref whose image or annotation is not in instances.json, or belongs to another image."""
    for row in rows:
        where = f"{path}: {row.where}"
        if row.image_id not in instances.images:
            found = f"found image_id {row.image_id}"
            findings.trouble(
                FindingKind.UNKNOWN_ID, where, f"{found}, expected one of instances.json; check the pair of files"
            )
        for ann_id in row.ann_ids:
            image_id = instances.image_of_annotation.get(ann_id)
            if image_id != row.image_id:
                found = "which instances.json does not hold" if image_id is None else f"of image {image_id}"
                expected = f"expected one of image {row.image_id}; check the pair of files"
                findings.trouble(FindingKind.UNKNOWN_ID, where, f"found ann_id {ann_id}, {found}, {expected}")


def _check_overlap(rows: Iterable[RefRow], dataset: str, split_by: str, path: Path, findings: Findings) -> None:
    """Add images that are in both train and another split of the same file."""
    images = {split: {row.image_id for row in group} for split, group in _by_split(rows).items()}
    training = images.pop("train", set())
    for split, others in images.items():
        shared = sorted(training & others)
        if not shared:
            continue
        found = f"found {len(shared)} images of train also in {split} (first image_id {shared[0]})"
        if images_overlap_by_design(dataset, split_by):
            findings.note(
                FindingKind.CONTAMINATION, path, f"{found}; so published, this file splits objects and not images"
            )
        else:
            findings.trouble(FindingKind.CONTAMINATION, path, f"{found}, expected none; download the file again")


def _choose(ids: Iterable[int], sample: int | None) -> set[int]:
    ordered = sorted(ids)
    if sample is None or len(ordered) <= sample:
        return set(ordered)
    return {int(value) for value in np.random.default_rng(0).choice(ordered, size=sample, replace=False)}


def _check_images(
    folder: ReferFolder,
    used: set[int],
    instances: Instances,
    findings: Findings,
    sample: int | None,
    progress: bool,
) -> SoundFraction:
    """Check the existence of every image with a ref, and open `sample` of those that exist."""
    image_dir = folder.found_image_dir()
    known = [image_id for image_id in sorted(used) if image_id in instances.images]
    if not image_dir.is_dir():
        findings.trouble(FindingKind.MISSING_FILE, image_dir, ABSENT_IMAGES)
        return SoundFraction()
    chosen = _choose(known, sample)
    result = SoundFraction()
    for image_id in tqdm(known, desc=f"{folder.dataset}: images", disable=not progress, leave=False):
        row: Any = instances.images[image_id]
        if row.file_name is None:
            continue
        path = image_file(image_dir, row.file_name)
        if not os.path.isfile(path):
            findings.trouble(FindingKind.MISSING_IMAGE, path, ABSENT_IMAGE)
            result += SoundFraction(checked=int(image_id in chosen))
        elif image_id in chosen:
            result += SoundFraction(checked=1, sound=int(check_image(path, row.size_hw, findings)))
    return result

"""Read REFER and gRefCOCO annotation files into one split of checked records.

`data/sources/refer.py` turns the result into samples and expressions.

    <root>/<dataset>/refs(<split_by>).p or .jsonl        one annotation per ref (see `data/refs_files.py`)
    <root>/<dataset>/grefs(<split_by>).json or .p        a list of annotations per ref, [-1] when nothing is referred to
    <root>/<dataset>/instances.json                      images and segmentations in COCO format
    <root>/images/train2014/...                          images; opened only where pixels are needed

One entry of refs(umd).p:

    {"ref_id": 8, "image_id": 519404, "ann_id": 1241542, "split": "val", "sentences":
        [{"sent_id": 2, "sent": "the tie of the standing man", "raw": "The tie of the standing man."}, ...]}
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixel_sail.data.coordinates import shows_pixels
from pixel_sail.data.fields import MAX_PIXELS
from pixel_sail.data.images import image_file
from pixel_sail.data.records import Records, open_records
from pixel_sail.data.refs_files import find_refs_file, read_refs
from pixel_sail.texts import shown
from pixel_sail.types import DataError, SizeHW

logger = logging.getLogger(__name__)

COCO_TRAIN_FOLDERS = ("images/train2014", "images/mscoco/images/train2014", "coco2014/train2014")
"""Image folders to try, first below the root, then below the dataset's folder, in this order. If none exists, errors
name the first."""

MAX_ID = (1 << 63) - 1
"""Largest id of refs, annotations and images: a signed 64-bit integer."""

_NO_TARGET_IDS = (-1,)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferImage:
    """One image of the split."""

    image_id: int
    path: Path
    size_hw: SizeHW


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One expression that identifies an object."""

    sent_id: int
    sent: str
    raw: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ref:
    """One referred target: annotations (none for no target) and at least one sentence."""

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    sentences: tuple[Sentence, ...]


class Segmentations(Mapping[int, Any]):
    """COCO segmentations by annotation id, each read from instances.json on access.

    They are most of a dataset's memory; this way all workers share one mapped file and two small arrays.
    """

    def __init__(self, records: Records, numbers: Mapping[int, int]) -> None:
        """`numbers`: record number of each annotation."""
        self._records = records
        self._ids: NDArray[np.int64] = np.array(sorted(numbers), dtype=np.int64)
        self._numbers: NDArray[np.int64] = np.array([numbers[i] for i in sorted(numbers)], dtype=np.int64)

    def __getitem__(self, ann_id: int) -> Any:
        """Return a segmentation as stored, None if the annotation has none."""
        return self._record(ann_id).get("segmentation")

    def is_crowd(self, ann_id: int) -> bool:
        """Return whether an annotation is a crowd."""
        return bool(self._record(ann_id).get("iscrowd"))

    def _record(self, ann_id: int) -> dict[str, Any]:
        place = int(np.searchsorted(self._ids, ann_id))
        if place == len(self._ids) or self._ids[place] != ann_id:
            raise KeyError(ann_id)
        record: dict[str, Any] = self._records[int(self._numbers[place])]
        return record

    def __iter__(self) -> Iterator[int]:
        """Yield the annotation ids, ascending."""
        return (int(ann_id) for ann_id in self._ids)

    def __len__(self) -> int:
        """Return the number of annotations that the split uses."""
        return len(self._ids)

    def shows_pixels(self) -> bool:
        """Return whether any polygon of the file has a coordinate above 1."""
        return shows_pixels(self._records)


@dataclass(frozen=True, kw_only=True)
class ReferAnnotations:
    """One split of one dataset, with only the images and segmentations that the split uses."""

    dataset: str
    split: str
    refs_file: Path
    images: dict[int, ReferImage]
    """By image id."""
    refs_by_image: dict[int, tuple[Ref, ...]]
    """By image id, ascending; refs by ref_id and sentences by sent_id, ascending."""
    segmentations: Segmentations
    """COCO segmentations as stored, by annotation id; read and decoded on access."""
    num_skipped: int
    """Refs of the split without sentences (the released gRefCOCO file has some)."""


def load_refer(
    root: str | Path,
    dataset: str | Sequence[str],
    split: str,
    *,
    split_by: str | None = None,
    image_dir: str | Path | None = None,
) -> ReferAnnotations:
    """Read the annotations of one split; images need not exist. Raises: DataError with the file and the ref.

    The split must match exactly ("testA", not "test"). A list of dataset names gives alternative folder names of the
    same dataset, of which the first that exists is read.
    """
    root = Path(root)
    folder = _find_folder(root, [dataset] if isinstance(dataset, str) else dataset)
    refs_file = find_refs_file(folder, split_by)
    records = _records_of_split(refs_file, split)
    refs = sorted((_parse_ref(record, refs_file) for record in records), key=lambda ref: (ref.image_id, ref.ref_id))
    kept = [ref for ref in refs if ref.sentences]
    num_skipped = len(refs) - len(kept)
    if num_skipped:
        logger.warning(
            "%s: skipped %d of %d refs of split %s without sentences", refs_file, num_skipped, len(refs), split
        )
    _check_unique_sentences(kept, refs_file)
    _report_repeated_refs(kept, refs_file)
    found_dir = Path(image_dir) if image_dir is not None else _find_image_dir(root, folder)
    images, segmentations = _resolve(kept, refs_file, found_dir=found_dir)
    grouped: dict[int, list[Ref]] = {image_id: [] for image_id in images}
    for ref in kept:
        grouped[ref.image_id].append(ref)
    return ReferAnnotations(
        dataset=dataset if isinstance(dataset, str) else dataset[0],
        split=split,
        refs_file=refs_file,
        images=images,
        refs_by_image={image_id: tuple(group) for image_id, group in grouped.items()},
        segmentations=segmentations,
        num_skipped=num_skipped,
    )


def split_image_ids(
    root: str | Path, dataset: str | Sequence[str], splits: Sequence[str], *, split_by: str | None = None
) -> frozenset[int]:
    """Return the ids of all images in these splits, from the refs file alone. Raises: DataError."""
    folder = _find_folder(Path(root), [dataset] if isinstance(dataset, str) else dataset)
    refs_file = find_refs_file(folder, split_by)
    records = read_refs(refs_file)
    present = {str(record.get("split")) for record in records}
    missing = sorted(set(splits) - present)
    if missing:
        raise DataError(f"{refs_file}: found splits {shown(sorted(present))}, expected {missing}; set existing splits")
    return frozenset(
        _field(record, "image_id", (int,), f"{refs_file}: ref_id {shown(record.get('ref_id'))}")
        for record in records
        if record.get("split") in splits
    )


def _find_folder(root: Path, names: Sequence[str]) -> Path:
    """Return the first folder that exists, else the first one, which the error message then names."""
    folders = [root / name for name in names]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _find_image_dir(root: Path, folder: Path) -> Path:
    folders = [parent / name for parent in (root, folder) for name in COCO_TRAIN_FOLDERS]
    return next((path for path in folders if path.is_dir()), folders[0])


def _records_of_split(refs_file: Path, split: str) -> list[dict[str, Any]]:
    content = read_refs(refs_file)
    for number, record in enumerate(content):
        if not isinstance(record.get("split"), str):
            raise DataError(
                f"{refs_file}: refs[{number}]: found split {shown(record.get('split'))}, expected a name; repair the "
                "file"
            )
    splits = Counter(record["split"] for record in content)
    if split not in splits:
        present = ", ".join(f"{shown(name)[1:-1]} ({count} refs)" for name, count in sorted(splits.items())[:20])
        raise DataError(f"{refs_file}: found splits {present or 'none'}, expected {split!r}; ask for one that exists")
    return [record for record in content if record["split"] == split]


def _parse_ref(record: dict[str, Any], refs_file: Path) -> Ref:
    where = f"{refs_file}: ref_id {shown(record.get('ref_id'))}"
    ann_id = _field(record, "ann_id", (int, list), where)
    ann_ids = tuple(ann_id) if isinstance(ann_id, list) else (ann_id,)
    is_no_target = isinstance(ann_id, list) and ann_ids == _NO_TARGET_IDS
    if not ann_ids or not all(type(item) is int and abs(item) <= MAX_ID for item in ann_ids):
        raise DataError(f"{where}: found ann_id {shown(ann_id)}, expected ids or [-1] for no target; repair the file")
    sentences = [
        Sentence(
            sent_id=_field(sentence, "sent_id", (int,), where),
            sent=_field(sentence, "sent", (str,), where),
            raw=_field(sentence, "raw", (str,), where),
        )
        for sentence in _field(record, "sentences", (list,), where)
    ]
    return Ref(
        ref_id=_field(record, "ref_id", (int,), where),
        image_id=_field(record, "image_id", (int,), where),
        ann_ids=() if is_no_target else ann_ids,
        sentences=tuple(sorted(sentences, key=lambda sentence: sentence.sent_id)),
    )


def _check_unique_sentences(refs: list[Ref], refs_file: Path) -> None:
    counts = Counter((ref.ref_id, sentence.sent_id) for ref in refs for sentence in ref.sentences)
    repeated = [pair for pair, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"{refs_file}: found (ref_id, sent_id) {repeated[0]} {counts[repeated[0]]} times ({len(repeated)} such "
            "pairs), expected each pair once because scores are matched by it; renumber the file"
        )


def _report_repeated_refs(refs: list[Ref], refs_file: Path) -> None:
    """Log repeated ref ids. They are harmless: every record is used as a separate ref."""
    counts = Counter(ref.ref_id for ref in refs)
    repeated = sorted(ref_id for ref_id, count in counts.items() if count > 1)
    if repeated:
        logger.warning(
            "%s: found %d ref_ids more than once (the first is %d), expected each once; each is used as a separate ref",
            refs_file,
            len(repeated),
            repeated[0],
        )


def _resolve(refs: list[Ref], refs_file: Path, *, found_dir: Path) -> tuple[dict[int, ReferImage], Segmentations]:
    """Return the images and segmentations that the refs use, from the instances.json next to the refs file."""
    instances_file = refs_file.parent / "instances.json"
    image_rows = open_records(instances_file, "images")
    annotation_rows = open_records(instances_file, "annotations")
    image_numbers, annotation_numbers = _numbers_by_id(image_rows), _numbers_by_id(annotation_rows)
    image_ids = annotation_rows.integers("image_id")
    images: dict[int, ReferImage] = {}
    used: dict[int, int] = {}
    for ref in refs:
        where = f"{refs_file}: ref_id {ref.ref_id}"
        if ref.image_id not in image_numbers:
            raise DataError(f"{where}: found image_id {ref.image_id}, expected one of {instances_file}; check the pair")
        if ref.image_id not in images:
            row = image_rows[image_numbers[ref.image_id]]
            images[ref.image_id] = _parse_image(row, instances_file, found_dir=found_dir)
        for ann_id in ref.ann_ids:
            number = annotation_numbers.get(ann_id)
            if number is None:
                raise DataError(f"{where}: found ann_id {ann_id}, expected one of {instances_file}; check the pair")
            if image_ids[number] != ref.image_id:
                raise DataError(
                    f"{where}: found ann_id {ann_id} of image {image_ids[number]}, expected image {ref.image_id}; "
                    f"{instances_file} belongs to another release"
                )
            used[ann_id] = number
    return images, Segmentations(annotation_rows, used)


def _numbers_by_id(records: Records) -> dict[int, int]:
    """Return the record number of each id; the table lives only while a file is loaded."""
    ids = records.integers("id").tolist()
    by_id = dict(zip(ids, range(len(ids)), strict=True))
    if len(by_id) != len(ids):
        raise DataError(
            f"{records.where}: found {len(ids) - len(by_id)} repeated ids, expected each id once; repair the file"
        )
    return by_id


def _parse_image(row: dict[str, Any], instances_file: Path, *, found_dir: Path) -> ReferImage:
    where = f"{instances_file}: image id {row['id']}"
    height, width = _field(row, "height", (int,), where), _field(row, "width", (int,), where)
    if height < 1 or width < 1:
        raise DataError(f"{where}: found size ({height}, {width}), expected positive height and width; repair the file")
    if height * width > MAX_PIXELS:
        raise DataError(
            f"{where}: found size {shown((height, width))}, expected at most {MAX_PIXELS} pixels; repair the file"
        )
    return ReferImage(
        image_id=row["id"], path=image_file(found_dir, _field(row, "file_name", (str,), where)), size_hw=(height, width)
    )


def _field(record: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: found {key} = {shown(value)}, expected {expected}; repair the file")
    if type(value) is int and abs(value) > MAX_ID:
        raise DataError(f"{where}: found {key} = {shown(value)}, expected a number of 64 bits; repair the file")
    return value

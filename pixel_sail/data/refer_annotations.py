"""Read REFER and gRefCOCO annotation files into one split of checked records.

Place in the flow: annotation files -> here -> `data/sources/refer.py`, which makes samples and expressions of them.

    <root>/<dataset>/refs(<split_by>).p                  one annotation per ref
    <root>/<dataset>/grefs(<split_by>).json or .p        a list of annotations per ref, [-1] when nothing is referred to
    <root>/<dataset>/instances.json                      images and segmentations in COCO format
    <root>/images/train2014/...                          photos; only opened by whoever needs pixels

One entry of refs(umd).p:

    {"ref_id": 8, "image_id": 519404, "ann_id": 1241542, "split": "val", "sentences":
        [{"sent_id": 2, "sent": "the tie of the standing man", "raw": "The tie of the standing man."}, ...]}
"""

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_sail.data.pickles import load_plain_pickle
from pixel_sail.types import DataError, SizeHW

logger = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014", "coco2014/train2014")
"""Where photos are looked for below the root, in this order; the first stands for all when none exists."""

_REFS_FILE = re.compile(r"(?:refs\((?P<refs>.+)\)\.p|grefs\((?P<grefs>.+)\)\.(?:p|json))")
_NO_TARGET_IDS = (-1,)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferImage:
    """One photo of the split."""

    image_id: int
    path: Path
    size_hw: SizeHW


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One way to say which object is meant."""

    sent_id: int
    sent: str
    raw: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ref:
    """One thing referred to: annotations (none: nothing in the image is meant) and at least one sentence."""

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    sentences: tuple[Sentence, ...]


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
    segmentations: dict[int, Any]
    """COCO segmentation as in the file, by annotation id; decoded only when asked for."""
    num_skipped: int
    """Refs of the split that have no sentence (the released gRefCOCO file has some)."""


def load_refer(
    root: str | Path,
    dataset: str,
    split: str,
    *,
    split_by: str | None = None,
    image_dir: str | Path | None = None,
) -> ReferAnnotations:
    """Read the annotations of one split; photos need not exist. Raises: DataError naming the file and the ref.

    The split must match exactly ("testA", not "test"). Where `grefs(x)` exists as .json and .p, .json is read.
    """
    root = Path(root)
    refs_file = _find_refs_file(root / dataset, split_by)
    records = _records_of_split(refs_file, split)
    refs = sorted((_parse_ref(record, refs_file) for record in records), key=lambda ref: (ref.image_id, ref.ref_id))
    kept = [ref for ref in refs if ref.sentences]
    num_skipped = len(refs) - len(kept)
    if num_skipped:
        logger.warning(
            "%s: skipped %d of %d refs of split %s, they have no sentences", refs_file, num_skipped, len(refs), split
        )
    _check_unique_sentences(kept, refs_file)
    photos = Path(image_dir) if image_dir is not None else _find_image_dir(root)
    images, segmentations = _resolve(kept, refs_file, photos=photos)
    grouped: dict[int, list[Ref]] = {image_id: [] for image_id in images}
    for ref in kept:
        grouped[ref.image_id].append(ref)
    return ReferAnnotations(
        dataset=dataset,
        split=split,
        refs_file=refs_file,
        images=images,
        refs_by_image={image_id: tuple(group) for image_id, group in grouped.items()},
        segmentations=segmentations,
        num_skipped=num_skipped,
    )


def _find_refs_file(folder: Path, split_by: str | None) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: found no such folder, expected refs(*).p and instances.json; check root and dataset"
        )
    found = {path: match for path in sorted(folder.iterdir()) if (match := _REFS_FILE.fullmatch(path.name))}
    names = [path.name for path in found]
    if split_by is None:
        if len(found) != 1:
            raise DataError(
                f"{folder}: found {names}, expected exactly one refs(*).p or grefs(*).json; "
                "pass split_by to choose, or download the annotations"
            )
        return next(iter(found))
    matching = [path for path, match in found.items() if split_by in (match["refs"], match["grefs"])]
    if not matching:
        raise DataError(f"{folder}: found {names}, expected a file for split_by={split_by!r}; pass one that exists")
    return matching[0]


def _find_image_dir(root: Path) -> Path:
    folders = [root / folder for folder in IMAGE_FOLDERS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _records_of_split(refs_file: Path, split: str) -> list[dict[str, Any]]:
    content = _read_json(refs_file) if refs_file.suffix == ".json" else load_plain_pickle(refs_file)
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise DataError(f"{refs_file}: found {type(content).__name__}, expected a list of dicts; check the download")
    splits = Counter(str(record.get("split")) for record in content)
    if split not in splits:
        present = ", ".join(f"{name} ({count} refs)" for name, count in sorted(splits.items()))
        raise DataError(f"{refs_file}: found splits {present or 'none'}, expected {split!r}; ask for one that exists")
    return [record for record in content if record["split"] == split]


def _parse_ref(record: dict[str, Any], refs_file: Path) -> Ref:
    where = f"{refs_file}: ref_id {record.get('ref_id')!r}"
    ann_id = _field(record, "ann_id", (int, list), where)
    ann_ids = tuple(ann_id) if isinstance(ann_id, list) else (ann_id,)
    is_no_target = isinstance(ann_id, list) and ann_ids == _NO_TARGET_IDS
    if not ann_ids or not all(type(item) is int for item in ann_ids):
        raise DataError(f"{where}: found ann_id {ann_id!r}, expected ids or [-1] for no target; repair the file")
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
            "pairs), expected each pair once, scores are matched by it; renumber the file"
        )


def _resolve(refs: list[Ref], refs_file: Path, *, photos: Path) -> tuple[dict[int, ReferImage], dict[int, Any]]:
    """Return images and segmentations that the refs use, from the instances.json beside the refs file."""
    instances_file = refs_file.parent / "instances.json"
    content = _read_json(instances_file)
    image_rows = _rows_by_id(content, "images", instances_file)
    annotation_rows = _rows_by_id(content, "annotations", instances_file)
    images: dict[int, ReferImage] = {}
    segmentations: dict[int, Any] = {}
    for ref in refs:
        where = f"{refs_file}: ref_id {ref.ref_id}"
        if ref.image_id not in image_rows:
            raise DataError(f"{where}: found image_id {ref.image_id}, expected one of {instances_file}; check the pair")
        if ref.image_id not in images:
            images[ref.image_id] = _parse_image(image_rows[ref.image_id], instances_file, photos=photos)
        for ann_id in ref.ann_ids:
            row = annotation_rows.get(ann_id)
            if row is None:
                raise DataError(f"{where}: found ann_id {ann_id}, expected one of {instances_file}; check the pair")
            if row.get("image_id") != ref.image_id:
                raise DataError(
                    f"{where}: found ann_id {ann_id} of image {row.get('image_id')}, expected image {ref.image_id}; "
                    f"{instances_file} belongs to another release"
                )
            segmentations[ann_id] = row.get("segmentation")
    return images, segmentations


def _parse_image(row: dict[str, Any], instances_file: Path, *, photos: Path) -> ReferImage:
    where = f"{instances_file}: image id {row['id']}"
    height, width = _field(row, "height", (int,), where), _field(row, "width", (int,), where)
    if height < 1 or width < 1:
        raise DataError(f"{where}: found size ({height}, {width}), expected positive height and width; repair the file")
    return ReferImage(
        image_id=row["id"], path=photos / _field(row, "file_name", (str,), where), size_hw=(height, width)
    )


def _rows_by_id(content: Any, key: str, file: Path) -> dict[int, dict[str, Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise DataError(f"{file}: found no list of records with id under {key!r}, expected COCO format; check the file")
    by_id = {row["id"]: row for row in rows}
    if len(by_id) != len(rows):
        raise DataError(
            f"{file}: found {len(rows) - len(by_id)} repeated ids under {key!r}, expected each id once; repair the file"
        )
    return by_id


def _field(record: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: found {key} = {value!r}, expected {expected}; repair the file")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: found no readable file ({error.strerror}), expected JSON; check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: found invalid JSON ({error}), expected a complete file; download it again") from error

"""Checks the records of a refs or grefs file one by one, without stopping at a wrong one.

`refer_files.py` calls `check_refs` for each file of a folder. Example:

    {"ref_id": 7, "image_id": 1, "ann_id": 10, "split": "val", "sent_ids": [1, 2], "sentences": [{"sent_id": 1, ...}]}
    ->  RefRow(where="refs[0], ref_id 7", image_id=1, ann_ids=(10,), split="val", text_lengths=(13,))
    and  "sentence missing: sent_ids lists 2, found no sentence with it"
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_sail.data import refs_files
from pixel_sail.data.checking.findings import FindingKind, Findings
from pixel_sail.texts import has_lone_surrogate, shown
from pixel_sail.types import DataError

NO_TARGET = (-1,)
"""Annotation ids of a no-target expression in gRefCOCO."""


@dataclass(frozen=True, kw_only=True)
class RefRow:
    """The usable fields of a record, with defaults for wrong ones."""

    where: str
    ref_id: int | None
    image_id: int
    ann_ids: tuple[int, ...]
    split: str
    text_lengths: tuple[int, ...]
    """Number of characters of every readable sentence."""


def check_refs(path: Path, findings: Findings) -> list[RefRow]:
    """Return the records of a file, without those lacking a usable image id; every defect is added to `findings`."""
    records = _read(path, findings)
    is_generalised = path.name.startswith("grefs")
    first_with: dict[int, int] = {}
    pairs: set[tuple[int | None, int]] = set()
    rows = []
    for number, record in enumerate(records):
        where = f"refs[{number}]"
        if not isinstance(record, dict):
            findings.trouble(
                FindingKind.REF_RECORD, f"{path}: {where}", f"found {shown(record)}, expected a dict; repair it"
            )
            continue
        ref_id = _integer(record, "ref_id", f"{path}: {where}", findings)
        where = f"{where}, ref_id {shown(record.get('ref_id'))}"
        if ref_id is not None and first_with.setdefault(ref_id, number) != number:
            found = f"found the id again (first in refs[{first_with[ref_id]}])"
            findings.trouble(
                FindingKind.DUPLICATE_REF_ID, f"{path}: {where}", f"{found}, expected each once; renumber it"
            )
        image_id = _integer(record, "image_id", f"{path}: {where}", findings)
        split = record.get("split")
        if not isinstance(split, str) or not split:
            findings.trouble(
                FindingKind.REF_RECORD, f"{path}: {where}", f"found split {shown(split)}, expected a name; repair it"
            )
        ann_ids = _annotation_ids(record, f"{path}: {where}", is_generalised, findings)
        lengths = _sentences(record, ref_id, pairs, f"{path}: {where}", is_generalised, findings)
        if image_id is not None:
            rows.append(
                RefRow(where=where, ref_id=ref_id, image_id=image_id, ann_ids=ann_ids, split=str(split),
                       text_lengths=lengths)
            )  # fmt: skip
    return rows


def _read(path: Path, findings: Findings) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            return list(refs_files.read_refs(path))
        content = refs_files.read_content(path)
    except DataError as error:
        findings.trouble(FindingKind.UNREADABLE_FILE, path, str(error).removeprefix(f"{path}: "))
        return []
    if not isinstance(content, list):
        found = f"found {type(content).__name__}"
        findings.trouble(FindingKind.UNREADABLE_FILE, path, f"{found}, expected a list of refs; check the download")
        return []
    return content


def _integer(record: dict[str, Any], key: str, where: str, findings: Findings) -> int | None:
    value = record.get(key)
    if type(value) is not int:
        findings.trouble(
            FindingKind.REF_RECORD, where, f"found {key} {shown(value)}, expected an integer; repair the file"
        )
        return None
    return value


def _annotation_ids(record: dict[str, Any], where: str, is_generalised: bool, findings: Findings) -> tuple[int, ...]:
    found = record.get("ann_id")
    ids = tuple(found) if isinstance(found, list) else (found,)
    if ids == NO_TARGET and isinstance(found, list) and is_generalised:
        return ()
    if not ids or not all(type(value) is int and value >= 0 for value in ids):
        expected = "expected ids, or [-1] for no target" if is_generalised else "expected an id"
        findings.trouble(FindingKind.REF_RECORD, where, f"found ann_id {shown(found)}, {expected}; repair the file")
        return ()
    return ids


def _sentences(
    record: dict[str, Any],
    ref_id: int | None,
    pairs: set[tuple[int | None, int]],
    where: str,
    is_generalised: bool,
    findings: Findings,
) -> tuple[int, ...]:
    """Return the length of every sentence; report missing, repeated or damaged ones."""
    sentences = record.get("sentences")
    if not isinstance(sentences, list):
        findings.trouble(
            FindingKind.NO_SENTENCE, where, f"found sentences {shown(sentences)}, expected a list; repair it"
        )
        return ()
    if not sentences:
        # The published gRefCOCO file has such refs, which every reader skips.
        add = findings.note if is_generalised else findings.trouble
        add(FindingKind.NO_SENTENCE, where, "found no sentence, expected at least one; the ref is skipped")
    lengths, present = [], set()
    for number, sentence in enumerate(sentences):
        spot = f"{where}, sentence {number}"
        sent_id = sentence.get("sent_id") if isinstance(sentence, dict) else None
        if type(sent_id) is not int:
            findings.trouble(
                FindingKind.REF_RECORD, spot, f"found {shown(sentence)}, expected a dict with sent_id; repair it"
            )
            continue
        present.add(sent_id)
        if (ref_id, sent_id) in pairs:
            found = f"found sent_id {sent_id} of this ref again"
            findings.trouble(FindingKind.DUPLICATE_SENTENCE, spot, f"{found}, expected each once; renumber the file")
        pairs.add((ref_id, sent_id))
        lengths += list(_text_length(sentence, spot, findings))
    listed = record.get("sent_ids")
    for sent_id in listed if isinstance(listed, list) else ():
        if sent_id not in present and sentences:
            found = f"sent_ids lists {shown(sent_id)}, found no sentence with it"
            findings.trouble(FindingKind.NO_SENTENCE, where, f"{found}; download the file again")
    return tuple(lengths)


def _text_length(sentence: dict[str, Any], where: str, findings: Findings) -> Iterator[int]:
    """Yield the number of characters of a sentence, nothing if it is unreadable."""
    wrong = [key for key in ("sent", "raw") if not isinstance(sentence.get(key), str)]
    for key in wrong:
        findings.trouble(
            FindingKind.NO_SENTENCE,
            where,
            f"found {key} {shown(sentence.get(key))}, expected text; download the file again",
        )
    if not wrong:
        if any(has_lone_surrogate(sentence[key]) for key in ("sent", "raw")):
            found = f"found an unpaired surrogate in {shown(sentence)}"
            findings.trouble(FindingKind.REF_RECORD, where, f"{found}, expected Unicode text; repair the sentence")
        if not sentence["sent"].strip():
            findings.note(FindingKind.EMPTY_TEXT, where, "found no letters; training skips the sentence")
        yield len(sentence["sent"])

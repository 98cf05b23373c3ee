"""Finds and reads the refs file of a REFER or gRefCOCO folder, and converts pickles to JSON lines.

`data/refer_annotations.py` calls `find_refs_file` and `read_refs`; `tools/convert_refs.py` calls `convert`.

    refs(unc).p                    as published: a pickle, read without running code from it
    refs(unc).jsonl                made from it once by tools/convert_refs.py, and preferred from then on
    grefs(unc).json                as published by gRefCOCO; also as .p or .jsonl

The first line of a .jsonl file records the hash of its source and of the rest of the file; every other line is a ref:

    {"format": "pixel_sail refs", "version": 1, "source_sha256": "5e0b...", "num_refs": 1, "refs_sha256": "97d1..."}
    {"ref_id": 8, "image_id": 519404, "ann_id": 1241542, "split": "val", "sentences": [...]}
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pixel_sail.data.fingerprint import add_to_fingerprint
from pixel_sail.data.pickles import load_plain_pickle
from pixel_sail.data.records import open_records
from pixel_sail.files import replace_text, sha256
from pixel_sail.texts import shown
from pixel_sail.types import DataError, MissingDataError

FORMAT, VERSION = "pixel_sail refs", 1
CONVERT_COMMAND = "tools/convert_refs.py"

_REFS_NAME = re.compile(r"(?P<stem>refs\((?P<refs>.+)\)|grefs\((?P<grefs>.+)\))(?P<suffix>\.(?:p|jsonl|json))")
_PREFERENCE = (".json", ".jsonl", ".p")
"""Order of preference for the same refs: published JSON, converted JSON lines, pickle."""

Refs = list[dict[str, Any]]


def find_refs_file(folder: Path, split_by: str | None) -> Path:
    """Return the refs file of a folder; `split_by` is the part in parentheses, needed if there are several files.

    Raises: MissingDataError when there is none; DataError when there is more than one.
    """
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder}: found no such folder, expected refs(*).p and instances.json; check root and dataset"
        )
    forms: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _REFS_NAME.fullmatch(path.name)
        if match and split_by in (None, match["refs"], match["grefs"]):
            forms.setdefault(match["stem"], {})[match["suffix"]] = path
    if len(forms) == 1:
        (found,) = forms.values()
        return next(found[suffix] for suffix in _PREFERENCE if suffix in found)
    names = sorted(path.name for path in folder.iterdir() if _REFS_NAME.fullmatch(path.name))
    if split_by is not None and not forms:
        raise MissingDataError(
            f"{folder}: found {shown(names, 200)}, expected a file for split_by={split_by!r}; pass one that exists"
        )
    raise (DataError if forms else MissingDataError)(
        f"{folder}: found {shown(names, 200)}, expected exactly one refs(*).p or grefs(*).json; pass split_by to "
        "choose, or download the annotations"
    )


def read_refs(file: Path) -> Refs:
    """Return all refs of a file of any form, unchecked. Raises: DataError when the file is damaged or outdated."""
    if file.suffix == ".jsonl":
        # Under the name of the source pickle, so that converting one changes no fingerprint.
        refs = _read_lines(file)
        add_to_fingerprint(file.with_suffix(".p"), _header(file)["source_sha256"])
        return refs
    if file.is_file():
        add_to_fingerprint(file, sha256(file))
    return _checked_list(read_content(file), file)


def read_content(file: Path) -> Any:
    """Return the content of a refs file that is not a converted .jsonl file, unchecked. Raises: DataError."""
    return _read_json(file) if file.suffix == ".json" else load_plain_pickle(file)


def is_current(pickle: Path) -> bool:
    """Return whether the .jsonl file next to a pickle exists and was made from its current content."""
    converted = pickle.with_suffix(".jsonl")
    return converted.is_file() and _header(converted)["source_sha256"] == sha256(pickle)


def convert(pickle: Path) -> tuple[Path, int]:
    """Write the refs of a pickle as JSON lines next to it; return that file and the number of refs.

    Raises: DataError when the pickle is unsafe or damaged, or has values that JSON would change (sets, tuples, bytes).
    """
    source_sha256 = sha256(pickle)
    refs = _checked_list(load_plain_pickle(pickle), pickle)
    lines = "".join(_line(ref, f"{pickle}: ref {index}") for index, ref in enumerate(refs))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "source_sha256": source_sha256,
        "num_refs": len(refs),
        "refs_sha256": hashlib.sha256(lines.encode("ascii")).hexdigest(),
    }
    converted = pickle.with_suffix(".jsonl")
    replace_text(converted, json.dumps(header) + "\n" + lines)
    return converted, len(refs)


def _line(ref: dict[str, Any], where: str) -> str:
    try:
        text = json.dumps(ref, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: found a value that JSON cannot hold ({error}), expected plain data; keep the pickle"
        ) from error
    if json.loads(text) != ref:
        raise DataError(
            f"{where}: found tuples or keys that are no text, expected data that JSON holds unchanged; keep the pickle"
        )
    return text + "\n"


def _header(file: Path) -> dict[str, Any]:
    """Return the first line of a converted file, checked."""
    with file.open("rb") as lines:
        first = lines.readline()
    try:
        header = json.loads(first)
    except ValueError:
        header = None
    expected = {"format": FORMAT, "version": VERSION}
    if not isinstance(header, dict) or any(header.get(key) != value for key, value in expected.items()):
        raise DataError(f"{file}: found first line {first[:80]!r}, expected {expected}; {_again()}")
    for key, kind in (("source_sha256", str), ("num_refs", int), ("refs_sha256", str)):
        if type(header.get(key)) is not kind:
            raise DataError(f"{file}: found {key} = {shown(header.get(key))} in the first line; {_again()}")
    return header


def _read_lines(file: Path) -> Refs:
    """Return the refs of a converted file, checked against its header and the pickle next to it."""
    header = _header(file)
    pickle = file.with_suffix(".p")
    if pickle.is_file() and (found := sha256(pickle)) != header["source_sha256"]:
        raise DataError(
            f"{file}: found that it was made from a file with sha256 {header['source_sha256']}, expected "
            f"{found} as of {pickle.name} beside it; {_again()}, or remove the one that is outdated"
        )
    lines = file.read_bytes().partition(b"\n")[2]
    if hashlib.sha256(lines).hexdigest() != header["refs_sha256"]:
        raise DataError(
            f"{file}: found {lines.count(bytes([10]))} refs whose sha256 is not the one of the first line, expected "
            f"the {header['num_refs']} refs that were written; the file was cut or edited, {_again()}"
        )
    return [json.loads(line) for line in lines.splitlines()]


def _again() -> str:
    return f"run {CONVERT_COMMAND} again"


def _checked_list(content: object, file: Path) -> Refs:
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise DataError(f"{file}: found {type(content).__name__}, expected a list of dicts; check the download")
    return content


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: found no readable file ({error.strerror}), expected JSON; check the path") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.doc.startswith("{"):
            # JSON lines; the scan reports what is wrong if the file is not.
            return list(open_records(file))
        raise DataError(f"{file}: found invalid JSON ({error}), expected a complete file; download it again") from error

"""Large JSON annotation files as records that are read from disk one at a time.

Place in the flow: annotation file -> here -> `data/sources/`. A file of a gigabyte would be five as Python objects, in
every process. Instead its text is scanned once per machine for where each record begins and ends; the positions go to a
small index in a cache folder, named by the hash of the annotation file, and every process maps both into memory, so
that they exist once for all loader workers. A record is parsed when it is asked for.

Example: [{"image": "a.jpg", "text": "hat"}, {"image": "b.jpg"}] has the spans [[1, 35], [37, 54]], and
open_records(path)[1] is {"image": "b.jpg"}.
"""

import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pixel_sail.files import sha256
from pixel_sail.types import DataError

INDEX_VERSION = 1
"""Raise this whenever index files change."""

CACHE_VARIABLE = "PIXEL_SAIL_CACHE"


def cache_folder() -> Path:
    """Return where index files are kept: $PIXEL_SAIL_CACHE, or pixel_sail below the user's cache folder."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pixel_sail"


def open_records(path: str | Path, key: str | None = None) -> "Records":
    """Return the records of a JSON file: of the list it consists of, or of the list under `key` of its object.

    Raises: DataError if the file is absent, is not JSON, or has no such list; the message names the place in the file.
    """
    path = Path(path)
    index = _index_of(path)
    name = "" if key is None else key
    lists: dict[str, int] = json.loads((index / "lists.json").read_text())
    if name not in lists:
        found = f"an object with the lists {sorted(lists)}" if "" not in lists else "one list"
        expected = "one list" if key is None else f"a list under {key!r}"
        raise DataError(f"{path}: found {found}, expected {expected}; the file is not the one this dataset reads")
    return Records(path, index / f"spans_{lists[name]}.npy", where=str(path) if key is None else f"{path}: {key}")


class Records(Sequence[Any]):
    """The records of one list; indexing parses one record. May be pickled and shared by processes."""

    def __init__(self, path: Path, spans_file: Path, *, where: str) -> None:
        self.path = path
        self.where = where
        self._spans_file = spans_file
        self._spans: NDArray[np.int64] = np.load(spans_file, mmap_mode="r")
        self._text: mmap.mmap | None = None

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return one record, parsed anew; DataError if its text changed into something that is not JSON."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = (int(value) for value in self._spans[index])
        if self._text is None:
            self._text = _map_file(self.path)
        try:
            return json.loads(self._text[start:end])
        except ValueError as error:
            raise DataError(
                f"{self.where}[{index}] (bytes {start}..{end}): found invalid JSON ({error}), expected the record that "
                "was there when the file was opened; the file was changed under a running process, start again"
            ) from error

    def __iter__(self) -> Iterator[Any]:
        """Parse the records one after another."""
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped file behind; the other process maps it itself."""
        return {"path": self.path, "where": self.where, "spans_file": self._spans_file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map index and file again."""
        Records.__init__(self, state["path"], state["spans_file"], where=state["where"])

    def integers(self, field: str) -> NDArray[np.int64]:
        """Return an integer field of every record [N], kept beside the index once it was read.

        Raises: DataError naming the first record without it.
        """
        file = self._spans_file.with_name(f"{self._spans_file.stem}_{field}.npy")
        if not file.is_file():
            values = np.empty(len(self), dtype=np.int64)
            for index, record in enumerate(self):
                value = record.get(field) if isinstance(record, dict) else None
                if type(value) is not int:
                    raise DataError(
                        f"{self.where}[{index}]: found {field} = {value!r}, expected an integer; repair the file"
                    )
                values[index] = value
            _save_array(file, values)
        return np.asarray(np.load(file, mmap_mode="r"))

    def lookup(self, field: str) -> "Lookup":
        """Return a table from values of an integer field to record numbers."""
        return Lookup(self.integers(field), where=f"{self.where}, {field}")


class Lookup:
    """Record numbers by the value of an integer field."""

    def __init__(self, values: NDArray[np.int64], *, where: str) -> None:
        self._order = np.argsort(values, kind="stable")
        self._sorted = values[self._order]
        self._where = where

    def all(self, value: int) -> list[int]:
        """Return the numbers of all records with this value, in file order."""
        first, last = np.searchsorted(self._sorted, [value, value + 1])
        return [int(number) for number in self._order[first:last]]

    def one(self, value: int) -> int:
        """Return the number of the only record with this value; DataError if there is none or more than one."""
        found = self.all(value)
        if len(found) != 1:
            raise DataError(f"{self._where}: found {len(found)} records with {value}, expected exactly one")
        return found[0]


def _index_of(path: Path) -> Path:
    """Return the index folder of a file, made now if this content has none; one process per machine does the work."""
    if not path.is_file():
        raise DataError(f"{path}: found no such file, expected JSON annotations; download them or correct the path")
    digest = sha256(path)
    index = cache_folder() / f"records-v{INDEX_VERSION}" / digest[:32]
    if index.is_dir():
        return index
    index.parent.mkdir(parents=True, exist_ok=True)
    with index.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not index.is_dir():
            _write_index(path, index)
    return index


def _write_index(path: Path, index: Path) -> None:
    spans_by_key = _scan(path)
    draft = index.with_name(f"{index.name}.{os.getpid()}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for number, spans in enumerate(spans_by_key.values()):
        np.save(draft / f"spans_{number}.npy", np.array(spans, dtype=np.int64).reshape(-1, 2))
    (draft / "lists.json").write_text(json.dumps({key: number for number, key in enumerate(spans_by_key)}))
    draft.rename(index)


def _save_array(file: Path, values: NDArray[np.int64]) -> None:
    draft = file.with_name(f"{file.stem}.{os.getpid()}.partial.npy")
    np.save(draft, values)
    draft.replace(file)


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Scanner:
    """Walks over JSON text value by value and reports where they stand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Latin-1 gives one character per byte, so positions in the text are positions in the file. Everything that
        # structures JSON is ASCII; letters beyond it are only skipped here, and read as UTF-8 when records are parsed.
        self.text = path.read_bytes().decode("latin-1")
        self.position = 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not blank, "" at the end."""
        while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, expected: str) -> str:
        """Step over one of the expected characters and return it."""
        found = self.peek()
        if not found or found not in expected:
            self.fail(f"found {found!r}" if found else "the file ends", f"one of {' '.join(expected)}")
        self.position += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """Step over one value; return it and where it begins and ends."""
        self.peek()
        start = self.position
        try:
            value, self.position = self._decode(self.text, start)
        except ValueError as error:
            self.fail(f"found invalid JSON ({error})", "a complete value")
        return value, start, self.position

    def spans(self) -> list[tuple[int, int]]:
        """Step over one list; return where its elements stand."""
        self.take("[")
        result: list[tuple[int, int]] = []
        if self.peek() == "]":
            self.position += 1
            return result
        while True:
            _, start, end = self.value()
            result.append((start, end))
            if self.take(",]") == "]":
                return result

    def fail(self, found: str, expected: str) -> None:
        """Raise the error that names the place."""
        raise DataError(
            f"{self.path}: at byte {self.position} of {len(self.text)}: {found}, expected {expected}; the download is "
            "incomplete or the file is damaged, get it again"
        )


def _scan(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Return the spans of every list the file holds at its top, by key; "" when the file is one list."""
    scanner = _Scanner(path)
    if scanner.peek() == "[":
        result = {"": scanner.spans()}
    else:
        result = {}
        scanner.take("{")
        while scanner.peek() != "}":
            key, _, _ = scanner.value()
            scanner.take(":")
            if scanner.peek() == "[":
                result[str(key)] = scanner.spans()
            else:
                scanner.value()
            if scanner.peek() != "}":
                scanner.take(",")
        scanner.take("}")
    if scanner.peek():
        scanner.fail(f"found {scanner.peek()!r} after the end of the data", "nothing more")
    return result

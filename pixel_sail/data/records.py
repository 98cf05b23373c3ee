"""Reads large JSON annotation files from disk, one record at a time.

The readers and `data/sources/` open their files with it. A file of one gigabyte would take five as Python objects, in
every process. Instead its text is scanned once per machine for the start and end of each record. The positions go to a
small index in a cache folder, named by the hash of the annotation file; every process memory-maps both, so all loader
workers share one copy. A record is parsed on access. Integer fields that every record has (mostly ids) are stored in
the index, so a lookup reads no text.

Example: [{"image": "a.jpg", "id": 7}, {"image": "b.jpg", "id": 9}] has the spans [[1, 28], [30, 57]] and the field
id = [7, 9]; open_records(path)[1] is {"image": "b.jpg", "id": 9}.
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

from pixel_sail.data.fingerprint import add_to_fingerprint
from pixel_sail.data.record_scan import scan
from pixel_sail.files import sha256
from pixel_sail.paths import expanded
from pixel_sail.texts import shown
from pixel_sail.types import DataError, MissingDataError

INDEX_VERSION = 2
"""Increment when the format of index files changes."""

CACHE_VARIABLE = "PIXEL_SAIL_CACHE"
CONTENTS_FILE = "contents.json"
_INT64 = np.iinfo(np.int64)


def cache_folder() -> Path:
    """Return the folder of index files: $PIXEL_SAIL_CACHE, or pixel_sail in the user's cache folder.

    An empty variable counts as unset, and so does a relative XDG_CACHE_HOME (as the XDG standard requires). Raises:
    DataError if the user has no home folder.
    """
    own, cache = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME", "")
    folder = f"{cache}/pixel_sail" if os.path.isabs(cache) else "~/.cache/pixel_sail"
    found = expanded(own or folder)
    if found is None:
        raise DataError(
            f"{own or folder}: found no home folder (HOME is not set, and the system does not know this user), "
            f"expected a folder for small files; set the environment variable {CACHE_VARIABLE} to one"
        )
    return Path(found)


def open_records(path: str | Path, key: str | None = None) -> "Records":
    """Return the records of a JSON file: its top-level list, or the list under `key` of its top-level object.

    JSON lines, one record per line, count as a list. Text is UTF-8 with or without a byte-order mark; NaN and Infinity,
    which many writers produce, are read as floats. Raises: DataError if the file is missing, is not JSON, or has no
    such list; the message gives the position in the file.
    """
    path = Path(path)
    stamp = _stamp(path)
    digest = sha256(path)
    add_to_fingerprint(path, digest)
    folder = _index_folder(path, digest)
    contents = _contents(folder)
    assert contents is not None, folder
    lists: dict[str, Any] = contents["lists"]
    if (key is not None) != contents["is_object"] or (key or "") not in lists:
        found = f"an object with the lists {shown(sorted(lists), 300)}" if contents["is_object"] else "one list"
        expected = "one list" if key is None else f"a list under {key!r}"
        raise DataError(f"{path}: found {found}, expected {expected}; set the path to the file that this dataset reads")
    where = str(path) if key is None else f"{path}: {key}"
    return Records(path, folder, lists[key or ""], where=where, digest=digest, stamp=stamp)


class Records(Sequence[Any]):
    """The records of one list; indexing parses one record. Picklable and shared between processes."""

    def __init__(
        self, path: Path, folder: Path, entry: dict[str, Any], *, where: str, digest: str, stamp: tuple[int, int]
    ) -> None:
        self.path = path
        self.where = where
        self._state = (path, folder, entry, where, digest, stamp)
        self._digest = digest
        self._stamp = stamp
        self._spans = _mapped_array(folder / entry["spans"])
        self._fields = _mapped_array(folder / entry["fields"])
        self._field_names: list[str] = entry["field_names"]
        self._text: mmap.mmap | None = None

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return one record, parsed on every access. Raises: DataError if the file has changed since it was opened."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._spans[index].tolist()
        if self._text is None:
            self._text = self._mapped()
        # Reading a memory map beyond the end of a truncated file kills the process without a message.
        if self._text.size() != len(self._text):
            raise self._changed(f"{self._text.size()} bytes", f"{len(self._text)} bytes")
        try:
            return json.loads(self._text[start:end].decode("utf-8"))
        except ValueError as error:
            raise self._changed(f"invalid JSON in record {index}, bytes {start}..{end} ({error})", "JSON") from error

    def __iter__(self) -> Iterator[Any]:
        """Parse the records one after another."""
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> tuple[Any, ...]:
        """Exclude the mapped file; the other process maps it itself."""
        return self._state

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Map the index again; the file is mapped on the first access to a record."""
        path, folder, entry, where, digest, stamp = state
        Records.__init__(self, path, folder, entry, where=where, digest=digest, stamp=stamp)

    def integers(self, field: str) -> NDArray[np.int64]:
        """Return an integer field of every record [N], memory-mapped from the index if stored there.

        Raises: DataError naming the first record without it.
        """
        if field in self._field_names:
            return self._fields[self._field_names.index(field)]
        values = np.empty(len(self), dtype=np.int64)
        for index, record in enumerate(self):
            value = record.get(field) if isinstance(record, dict) else None
            if type(value) is not int or not _INT64.min <= value <= _INT64.max:
                raise DataError(
                    f"{self.where}[{index}]: found {field} = {shown(value)}, expected an integer of 64 bits; repair "
                    "the file"
                )
            values[index] = value
        return values

    def lookup(self, field: str) -> "Lookup":
        """Return a table from values of an integer field to record numbers."""
        return Lookup(self.integers(field), where=f"{self.where}, {field}")

    def _mapped(self) -> mmap.mmap:
        """Map the file after checking that it is still the one that was indexed."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                # A copied or touched file has a new time but the same content, which is fine.
                if (status.st_size, status.st_mtime_ns) != self._stamp and sha256(self.path) != self._digest:
                    raise self._changed("another content", "the one that was opened")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._changed(f"no readable file ({error.strerror})", "the one that was opened") from error

    def _changed(self, found: str, expected: str) -> DataError:
        return DataError(
            f"{self.where}: found {found}, expected {expected}; the file was changed under a running process, start "
            "again"
        )


class Lookup:
    """Record numbers by the value of an integer field."""

    def __init__(self, values: NDArray[np.int64], *, where: str) -> None:
        self._order = np.argsort(values, kind="stable")
        self._sorted = values[self._order]
        self._where = where

    def all(self, value: int) -> list[int]:
        """Return the numbers of all records with this value, in file order."""
        if not _INT64.min <= value <= _INT64.max:
            return []
        first, end = (np.searchsorted(self._sorted, value, side) for side in ("left", "right"))
        return [int(number) for number in self._order[first:end]]

    def one(self, value: int) -> int:
        """Return the number of the only record with this value. Raises: DataError if there is none or more than one."""
        found = self.all(value)
        if len(found) != 1:
            raise DataError(
                f"{self._where}: found {len(found)} records with {value}, expected exactly one; repair the file"
            )
        return found[0]


def _mapped_array(file: Path) -> NDArray[np.int64]:
    """Map an index file as a plain array, since np.memmap is slow for single numbers. Raises: DataError."""
    try:
        return np.asarray(np.load(file, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{file}: found an index file that cannot be read ({error}), as in the cache of another user; set the "
            f"environment variable {CACHE_VARIABLE} to a folder of your own, or delete {file.parent}"
        ) from error


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time, which change whenever the file does."""
    if not path.is_file():
        raise MissingDataError(
            f"{path}: found no such file, expected JSON annotations; download them or correct the path"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(
            f"{path}: found a file that cannot be read ({error.strerror}), expected a readable one; set its permissions"
        ) from error
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _index_folder(path: Path, digest: str) -> Path:
    """Return the index folder of a file, created if this content has none; one process per machine does the work."""
    folder = cache_folder() / f"records-v{INDEX_VERSION}" / digest[:32]
    if _contents(folder) is not None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _contents(folder) is None:
                _write_index(path, digest, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: found that the index of {path} cannot be written ({error}), expected a folder for small "
            f"files; set the environment variable {CACHE_VARIABLE} to one"
        ) from error
    return folder


def _contents(folder: Path) -> dict[str, Any] | None:
    """Return what an index contains, None if it is missing or incomplete (full disk, cache clean-up)."""
    try:
        contents: dict[str, Any] = json.loads((folder / CONTENTS_FILE).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in contents["sizes"].items())
    except (OSError, ValueError):
        return None
    return contents if whole else None


def _write_index(path: Path, digest: str, folder: Path) -> None:
    """Write all files to a temporary folder, then rename it into place; the caller holds the lock."""
    for leftover in (folder, *folder.parent.glob(f"{folder.name}.*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    scanned = scan(path, digest)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    draft.mkdir()
    lists = {}
    for number, (key, spans) in enumerate(scanned.lists.items()):
        entry = {"spans": f"spans_{number}.npy", "fields": f"fields_{number}.npy", "field_names": list(spans.fields)}
        np.save(draft / f"spans_{number}.npy", spans.positions)
        columns = np.array(list(spans.fields.values()), dtype=np.int64)
        np.save(draft / f"fields_{number}.npy", columns.reshape(len(spans.fields), len(spans.positions)))
        lists[key] = entry
    sizes = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
    contents = {"is_object": scanned.is_object, "lists": lists, "sizes": sizes}
    (draft / CONTENTS_FILE).write_text(json.dumps(contents))
    draft.rename(folder)

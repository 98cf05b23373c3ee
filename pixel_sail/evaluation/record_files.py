"""JSON Lines files of answers that survive a killed run.

The engine opens a `RecordWriter` per process and reads existing records with `read_records`. `predictions.py` and
`item_predictions.py` define the fields. The writer appends whole lines, so a killed run leaves at most one incomplete
line at the end. Reading drops it with a warning, and opening for writing truncates it. If the disk is full, an
incomplete line is truncated immediately and the error states what was saved.

Example, a file of three lines with an incomplete last one:

    {"item_id": "sa_1.jpg/0.0", ...}
    {"item_id": "sa_1.jpg/0.1", ...}
    {"item_id": "sa_2.jpg/1          <- dropped with a warning, asked again by the next run
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pixel_sail.texts import shown
from pixel_sail.types import DataError, Json

logger = logging.getLogger(__name__)


Record = TypeVar("Record")
Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class RecordFormat(Generic[Record, Key]):
    """Format of one kind of record."""

    to_json: Callable[[Record, str], Json]
    """(record, location for errors) -> line. Raises: DataError for a record that could not be read back."""
    from_json: Callable[[Json, str], Record]
    """(line, location for errors) -> record. Raises: DataError for wrong fields."""
    key: Callable[[Record], Key]
    """Key of a record, unique in a file."""
    key_name: str
    """Name of the key in messages."""

    def add_unique(self, by_key: dict[Key, Record], record: Record, where: str) -> None:
        """Add a record unless it is present. Raises: DataError for a different one with the same key."""
        key = self.key(record)
        if by_key.setdefault(key, record) != record:
            raise DataError(
                f"{where}: found a second, different record for {self.key_name} {key}, expected one; "
                "two runs wrote to one file, start a new one"
            )


class RecordWriter(Generic[Record]):
    """Appends records to a file, one line each. A context manager."""

    def __init__(self, path: str | Path, record_format: RecordFormat[Record, Any]) -> None:
        """Open `path` for appending, creating it and its folder. An incomplete last line is truncated.

        Raises: DataError if the file cannot be written.
        """
        self._path = Path(path)
        self._format = record_format
        self._num_written = 0
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _repair_end(self._path)
            # Unbuffered: failed writes must not be retried when the file is closed.
            self._file = self._path.open("ab", buffering=0)
            self._length = self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Append one record completely or not at all.

        Raises: DataError if it could not be read back or cannot be written.
        """
        line = json.dumps(self._format.to_json(record, f"{self._path}: record")).encode("ascii") + b"\n"
        with write_errors(self._path, self._what_is_safe()):
            try:
                _write_all(self._file.fileno(), line)
            except OSError:
                # Truncate the incomplete line, so that the file ends with a complete one.
                with suppress(OSError):
                    self._file.truncate(self._length)
                raise
        self._length += len(line)
        self._num_written += 1

    def sync(self) -> None:
        """Sync the file to disk. Raises: DataError if it cannot be written."""
        with write_errors(self._path, self._what_is_safe()):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with write_errors(self._path, self._what_is_safe()):
            self._file.close()

    def _what_is_safe(self) -> str:
        return f"the file ends with a whole line ({self._length} bytes, {self._num_written} lines written by this run)"

    def __enter__(self) -> "RecordWriter[Record]":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


@contextmanager
def write_errors(path: Path, safe: str = "nothing was changed") -> Iterator[None]:
    """Turn an OSError of a write into a DataError that says what to do.

    safe: statement of what was saved.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}), {_free_space(path)}; {safe}. Free disk space, "
            "then run the same command again to resume; another output folder starts from scratch"
        ) from error


def read_records(path: str | Path, record_format: RecordFormat[Record, Any]) -> list[Record]:
    """Return the records of a file in order, without duplicates.

    An incomplete last line is dropped with a warning. Raises: DataError naming file:line for any other malformed line,
    and for two different records of one key.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: found no readable file ({error.strerror}), expected JSON lines; check the path"
        ) from error
    body, rest = _split_unfinished(data)
    if rest:
        logger.warning("%s: dropped an incomplete last line of %d bytes", path, len(rest))
    records: dict[Any, Record] = {}
    for number, line in enumerate(body.splitlines(), start=1):
        where = f"{path}:{number}"
        record_format.add_unique(records, record_format.from_json(_parse_line(line, where), where), where)
    return list(records.values())


def check_line_fields(line: Json, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    """Raise DataError unless a line has all required fields and no others than these and the optional ones."""
    missing = [name for name in required if name not in line]
    unknown = sorted(line.keys() - {*required, *optional})
    if missing or unknown:
        raise DataError(
            f"{where}: found unknown fields {unknown} and no {missing}, expected {list(required)} and perhaps "
            f"{list(optional)}; repair the line"
        )


def check_kinds(line: Json, kinds: dict[str, type], where: str) -> None:
    """Raise DataError unless every present field has its type."""
    for name, kind in kinds.items():
        if name in line and type(line[name]) is not kind:
            raise DataError(f"{where}: found {name} = {shown(line[name])}, expected {kind.__name__}; repair the line")


def _parse_line(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found no JSON ({error}), expected one record; remove or repair the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected a JSON object; remove or repair the line")
    return record


def _split_unfinished(data: bytes) -> tuple[bytes, bytes]:
    """Return the complete lines of a file and the incomplete rest.

    A last line without a newline is complete if it parses as JSON, since a truncated object never parses.
    """
    end = data.rfind(b"\n") + 1
    rest = data[end:]
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return data[:end], rest
    return data, b""


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes, retrying partial writes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _free_space(path: Path) -> str:
    """Return a description of the free space on the disk of a file, or of its first existing parent."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free in {folder}"


def _repair_end(path: Path) -> None:
    """Truncate an incomplete last line, or terminate a complete one."""
    if not path.exists():
        return
    body, rest = _split_unfinished(path.read_bytes())
    if rest:
        logger.warning("%s: truncated an incomplete last line of %d bytes", path, len(rest))
    with path.open("r+b") as file:
        file.truncate(len(body))
        if body and not body.endswith(b"\n"):
            file.seek(0, 2)
            file.write(b"\n")

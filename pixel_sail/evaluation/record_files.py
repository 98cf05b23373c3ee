"""Files of answers, one JSON record per line, that survive a killed run.

The engine opens a `RecordWriter` per process and reads with `read_records` what is there already; `predictions.py` and
`item_predictions.py` say what a line holds. The writer adds whole lines, so a run that was killed leaves at most one
unfinished line at the end; reading drops it and says so, opening for writing cuts it off. A line that a full disk did
not take is cut off at once, and the message says what is safe.

Example, a file of three lines whose last one was cut:

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
    """How one kind of record is written, read and told from others."""

    to_json: Callable[[Record, str], Json]
    """(record, place) -> line. Raises: DataError for a record that could not be read back."""
    from_json: Callable[[Json, str], Record]
    """(line, place) -> record. Raises: DataError for wrong fields."""
    key: Callable[[Record], Key]
    """What is unique in a file."""
    key_name: str
    """What the key is called in messages."""

    def add_unique(self, by_key: dict[Key, Record], record: Record, where: str) -> None:
        """Add a record unless the same one is there already. Raises: DataError for a different one of the same key."""
        key = self.key(record)
        if by_key.setdefault(key, record) != record:
            raise DataError(
                f"{where}: found a second, different record for {self.key_name} {key}, expected one; "
                "two runs wrote into one file, start a new one"
            )


class RecordWriter(Generic[Record]):
    """Appends records to a file, one line each. Use as a context manager."""

    def __init__(self, path: str | Path, record_format: RecordFormat[Record, Any]) -> None:
        """Open `path` for appending, creating it and its folder, after cutting off an unfinished last line.

        Raises: DataError when the file cannot be written.
        """
        self._path = Path(path)
        self._format = record_format
        self._num_written = 0
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _repair_end(self._path)
            # Without a buffer: what could not be written must not be tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)
            self._length = self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Append one record, all of it or nothing.

        Raises: DataError if it could not be read back, or when the disk does not take it.
        """
        line = json.dumps(self._format.to_json(record, f"{self._path}: record")).encode("ascii") + b"\n"
        with write_errors(self._path, self._what_is_safe()):
            try:
                _write_all(self._file.fileno(), line)
            except OSError:
                # What was written of the line goes, so that the file ends with a whole one.
                with suppress(OSError):
                    self._file.truncate(self._length)
                raise
        self._length += len(line)
        self._num_written += 1

    def sync(self) -> None:
        """Return when everything written is on the disk. Raises: DataError when the disk does not take it."""
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
    """Turn what the system says about a file that cannot be written into a DataError that says what to do.

    safe: what can be relied on.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}), {_free_space(path)}; {safe}. Make room, then the "
            "same command goes on with what is missing; in another output folder it starts from the beginning"
        ) from error


def read_records(path: str | Path, record_format: RecordFormat[Record, Any]) -> list[Record]:
    """Return the records of a file in order, identical repeats once.

    An unfinished last line is dropped with a warning. Raises: DataError naming file:line for any other malformed line,
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
        logger.warning("%s: dropped an unfinished last line of %d bytes", path, len(rest))
    records: dict[Any, Record] = {}
    for number, line in enumerate(body.splitlines(), start=1):
        where = f"{path}:{number}"
        record_format.add_unique(records, record_format.from_json(_parse_line(line, where), where), where)
    return list(records.values())


def check_line_fields(line: Json, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    """Raise DataError unless a line has all required fields and none but these and the optional ones."""
    missing = [name for name in required if name not in line]
    unknown = sorted(line.keys() - {*required, *optional})
    if missing or unknown:
        raise DataError(
            f"{where}: found unknown fields {unknown} and no {missing}, expected {list(required)} and perhaps "
            f"{list(optional)}; repair the line"
        )


def check_kinds(line: Json, kinds: dict[str, type], where: str) -> None:
    """Raise DataError unless every field that is there has its type."""
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
    """Return the whole lines of a file and the unfinished rest.

    A last line without a newline that is a whole JSON value is finished: a cut object never parses.
    """
    end = data.rfind(b"\n") + 1
    rest = data[end:]
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return data[:end], rest
    return data, b""


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes; the system may take a part of them only, then the rest is given again."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _free_space(path: Path) -> str:
    """Return in words how much the disk of a file, or of its first folder that exists, still takes."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free in {folder}"


def _repair_end(path: Path) -> None:
    """Make a file end with a whole line."""
    if not path.exists():
        return
    body, rest = _split_unfinished(path.read_bytes())
    if rest:
        logger.warning("%s: cut off an unfinished last line of %d bytes", path, len(rest))
    with path.open("r+b") as file:
        file.truncate(len(body))
        if body and not body.endswith(b"\n"):
            file.seek(0, 2)
            file.write(b"\n")

"""Files of answers, one JSON record per line, that survive a killed run.

Place in the flow: the engine opens a `RecordWriter` per process and reads with `read_records` what is there already;
`predictions.py` and `answers.py` say what a line holds. The writer adds whole lines, so a run that was killed leaves at
most one unfinished line at the end; reading drops it and says so, opening for writing cuts it off.

Example, a file of three lines whose last one was cut:

    {"item_id": "sa_1.jpg/0.0", ...}
    {"item_id": "sa_1.jpg/0.1", ...}
    {"item_id": "sa_2.jpg/1          <- dropped with a warning, asked again by the next run
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pixel_sail.types import DataError

logger = logging.getLogger(__name__)

Json = dict[str, Any]
"""One line."""

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
    """Appends records to a file, one flushed line each. Use as a context manager."""

    def __init__(self, path: str | Path, record_format: RecordFormat[Record, Any]) -> None:
        """Open `path` for appending, creating it and its folder, after cutting off an unfinished last line."""
        self._path = Path(path)
        self._format = record_format
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _repair_end(self._path)
        self._file = self._path.open("ab")

    def write(self, record: Record) -> None:
        """Append one record. Raises: DataError if it could not be read back."""
        line = json.dumps(self._format.to_json(record, f"{self._path}: record"))
        self._file.write(line.encode("ascii") + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "RecordWriter[Record]":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


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


def check_fields(line: Json, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
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
            raise DataError(f"{where}: found {name} = {line[name]!r}, expected {kind.__name__}; repair the line")


def _parse_line(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line)
    except ValueError as error:
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
    except ValueError:
        return data[:end], rest
    return data, b""


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

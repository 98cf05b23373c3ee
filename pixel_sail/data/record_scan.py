"""Scans JSON text once for the positions of the records in all its top-level lists.

`data/records.py` calls `scan` when a file has no index yet. Values are parsed only to find their ends, so the scan
needs little more memory than the text of the file.

Example: {"info": {}, "images": [{"id": 3}, {"id": 5}]} -> is_object, lists = {"images": positions [[24, 33], [35, 44]],
fields {"id": [3, 5]}}.
"""

import codecs
import hashlib
import json
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pixel_sail.texts import shown
from pixel_sail.types import DataError

MAX_FIELDS = 32
"""Maximum number of indexed integer fields per list; others are read from the records on access."""

_INT64 = np.iinfo(np.int64)
_CHUNK_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True)
class RecordList:
    """Positions of the records of one list."""

    positions: NDArray[np.int64]
    """First byte and one past the last [N, 2]."""
    fields: dict[str, NDArray[np.int64]]
    """Integer fields that every record has [N], by name."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """All top-level lists of a file by key; the key is "" for a file that is one list or JSON lines."""

    is_object: bool
    lists: dict[str, RecordList]


def scan(path: Path, digest: str) -> Scan:
    """Return the lists of a JSON file whose SHA-256 is `digest`.

    Raises: DataError with the byte at which the text stops being UTF-8 or JSON, or when the content has another hash.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(
            f"{path}: found a file that changes while it is read, expected a complete one; wait until it is written"
        )
    scanner = _Scanner(path, data)
    del data
    if scanner.peek() == "[":
        result = Scan(is_object=False, lists={"": scanner.records()})
    elif scanner.peek() == "{":
        result = Scan(is_object=True, lists=scanner.lists_of_object())
        if scanner.peek() == "{":
            result = Scan(is_object=False, lists={"": scanner.lines()})
    else:
        scanner.fail(_named(scanner.peek()), "a list or an object")
    if scanner.peek():
        scanner.fail(f"found {scanner.peek()!r} after the end of the data", "nothing more")
    return result


class _Scanner:
    """Steps through JSON text value by value."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        _check_utf8(path, data)
        # Latin-1 gives one character per byte, so positions in the text are positions in the file. JSON's structure is
        # ASCII; other characters are only skipped here, and decoded as UTF-8 when records are parsed.
        self.text = data.decode("latin-1")
        self.start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        self.position = self.start
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not whitespace, "" at the end."""
        blank = _BLANK.match(self.text, self.position)
        assert blank is not None
        self.position = blank.end()
        return self.text[self.position : self.position + 1]

    def take(self, expected: str) -> str:
        """Consume one of the expected characters and return it."""
        found = self.peek()
        if not found or found not in expected:
            self.fail(_named(found), " or ".join(expected))
        self.position += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """Consume one value; return it with its start and end."""
        self.peek()
        start = self.position
        try:
            value, self.position = self._decode(self.text, start)
        except (ValueError, RecursionError) as error:
            self.fail(f"found invalid JSON ({error})", "a complete value")
        return value, start, self.position

    def key(self) -> str:
        """Consume a key of the object and return it."""
        if self.peek() != '"':
            self.fail(_named(self.peek()), "a key in quotes")
        _, start, end = self.value()
        return str(json.loads(self.text[start:end].encode("latin-1")))

    def records(self) -> RecordList:
        """Consume one list; return the positions of its elements."""
        self.take("[")
        elements = _Elements()
        more = self.peek() != "]"
        if not more:
            self.position += 1
        while more:
            elements.add(*self.value())
            more = self.take(",]") == ","
        return elements.done()

    def lines(self) -> RecordList:
        """Start over and consume JSON lines, one object per line; return their positions."""
        self.position = self.start
        elements = _Elements()
        while self.peek():
            value, start, end = self.value()
            if not isinstance(value, dict) or (elements.last_end and "\n" not in self.text[elements.last_end : start]):
                self.position = start
                self.fail(f"found {shown(self.text[start : start + 20])}", "an object on a line of its own, as before")
            elements.add(value, start, end)
        return elements.done()

    def lists_of_object(self) -> dict[str, RecordList]:
        """Consume the object; return its lists."""
        self.take("{")
        result: dict[str, RecordList] = {}
        keys: set[str] = set()
        more = self.peek() != "}"
        if not more:
            self.position += 1
        while more:
            key = self.key()
            if key in keys:
                self.fail(f"found {shown(key)} for the second time", "each key once")
            keys.add(key)
            self.take(":")
            if self.peek() == "[":
                result[key] = self.records()
            else:
                self.value()
            more = self.take(",}") == ","
        return result

    def fail(self, found: str, expected: str) -> NoReturn:
        """Raise the error with the current position."""
        raise DataError(
            f"{self.path}: at byte {self.position} of {len(self.text)}: {found}, expected {expected}; the download is "
            "incomplete or the file is damaged, download it again"
        )


class _Elements:
    """Positions and integer fields of the elements of a list, collected during the scan."""

    def __init__(self) -> None:
        self.last_end = 0
        self._positions = array("q")
        self._fields: dict[str, array[int]] = {}

    def add(self, record: Any, start: int, end: int) -> None:
        """Add an element and its position."""
        _note_fields(self._fields, record, len(self._positions) // 2)
        self._positions.extend((start, end))
        self.last_end = end

    def done(self) -> RecordList:
        """Return the complete list; a field that some record lacks stopped growing there and is dropped."""
        positions = np.array(self._positions, dtype=np.int64).reshape(-1, 2)
        whole = {name: values for name, values in self._fields.items() if len(values) == len(positions)}
        fields = {name: np.array(values, dtype=np.int64) for name, values in whole.items()}
        return RecordList(positions=positions, fields=fields)


def _note_fields(fields: "dict[str, array[int]]", record: Any, number: int) -> None:
    """Append the integer fields of record `number`; the first record defines the candidate fields."""
    if not isinstance(record, dict):
        return
    if number == 0:
        # Non-ASCII names are not indexed: the scanned text has them byte by byte.
        names = [name for name, value in record.items() if type(value) is int and name.isascii()]
        fields.update((name, array("q")) for name in names[:MAX_FIELDS])
    for name, values in fields.items():
        value = record.get(name)
        if type(value) is int and _INT64.min <= value <= _INT64.max and len(values) == number:
            values.append(value)


def _check_utf8(path: Path, data: bytes) -> None:
    """Raise DataError with the first byte that is not UTF-8. Decodes in chunks, as a decoded copy may be four times as
    large."""
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _CHUNK_BYTES):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(data[start : start + _CHUNK_BYTES], final=start + _CHUNK_BYTES >= len(data))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: at byte {start - pending + error.start} of {len(data)}: found bytes that are not UTF-8 "
                f"({error.reason}), expected JSON in UTF-8; save the file in that encoding or download it again"
            ) from error


def _named(found: str) -> str:
    return f"found {found!r}" if found else "found the end of the file"

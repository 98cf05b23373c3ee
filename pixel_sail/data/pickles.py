"""Read pickle files that hold plain data, and refuse every other one before anything runs.

`refs(unc).p` -> here -> `data/sources/refer.py`. A pickle is a program: an ordinary load of a downloaded file may start
any command. This reader knows containers, text, bytes, numbers, booleans and None; a file that asks for anything by
name is refused at the moment it asks, so nothing is imported or called.

Example: b'(lp0\\n(dp1\\nVref_id\\np2\\nI7\\nsa.' is the list [{"ref_id": 7}] as Python 2 wrote it.
"""

import io
import pickle
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from pixel_sail.texts import shown
from pixel_sail.types import DataError

_PYTHON2_ENCODING = "utf-8"
"""How byte strings that Python 2 wrote as `str` are read. The published REFER files are pure ASCII there, which UTF-8
reads alike. latin1 would accept every byte and so turn UTF-8 text into wrong letters without a word; UTF-8 stops."""

MAX_DEPTH = 50
"""Deepest nesting; published files have a list of dicts of lists of dicts."""

MAX_EXPANSION = 100
"""Most values and characters per byte of the file; published files have fewer than ten."""

_ALLOWANCE = 100_000
_BEING_MEASURED = -1

_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
    AssertionError,
)
"""What the standard reader raises on truncated or random bytes (UnicodeDecodeError is a ValueError)."""


def load_plain_pickle(path: str | Path) -> Any:
    """Return the content of a pickle of lists, tuples, dicts, sets, str, bytes, int, float, bool and None.

    Raises: DataError if the file is absent or damaged, asks for a class, a function or an object by persistent id, or
    holds data nested deeper or, by sharing, larger than a file of its size should.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: found no readable file ({error.strerror}), expected a pickle; check the path"
        ) from error
    try:
        content = _PlainUnpickler(data, path).load()
        _Sizes(len(data), path).of(content)
        return content
    except DataError:
        raise
    except _MALFORMED as error:
        raise DataError(
            f"{path}: found bytes that do not unpickle ({type(error).__name__}: {error}), expected a complete pickle "
            "of plain data; download the file again"
        ) from error


class _Sizes:
    """How large values are when everything that is shared is counted wherever it occurs.

    A file of 300 bytes can hold a list of two times the same list of two times the same list, and so on: whoever
    prints, compares or copies it never comes to an end. Published files share names of fields and a few texts.
    """

    def __init__(self, num_bytes: int, path: Path) -> None:
        self._limit = MAX_EXPANSION * num_bytes + _ALLOWANCE
        self._path = path
        self._known: dict[int, int] = {}
        self._kept: list[Any] = []
        """Measured containers, so that no other one gets their id."""

    def of(self, value: Any) -> int:
        """Return the number of values and characters in a value. Raises: DataError beyond the limits."""
        return self._size(value, 0)

    def _size(self, value: Any, depth: int) -> int:
        if isinstance(value, str | bytes | bytearray):
            return 1 + len(value)
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return 1
        if depth > MAX_DEPTH:
            self._refuse(f"values nested deeper than {MAX_DEPTH}")
        known = self._known.get(id(value))
        if known is not None:
            if known == _BEING_MEASURED:
                self._refuse("a container that holds itself")
            return known
        self._known[id(value)] = _BEING_MEASURED
        self._kept.append(value)
        items = chain.from_iterable(value.items()) if isinstance(value, dict) else value
        size = 1
        for item in items:
            # Text first: most of a file is text.
            size += 1 + len(item) if type(item) is str else self._size(item, depth + 1)
            if size > self._limit:
                self._refuse(f"shared values that come to more than {self._limit} values and characters")
        self._known[id(value)] = size
        return size

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._path}: found {found}, expected plain data as of a table of refs; get the file from its publisher"
        )


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler for which no name exists.

    This is the reader written in Python. The one in C makes room up to any memo number it meets, so that one damaged
    number in a file of a kilobyte takes more memory than the machine has. The price is a factor of three in time:
    about three seconds for a file of 17 MB.
    """

    stack: list[Any]

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding=_PYTHON2_ENCODING)
        self._path = path
        self._sizes = _Sizes(len(data), path)

    def _measure_last(self) -> None:
        """Refuse a tuple or frozen set that is too large before anything computes its hash."""
        self._sizes.of(self.stack[-1])

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse a class or function, which is how a pickle would run code."""
        self._refuse(f"a request for {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse a reference to an object kept outside the file."""
        self._refuse(f"persistent id {shown(pid)}")

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._path}: found {found}, expected plain data only (containers, text, numbers); nothing was run; "
            "get the file from its publisher, or convert it to plain lists and dicts if you trust it"
        )


def _measured(read: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the reader of one kind of value that measures what it has read."""

    def read_and_measure(unpickler: Any) -> None:
        read(unpickler)
        unpickler._measure_last()

    return read_and_measure


_PlainUnpickler.dispatch = {
    **_PlainUnpickler.dispatch,
    **{
        code[0]: _measured(_PlainUnpickler.dispatch[code[0]])
        for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET)
    },
}

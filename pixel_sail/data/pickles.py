"""Reads pickle files of plain data, and rejects any other pickle before it runs code.

`data/refs_files.py` reads `refs(unc).p` with it. A pickle is a program, so unpickling a downloaded file normally may
run any command. This reader accepts containers, text, bytes, numbers, booleans and None. It rejects a file at its first
request for anything by name, so nothing is imported or called.

Example: b'(lp0\\n(dp1\\nVref_id\\np2\\nI7\\nsa.' is the list [{"ref_id": 7}] as written by Python 2.
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
"""Encoding of byte strings that Python 2 wrote as `str`. They are ASCII in the published REFER files. latin1 would
accept every byte and silently turn UTF-8 text into wrong letters; UTF-8 raises an error."""

MAX_DEPTH = 50
"""Maximum nesting; published files are a list of dicts of lists of dicts."""

MAX_EXPANSION = 100
"""Maximum values and characters per byte of the file; published files have fewer than ten."""

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
"""Exceptions of the standard reader on truncated or random bytes (UnicodeDecodeError is a ValueError)."""


def load_plain_pickle(path: str | Path) -> Any:
    """Return the content of a pickle of lists, tuples, dicts, sets, str, bytes, int, float, bool and None.

    Raises: DataError if the file is missing or damaged, requests a class, a function or an object by persistent id, or
    has data nested too deeply or, through sharing, too large for its file size.
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
    """Size of values when shared values count once per occurrence.

    A file of 300 bytes can hold a list with two references to a list with two references, and so on. Printing,
    comparing or copying it never ends. Published files share field names and a few texts.
    """

    def __init__(self, num_bytes: int, path: Path) -> None:
        self._limit = MAX_EXPANSION * num_bytes + _ALLOWANCE
        self._path = path
        self._known: dict[int, int] = {}
        self._kept: list[Any] = []
        """Measured containers, kept alive so that no other object gets their id."""

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
            # Text first, as most of a file is text.
            size += 1 + len(item) if type(item) is str else self._size(item, depth + 1)
            if size > self._limit:
                self._refuse(f"shared values that come to more than {self._limit} values and characters")
        self._known[id(value)] = size
        return size

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._path}: found {found}, expected plain data as in a table of refs; get the file from its publisher"
        )


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler that resolves no names.

    It extends the reader written in Python. The one in C allocates memory up to any memo number it reads, so a damaged
    number in a kilobyte file could exhaust memory. The price is a factor of three in time: about three seconds for a
    file of 17 MB.
    """

    stack: list[Any]

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding=_PYTHON2_ENCODING)
        self._path = path
        self._sizes = _Sizes(len(data), path)

    def _measure_last(self) -> None:
        """Reject a tuple or frozen set that is too large before its hash is computed."""
        self._sizes.of(self.stack[-1])

    def find_class(self, module: str, name: str) -> NoReturn:
        """Reject a class or function, through which a pickle would run code."""
        self._refuse(f"a request for {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        """Reject a reference to an object stored outside the file."""
        self._refuse(f"persistent id {shown(pid)}")

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._path}: found {found}, expected plain data only (containers, text, numbers); nothing was run; "
            "get the file from its publisher, or convert it to plain lists and dicts if you trust it"
        )


def _measured(read: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a reader of one kind of value that also measures what it reads."""

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

"""Read pickle files that hold plain data, and refuse every other one before anything runs.

Place in the flow: `refs(unc).p` -> here -> `data/sources/refer.py`. A pickle is a program: an ordinary load of a
downloaded file may start any command. This reader knows containers, text, bytes, numbers, booleans and None; a file
that asks for anything by name is refused at the moment it asks, so nothing is imported or called.

Example: b'(lp0\\n(dp1\\nVref_id\\np2\\nI7\\nsa.' is the list [{"ref_id": 7}] as Python 2 wrote it.
"""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, NoReturn

from pixel_sail.types import DataError

_PYTHON2_ENCODING = "utf-8"
"""How byte strings that Python 2 wrote as `str` are read. The published REFER files are pure ASCII there, which UTF-8
reads alike. latin1 would accept every byte and so turn UTF-8 text into wrong letters without a word; UTF-8 stops."""

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

    Raises: DataError if the file is absent or damaged, or asks for a class, a function or an object by persistent id.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: found no readable file ({error.strerror}), expected a pickle; check the path"
        ) from error
    try:
        return _PlainUnpickler(data, path).load()
    except DataError:
        raise
    except _MALFORMED as error:
        raise DataError(
            f"{path}: found bytes that do not unpickle ({type(error).__name__}: {error}), expected a complete pickle "
            "of plain data; download the file again"
        ) from error


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler for which no name exists.

    This is the reader written in Python. The one in C makes room up to any memo number it meets, so that one damaged
    number in a file of a kilobyte takes more memory than the machine has. The price is a factor of three in time:
    about three seconds for a file of 17 MB.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data), encoding=_PYTHON2_ENCODING)
        self._path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse a class or function, which is how a pickle would run code."""
        self._refuse(f"a request for {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse a reference to an object kept outside the file."""
        self._refuse(f"persistent id {pid!r}")

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(
            f"{self._path}: found {found}, expected plain data only (containers, text, numbers); nothing was run; "
            "get the file from its publisher, or convert it to plain lists and dicts if you trust it"
        )

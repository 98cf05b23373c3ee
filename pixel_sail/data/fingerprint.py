"""Records which annotation files were read and their hashes: the fingerprint of a run's data.

The readers add every annotation file they open, and `training/prepare.py` collects them while it builds the mixture. A
checkpoint stores the fingerprint, so that a resumed run detects changed data:

    {"refcoco/refs(unc).p": ["51dcaa..."], "refcoco/instances.json": ["fd35e8..."]}

A file is named by its folder and file name, so that data may move; several files of one name are all listed. Images and
mask PNGs are not read at the start of a run and are not included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_CURRENT: ContextVar[dict[str, set[str]] | None] = ContextVar("data_fingerprint", default=None)


def add_to_fingerprint(path: Path, digest: str) -> None:
    """Add a file and the SHA-256 of its content to the fingerprint being collected, if any."""
    found = _CURRENT.get()
    if found is not None:
        found.setdefault(f"{path.parent.name}/{path.name}", set()).add(digest)


@contextmanager
def data_fingerprint() -> Iterator[dict[str, set[str]]]:
    """Collect the annotation files read inside the block: name -> SHA-256 of each file of that name."""
    found: dict[str, set[str]] = {}
    token = _CURRENT.set(found)
    try:
        yield found
    finally:
        _CURRENT.reset(token)

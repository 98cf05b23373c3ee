"""Which annotation files were read, and what they held: the fingerprint of a run's data.

The readers add every annotation file they open; `training/prepare.py` collects while it builds the mixture, and a
checkpoint keeps the fingerprint, so that a continued run does not go on with other data unnoticed:

    {"refcoco/refs(unc).p": ["51dcaa..."], "refcoco/instances.json": ["fd35e8..."]}

A file is named by its folder and its own name, so that data may move; where several have one name, all are listed.
Images and mask PNGs are not read at the start of a run and not part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_CURRENT: ContextVar[dict[str, set[str]] | None] = ContextVar("data_fingerprint", default=None)


def add_to_fingerprint(path: Path, digest: str) -> None:
    """Add a file, with the SHA-256 of its content, to the fingerprint that is being collected, if one is."""
    found = _CURRENT.get()
    if found is not None:
        found.setdefault(f"{path.parent.name}/{path.name}", set()).add(digest)


@contextmanager
def data_fingerprint() -> Iterator[dict[str, set[str]]]:
    """Collect the annotation files that are read inside the block: name -> SHA-256 of each file of that name."""
    found: dict[str, set[str]] = {}
    token = _CURRENT.set(found)
    try:
        yield found
    finally:
        _CURRENT.reset(token)

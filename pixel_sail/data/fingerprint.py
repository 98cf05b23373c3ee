"""Which annotation files were read, and what they held: the fingerprint of a run's data.

Place in the flow: the readers note every annotation file they open; `training/loop.py` listens while it builds the
mixture, and a checkpoint keeps what was noted, so that a continued run does not go on with other data unnoticed:

    {"refcoco/refs(unc).p": ["51dcaa..."], "refcoco/instances.json": ["fd35e8..."]}

A file is named by its folder and its own name, so that data may move; where several have one name, all are listed.
Photos and mask PNGs are not read at the start of a run and not noted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_NOTED: ContextVar[dict[str, set[str]] | None] = ContextVar("data_fingerprint", default=None)


def add_to_fingerprint(path: Path, digest: str) -> None:
    """Note a file with the SHA-256 of its content, if anybody listens."""
    noted = _NOTED.get()
    if noted is not None:
        noted.setdefault(f"{path.parent.name}/{path.name}", set()).add(digest)


@contextmanager
def data_fingerprint() -> Iterator[dict[str, set[str]]]:
    """Collect the files that are noted inside the block: name -> SHA-256 of each file of that name."""
    noted: dict[str, set[str]] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)

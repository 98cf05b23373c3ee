"""Files that are either whole or absent.

Place in the flow: beside `types` and `dist`, imports nothing of the project. Everything that is written under a final
name goes through `replace_text` or is renamed by its writer:

    replace_text(Path("runs/a/metrics.json"), "{...}")    # a reader sees the old text or the new one, never a part
"""

import errno
import hashlib
import os
from pathlib import Path

DEBRIS = frozenset({"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir"})
"""What operating systems and file servers leave in folders, beside names that begin with a dot."""


def is_hidden(path: Path) -> bool:
    """Say whether a name is no content of a folder: it begins with a dot, as the `._x.jpg` of Mac archives, or is
    another program's debris."""
    return path.name.startswith(".") or path.name in DEBRIS


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text file aside and put it in place at once; missing folders are made."""
    replace_bytes(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, which is made where there is none; the file has it whole or not at all."""
    before = path.read_text() if path.is_file() else ""
    replace_text(path, before + line + "\n")


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file aside and put it in place at once; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f".writing_{path.name}")
    working.write_bytes(content)
    os.replace(working, path)


def flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on disk: a renamed folder must not come back empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; renaming is then as safe as they make it.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)

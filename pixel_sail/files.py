"""Files and folders that are either whole or absent, and how they are read again.

The lowest layer beside `types`. Everything that is written under a final name goes through `replace_text`,
`append_lines` or `replace_folder`, or is renamed by its writer; JSON is read by `read_json` and `read_json_lines`:

    replace_text(Path("runs/a/metrics.json"), "{...}")    # a reader sees the old text or the new one, never a part
    read_json(path, {"step": int}, fail=CheckpointError, remedy="delete it")["step"]
    CheckpointError: runs/a/state.json: found step 'x' (str), expected int; delete it
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from pixel_sail.errors import ExpectedError, WriteError

WRITING, REPLACED = ".writing_", ".replaced_"
"""What the name of a folder begins with while it is written, and where the one before it waits to be deleted."""

Fields = Mapping[str, type | tuple[type, ...]]
"""Names that a JSON object must have, and the types of their values; a bool is no number."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

logger = logging.getLogger(__name__)

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into WriteError with the path."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors has one class for a disk that refuses and for tensors that make no file.
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        named = getattr(error, "filename", None)
        inside = f"{named}: " if named not in (None, str(path)) else ""
        raise WriteError(
            f"{path}: cannot be written ({inside}{reason}), expected a place with room that may be written to; make "
            "room, correct the rights, or choose another place"
        ) from error


def check_writable(folder: Path) -> None:
    """See that results can be written to a folder, or it can be made, before work begins. Raises: WriteError."""
    with writing(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = there / f"{WRITING}{os.getpid()}"
        probe.touch()
        probe.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file aside and put it in place at once; missing folders are made. Raises: WriteError."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file aside and put it in place at once; missing folders are made. Raises: WriteError."""
    working = path.with_name(f"{WRITING}{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            working.write_bytes(content)
            os.replace(working, path)
        except OSError:
            working.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, as `append_lines`."""
    append_lines(path, [line])


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a text file, which is made where there is none, and flush them to disk. Raises: WriteError.

    A process that dies here leaves at most a cut last line. `read_json_lines` does not see it, and the next call
    removes it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            before = _cut_end(file)
            try:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, before)
                raise


def _cut_end(file: BinaryIO) -> int:
    """Remove an unfinished last line from an open file; return how long the file is then."""
    length = file.seek(0, os.SEEK_END)
    if length:
        file.seek(length - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(len(whole_lines(file.read())))
    return file.seek(0, os.SEEK_END)


def whole_lines(content: bytes) -> bytes:
    """Return the beginning of a file up to its last whole line: a kill cuts lines, a power loss leaves NUL bytes."""
    text = content.rstrip(b"\0\n")
    ended = content[len(text) : len(text) + 1] == b"\n"
    return content[: len(text) + 1] if ended else content[: text.rfind(b"\n") + 1]


def read_json(path: Path, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises: `fail` where it is absent or unreadable, or a field is not there."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"{path}: cannot be read ({reason_of(error)}), expected a JSON object; {remedy}") from error
    return _json_object(text, str(path), fields, fail=fail, remedy=remedy)


def read_json_lines(path: Path, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that lines are added to, none where there is no file; a cut end is left out.

    Raises: `fail`, with the number of the line, for one that is no such object.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise fail(f"{path}: cannot be read ({reason_of(error)}), expected JSON lines; {remedy}") from error
    whole = whole_lines(content)
    if len(whole) < len(content.rstrip(b"\n")):
        logger.warning("%s: its end was cut while it was written and is left out", path)
    return [
        json_line(line, f"{path}, line {number}", fields, fail=fail, remedy=remedy)
        for number, line in enumerate(whole.splitlines(), start=1)
    ]


def json_line(line: bytes, where: str, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    """Return the JSON object of a line. Raises: `fail`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise fail(
            f"{where}: found bytes that are no text ({error.reason}), expected a JSON object; {remedy}"
        ) from error
    return _json_object(text, where, fields, fail=fail, remedy=remedy)


def _json_object(text: str, where: str, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fail(
            f"{where}: found no JSON that can be read ({reason_of(error)}), expected an object; {remedy}"
        ) from error
    return check_fields(found, where, fields, fail=fail, remedy=remedy)


def check_fields(found: Any, where: str, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    """Return a value that must be an object with these fields. Raises: `fail`."""
    if not isinstance(found, dict):
        raise fail(f"{where}: found {_shown(found)}, expected a JSON object with {sorted(fields)}; {remedy}")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in found:
            raise fail(f"{where}: found no {name!r} among {_shown(sorted(found))}, expected it; {remedy}")
        value = found[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(own.__name__ for own in kinds)
            raise fail(f"{where}: found {name} {_shown(value)}, expected {names}; {remedy}")
    return found


def reason_of(error: BaseException) -> str:
    """Return the first words of an error; those of some libraries repeat the file."""
    return (str(getattr(error, "strerror", None) or error) or type(error).__name__)[:300]


def _shown(value: Any) -> str:
    """Return the beginning of a value and its type."""
    return f"{repr(value)[:100]} ({type(value).__name__})"


def replace_folder(working: Path, final: Path) -> None:
    """Put a whole folder in place of an older one, or of none. Raises: WriteError.

    The names are exchanged at once where the file system can. Where it cannot, the older folder is renamed to
    `.replaced_<name>` before the new one takes its name; a process that dies in between leaves it there, and
    `recover_folder` gives it its name back.
    """
    aside = final.with_name(f"{REPLACED}{final.name}")
    with writing(final):
        for path in (*(path for path in working.rglob("*") if path.is_file()), working):
            flush(path)
        if not os.path.lexists(final):
            os.replace(working, final)
            flush(final.parent)
            return
        if _exchange(working, final):
            flush(final.parent)
            remove(working)
            return
        remove(aside)
        os.replace(final, aside)
        os.replace(working, final)
        flush(final.parent)
        remove(aside)


def recover_folder(final: Path) -> None:
    """Mend what a process left that died in `replace_folder`, or before it; call it before a folder is written."""
    aside = final.with_name(f"{REPLACED}{final.name}")
    with writing(final):
        if aside.is_dir() and not os.path.lexists(final):
            os.replace(aside, final)
        remove(aside)
        remove(final.with_name(f"{WRITING}{final.name}"))


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders at once; return False where system or file system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


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

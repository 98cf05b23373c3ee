"""Atomic writes of files and folders, and reading JSON files with validation.

Every file gets its final name through `replace_text`, `append_lines` or `replace_folder`, or is renamed by its writer.
JSON is read with `read_json` and `read_json_lines`:

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
"""Prefixes of the name of a folder while it is written, and of the older one until it is deleted."""

Fields = Mapping[str, type | tuple[type, ...]]
"""Required fields of a JSON object and the types of their values. A bool does not count as a number."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

logger = logging.getLogger(__name__)

DEBRIS = frozenset({"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir"})
"""Files that operating systems and file servers add to folders, besides names with a leading dot."""


def is_hidden(path: Path) -> bool:
    """Return whether a file is not part of a folder's content: a name with a leading dot, such as `._x.jpg` in Mac
    archives, or one of `DEBRIS`."""
    return path.name.startswith(".") or path.name in DEBRIS


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the disk into WriteError with the path."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors uses one class for disk errors and for invalid tensors.
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        named = getattr(error, "filename", None)
        inside = f"{named}: " if named not in (None, str(path)) else ""
        raise WriteError(
            f"{path}: cannot be written ({inside}{reason}), expected a writable path with free space; free disk space, "
            "fix the permissions, or use another folder"
        ) from error


def check_writable(folder: Path) -> None:
    """Check before work begins that a folder is writable or can be created. Raises: WriteError."""
    with writing(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = there / f"{WRITING}{os.getpid()}"
        probe.touch()
        probe.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically; missing folders are created. Raises: WriteError."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; missing folders are created. Raises: WriteError."""
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
    """Append a line to a text file, see `append_lines`."""
    append_lines(path, [line])


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a text file, create it if it does not exist, and flush to disk. Raises: WriteError.

    A process that dies here leaves at most an incomplete last line, which `read_json_lines` ignores and the next call
    removes.
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
    """Remove an incomplete last line from an open file; return the new length."""
    length = file.seek(0, os.SEEK_END)
    if length:
        file.seek(length - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(len(whole_lines(file.read())))
    return file.seek(0, os.SEEK_END)


def whole_lines(content: bytes) -> bytes:
    """Return a file up to its last complete line: a kill cuts lines, a power loss leaves NUL bytes."""
    text = content.rstrip(b"\0\n")
    ended = content[len(text) : len(text) + 1] == b"\n"
    return content[: len(text) + 1] if ended else content[: text.rfind(b"\n") + 1]


def read_json(path: Path, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises: `fail` if the file is missing or unreadable, or lacks a field."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"{path}: cannot be read ({reason_of(error)}), expected a JSON object; {remedy}") from error
    return _json_object(text, str(path), fields, fail=fail, remedy=remedy)


def read_json_lines(path: Path, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of `append_lines`, none if there is none. An incomplete last line is skipped.

    Raises: `fail`, with the line number, for a line that is not such an object.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise fail(f"{path}: cannot be read ({reason_of(error)}), expected JSON lines; {remedy}") from error
    whole = whole_lines(content)
    if len(whole) < len(content.rstrip(b"\n")):
        logger.warning("%s: the last line is incomplete, because writing was interrupted; it is skipped", path)
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
            f"{where}: found bytes that are not text ({error.reason}), expected a JSON object; {remedy}"
        ) from error
    return _json_object(text, where, fields, fail=fail, remedy=remedy)


def _json_object(text: str, where: str, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fail(f"{where}: found invalid JSON ({reason_of(error)}), expected an object; {remedy}") from error
    return check_fields(found, where, fields, fail=fail, remedy=remedy)


def check_fields(found: Any, where: str, fields: Fields, *, fail: type[ExpectedError], remedy: str) -> dict[str, Any]:
    """Return a value after checking that it is an object with these fields. Raises: `fail`."""
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
    """Return the beginning of an error's message; some libraries repeat the file in it."""
    return (str(getattr(error, "strerror", None) or error) or type(error).__name__)[:300]


def _shown(value: Any) -> str:
    """Return the beginning of a value and its type."""
    return f"{repr(value)[:100]} ({type(value).__name__})"


def replace_folder(working: Path, final: Path) -> None:
    """Move a complete folder to its final name, replacing an older one. Raises: WriteError.

    The names are exchanged atomically if the file system supports it. Otherwise the older folder is first renamed to
    `.replaced_<name>`; if the process dies in between, `recover_folder` restores it.
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
    """Clean up after a process that died in or before `replace_folder`; call this before writing a folder."""
    aside = final.with_name(f"{REPLACED}{final.name}")
    with writing(final):
        if aside.is_dir() and not os.path.lexists(final):
            os.replace(aside, final)
        remove(aside)
        remove(final.with_name(f"{WRITING}{final.name}"))


def remove(path: Path) -> None:
    """Delete a folder, file or link if it exists; the target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders atomically; return False if the system does not support it."""
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
    """Flush a file, or the entries of a folder, to disk: a renamed folder must not be empty after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; renaming is then only as safe as they make it.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)

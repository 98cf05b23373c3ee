"""Reading of checkpoints as tensors by name, one at a time and without running code from files.

A source is a folder of safetensors (one file, or shards with an index), one safetensors file, one .pth / .pt file, or
a DeepSpeed ZeRO folder (`zero_shards`):

    open_source("base/Qwen2.5-0.5B")      infos: {"model.norm.weight": TensorInfo(shape=(896,), dtype=bfloat16), ...}
    open_source("runs/iter_139416.pth")   the same for a file, optionally under its key "state_dict"
"""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixel_sail.files import is_hidden
from pixel_sail.model.reading import reading
from pixel_sail.types import DataError

INDEX = "model.safetensors.index.json"
STATE_KEY = "state_dict"
"""Key under which a .pth file may hold its tensors."""

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' name of a dtype -> torch's. Weights of other dtypes (quantized ones) are not converted."""

_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""Exceptions of torch.load for truncated or random bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the size, bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint."""

    path: Path

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return shape and type of every tensor."""

    def read(self, name: str) -> Tensor:
        """Return one tensor."""


class SafetensorsSource:
    """One or several safetensors files."""

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        """`files`: tensor name -> its file."""
        self.path = path
        self._files = files
        self.infos: dict[str, TensorInfo] = {}
        for file in sorted(set(files.values())):
            with _open_safetensors(file) as opened:
                held = set(opened.keys())
                _check_index(path, file, listed={name for name, own in files.items() if own == file}, held=held)
                self.infos |= {name: _info(file, name, opened.get_slice(name)) for name in sorted(held)}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        path = self._files[name]
        with reading(f"{path}: {name}", "download it again"), _open_safetensors(path) as opened:
            tensor = opened.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor


class LoadedSource:
    """Tensors loaded by torch.load. Those of a zip file stay on disk until they are used."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._tensors = tensors
        self.infos = {name: TensorInfo(shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        return self._tensors[name].clone()


def open_source(path: str | Path) -> TensorSource:
    """Return the checkpoint at a path. Raises: DataError if it is missing, damaged, incomplete or unsafe to read."""
    from pixel_sail.conversion.zero_shards import is_zero_folder, open_zero_folder

    path = Path(path)
    if is_zero_folder(path):
        return open_zero_folder(path)
    if path.is_dir():
        return SafetensorsSource(path, _files_of_folder(path))
    if not path.is_file():
        raise DataError(f"{path}: found nothing there, expected a checkpoint folder or file; check the path")
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as opened:
            names = list(opened.keys())
        return SafetensorsSource(path, dict.fromkeys(names, path))
    return LoadedSource(path, _tensors_of(path, load_safely(path)))


def load_safely(path: Path, placeholders: Sequence[tuple[Any, str]] = ()) -> Any:
    """Return the tensors and plain data of a torch.save file.

    `placeholders`: (class without behavior, full name in the file) that replace classes of the file by plain data.
    Raises: DataError if the file is damaged or requests any other class, without running it.
    """
    try:
        with torch.serialization.safe_globals(list(placeholders)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: found a request for {_asked_for(path) or error}, expected tensors and plain data only; nothing "
            "was run. If you trust the file, save its tensors as safetensors elsewhere and convert those"
        ) from error
    except _DAMAGED as error:
        raise DataError(
            f"{path}: found bytes that do not load ({type(error).__name__}: {str(error)[:200]}), expected a complete "
            "file of torch.save; download it again"
        ) from error


def _asked_for(path: Path) -> str:
    """Return the names of code that a file requests, empty if unknown."""
    if not zipfile.is_zipfile(path):
        return ""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except (*_DAMAGED, pickle.UnpicklingError):
        return ""


def _tensors_of(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the state dict of a file's content."""
    state = content.get(STATE_KEY, content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        found = sorted(map(str, state))[:5] if isinstance(state, Mapping) else type(state).__name__
        raise DataError(f"{path}: found {found}, expected tensors by name, at the top or under {STATE_KEY!r}")
    return {str(name): tensor for name, tensor in state.items()}


def _files_of_folder(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file for a Hugging Face folder."""
    found = sorted(path for path in folder.glob("*.safetensors") if not is_hidden(path))
    index = folder / INDEX
    if not index.is_file():
        if len(found) != 1:
            names = [path.name for path in found]
            raise DataError(
                f"{folder}: found {names or 'no safetensors'} and no {INDEX}, expected one file of safetensors, or "
                "shards and their index (pickled .bin weights are not read from a folder); download the folder again"
            )
        with _open_safetensors(found[0]) as opened:
            return dict.fromkeys(opened.keys(), found[0])
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = {str(name): folder / str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index}: found no readable weight_map ({type(error).__name__}: {error}), expected tensor names and their "
            "files; download it again"
        ) from error
    outside = sorted({str(path) for path in files.values() if path.parent != folder or path.name in ("", "..")})
    if outside:
        raise DataError(f"{index}: found weights in {outside[:3]}, expected files of {folder}; download it again")
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    unlisted = sorted(path.name for path in set(found) - set(files.values()))
    if missing or unlisted:
        raise DataError(
            f"{folder}: shards missing: {missing}; shards that {INDEX} does not name: {unlisted}; expected the files "
            "of one download and no others"
        )
    return files


def _open_safetensors(path: Path) -> Any:
    """Return an open safetensors file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: found an incomplete safetensors file of {path.stat().st_size} bytes ({error}), expected a "
            "complete one; the download was truncated or damaged, download it again"
        ) from error


def _check_index(path: Path, file: Path, *, listed: set[str], held: set[str]) -> None:
    """Raise DataError if an index and a shard disagree."""
    if listed != held:
        raise DataError(
            f"{file}: contains {sorted(held - listed)[:5]}, which {path}'s index does not list for it, and lacks "
            f"{sorted(listed - held)[:5]}, which it lists; expected both to agree; download shards and index again"
        )


def _info(file: Path, name: str, view: Any) -> TensorInfo:
    """Return shape and dtype of a tensor in an open file."""
    found = view.get_dtype()
    if found not in SAFETENSORS_DTYPES:
        raise DataError(
            f"{file}: {name} has type {found}, expected one of {sorted(SAFETENSORS_DTYPES)}; quantised weights cannot"
        )
    return TensorInfo(shape=tuple(view.get_shape()), dtype=SAFETENSORS_DTYPES[found])

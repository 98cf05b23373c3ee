"""Atomic writing of a weights folder: shard by shard, verified by reading back, then renamed.

The last step of a conversion. At most one shard is in memory:

    new/model-00001-of-00002.safetensors  new/model-00002-of-00002.safetensors  new/model.safetensors.index.json
    new/config.json  new/tokenizer.json ...  new/conversion.json

Files are written to `.writing_new_<8 digits>` next to it, a unique name per conversion. A killed conversion leaves that
folder behind; nothing reads or deletes it.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixel_sail.conversion.sources import INDEX, TensorInfo
from pixel_sail.files import WRITING, flush, writing
from pixel_sail.types import DataError


@dataclass(frozen=True, kw_only=True)
class Write:
    """One tensor of the new folder."""

    name: str
    info: TensorInfo
    make: Callable[[], Tensor]
    """Returns the tensor. Called once, when its shard is written."""


def write_folder(
    folder: Path,
    writes: Sequence[Write],
    *,
    shard_bytes: int,
    finish: Callable[[Path, dict[str, str]], None],
) -> None:
    """Write the tensors in order in shards of at most `shard_bytes` (a larger tensor has its own), and verify them.

    `finish(folder, sha256 by name)` writes all other files. Raises: DataError if the folder exists (even if another
    conversion created it meanwhile), a tensor differs from its announced shape or dtype or cannot be written, or a
    file differs when read back.
    """
    _check_absent(folder)
    working = folder.with_name(f"{WRITING}{folder.name}_{uuid.uuid4().hex[:8]}")
    try:
        with writing(folder):
            working.mkdir(parents=True)
            hashes = _write_shards(working, writes, shard_bytes)
            finish(working, hashes)
            for path in (*working.rglob("*"), working):
                flush(path)
            _check_absent(folder)
            os.rename(working, folder)
            flush(folder.parent)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _check_absent(folder: Path) -> None:
    """Raise DataError if the path of the new folder exists."""
    if folder.exists():
        raise DataError(f"{folder}: found an existing path, expected a new folder; delete it or choose another name")


def shards_of(writes: Sequence[Write], shard_bytes: int) -> list[list[Write]]:
    """Return the tensors of each shard, in order."""
    shards: list[list[Write]] = []
    filled = 0
    for write in writes:
        if not shards or filled + write.info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(write)
        filled += write.info.nbytes
    return shards


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of the values of a tensor."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _write_shards(folder: Path, writes: Sequence[Write], shard_bytes: int) -> dict[str, str]:
    """Return the SHA-256 of every tensor after reading all back."""
    shards = shards_of(writes, shard_bytes)
    hashes: dict[str, str] = {}
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        own = _write_shard(folder / name, shard)
        _read_back(folder / name, own)
        hashes |= own
        files |= dict.fromkeys(own, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(write.info.nbytes for write in writes)}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return hashes


def _write_shard(path: Path, shard: Sequence[Write]) -> dict[str, str]:
    """Write one file and return the hash of each of its tensors."""
    tensors = {write.name: write.make().contiguous() for write in shard}
    for write in shard:
        found = TensorInfo(shape=tuple(tensors[write.name].shape), dtype=tensors[write.name].dtype)
        if found != write.info:
            raise DataError(f"{path}: {write.name} became {found}, expected {write.info}; nothing was kept")
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        needed = sum(write.info.nbytes for write in shard)
        free = shutil.disk_usage(path.parent).free
        raise DataError(
            f"{path}: could not be written ({error}), {free / 1e9:.3f} GB are free, expected room for "
            f"{needed / 1e9:.3f} GB in this file; make room or choose another disk with --to, nothing was kept"
        ) from error
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


def _read_back(path: Path, hashes: dict[str, str]) -> None:
    """Raise DataError if a file's tensors differ from those written."""
    with safe_open(path, framework="pt", device="cpu") as opened:
        found = set(opened.keys())
        differing = sorted(found ^ hashes.keys())
        differing += sorted(n for n in found & hashes.keys() if hashes[n] != tensor_hash(opened.get_tensor(n)))
    if differing:
        raise DataError(
            f"{path}: {differing[:5]} differ from what was written; expected the same bytes; check disk and memory of "
            "this machine, nothing was kept"
        )

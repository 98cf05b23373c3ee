"""Writes a feature cache: a plan, shards in any order by any number of processes, and the index.

tools/cache_teacher_features.py runs it; `cache` reads the result and describes the folder. The shard of an image
depends only on the sorted keys, and images are batched only within a shard, so an interrupted build resumes to the same
bytes. 130 images with 64 per shard make shards of 64, 64 and 2.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pixel_sail.distillation.cache import (
    INDEX,
    PLAN,
    SCALE_SUFFIX,
    StoredMap,
    TeacherCacheError,
    checksum,
    identity_digest,
    read_cache_json,
)
from pixel_sail.files import flush, replace_text, sha256, writing


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Planned content of a cache folder."""

    identity: dict[str, Any]
    dtype: str
    shards: tuple[tuple[str, ...], ...]
    """Keys of the images of each shard."""


def plan_cache(keys: Sequence[str], identity: dict[str, Any], *, dtype: str, images_per_shard: int) -> CachePlan:
    """Return the plan for these images; duplicates are stored once."""
    ordered = sorted(set(keys))
    shards = tuple(tuple(ordered[i : i + images_per_shard]) for i in range(0, len(ordered), images_per_shard))
    return CachePlan(identity=identity, dtype=dtype, shards=shards)


def start_folder(folder: Path, plan: CachePlan) -> None:
    """Write the plan, or check that an existing folder has the same one. Raises: TeacherCacheError."""
    content = {"identity": plan.identity, "dtype": plan.dtype, "shards": [list(keys) for keys in plan.shards]}
    path = folder / PLAN
    if not path.is_file():
        replace_text(path, json.dumps(content) + "\n")
        return
    found = read_cache_json(path, "cache", {"identity": dict, "dtype": str, "shards": list})
    differing = [name for name in content if found.get(name) != content[name]]
    if differing:
        raise TeacherCacheError(
            f"{folder}: a build was begun here with another {', '.join(differing)}; use an empty folder, or the "
            "arguments and data of that build to resume it"
        )


def shard_name(number: int) -> str:
    """Return the file name of a shard without suffix."""
    return f"shard_{number:05d}"


def is_shard_complete(folder: Path, number: int) -> bool:
    """Return whether a shard was written completely."""
    name = shard_name(number)
    return (folder / f"{name}.json").is_file() and (folder / f"{name}.safetensors").is_file()


def write_shard(
    folder: Path,
    plan: CachePlan,
    number: int,
    compute: Callable[[Sequence[str]], tuple[Mapping[str, StoredMap], Mapping[str, str]]],
) -> None:
    """Compute and write one shard; its JSON file, written last, marks it as complete.

    `compute` returns the maps of these keys, and the reason for unusable images.
    """
    maps, unusable = compute(plan.shards[number])
    tensors: dict[str, Tensor] = {}
    for key in sorted(maps):
        tensors[key] = maps[key].features_EYX
        scales = maps[key].scales_E
        if scales is not None:
            tensors[key + SCALE_SUFFIX] = scales
    final = folder / f"{shard_name(number)}.safetensors"
    working = folder / f".writing_{final.name}"
    with writing(final):
        save_file(tensors, working, metadata={"identity": identity_digest(plan.identity)})
        flush(working)
        os.replace(working, final)
    items = {key: checksum(maps[key]) for key in sorted(maps)}
    left_out = {key: unusable[key] for key in sorted(unusable)}
    content = {"file": final.name, "sha256": sha256(final), "items": items, "unusable": left_out}
    replace_text(final.with_suffix(".json"), json.dumps(content) + "\n")


def finish(folder: Path, plan: CachePlan, *, verify: bool = False) -> None:
    """Write the index of a complete cache; `verify` hashes every shard again.

    Raises: TeacherCacheError if a shard is missing or does not match its JSON file.
    """
    shards = []
    kinds = {"file": str, "sha256": str, "items": dict, "unusable": dict}
    for number, keys in enumerate(plan.shards):
        content = read_cache_json(folder / f"{shard_name(number)}.json", "cache", kinds)
        if sorted([*content["items"], *content["unusable"]]) != list(keys):
            raise TeacherCacheError(f"{folder / content['file']}: holds other images than {PLAN} says; build it again")
        if verify and sha256(folder / content["file"]) != content["sha256"]:
            raise TeacherCacheError(f"{folder / content['file']}: sha256 differs from its .json; build it again")
        shards.append(content)
    index = {"identity": plan.identity, "dtype": plan.dtype, "shards": shards}
    replace_text(folder / INDEX, json.dumps(index) + "\n")

"""Feature cache of a teacher on disk: layout, identity and reading.

tools/cache_teacher_features.py writes it with `cache_writer`; data workers read one map per selected image through
`choice`. A folder contains

    plan.json               identity, and the images of each shard; written first
    shard_00000.safetensors ...    maps by image key; memory-mapped, so only the map that is read is loaded
    shard_00000.json ...    SHA-256 of the shard and a checksum of every map; marks the shard as complete
    index.json              all of these together; written last

The key of an image is the SHA-256 of its file. Maps are stored as fp16, or as int8 with one scale per channel.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixel_sail import files
from pixel_sail.model.patches import grid_size
from pixel_sail.types import DataError, SizeHW

INDEX, PLAN = "index.json", "plan.json"
FORMAT = 1
SCALE_SUFFIX = ".scale"
INT8_LEVELS = 127


class TeacherCacheError(DataError):
    """A cache does not match the configured teacher, lacks an image or is damaged; the run cannot continue."""


@dataclass(frozen=True, kw_only=True)
class StudentGrid:
    """Settings that determine the size of the student's map of an image."""

    site: str
    patch_size: int
    max_long_side: int
    cells_per_patch: int
    """Cells of the map along one side of a patch."""
    sizing: str = "long_side"

    def grid_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return the patch grid of an image of this size."""
        return grid_size(size_hw, self.patch_size, self.max_long_side, self.sizing)

    def map_hw(self, grid_hw: SizeHW) -> SizeHW:
        """Return the size of the student's map of an image with this patch grid."""
        return grid_hw[0] * self.cells_per_patch, grid_hw[1] * self.cells_per_patch


@dataclass(frozen=True, kw_only=True)
class StoredMap:
    """One feature map as stored on disk."""

    features_EYX: Tensor
    """float16, or int8 levels."""
    scales_E: Tensor | None
    """float32: quantization step of each channel; None for float16."""


def cache_identity(teacher: dict[str, Any], *, precision: str, grid: StudentGrid | None) -> dict[str, Any]:
    """Return the identity of a cache's maps as JSON-compatible values. Without a grid, maps have the teacher's size."""
    # Caches written before `sizing` existed keep their identity.
    pooled = None if grid is None else {k: v for k, v in vars(grid).items() if (k, v) != ("sizing", "long_side")}
    # The name "expert" is part of the format.
    plain = {"format": FORMAT, "expert": teacher, "precision": precision, "pooled_to": pooled}
    read_back: dict[str, Any] = json.loads(json.dumps(plain))
    return read_back


def identity_digest(identity: dict[str, Any]) -> str:
    """Return the SHA-256 of an identity, which every shard stores."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def image_key(path: Path) -> str:
    """Return the key of an image file. Raises: DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: image cannot be read ({error})") from error


def encode_map(features_EYX: Tensor, dtype: str, where: str = "teacher features") -> StoredMap:
    """Return a float map in its stored form: "fp16", or "int8" with scales.

    The error of int8 is at most half a level, 1 / 254 of the channel's largest magnitude. `where` names the image.
    Raises: DataError for features that are not finite, or too large for fp16.
    """
    features_EYX = features_EYX.float().cpu()
    num_bad = int((~features_EYX.isfinite()).sum())
    if num_bad:
        raise DataError(
            f"{where}: found {num_bad} of {features_EYX.numel()} teacher features that are not finite, expected "
            "numbers; compute this teacher in fp32 (distillation.*.precision), or remove the image"
        )
    if dtype == "fp16":
        limit = torch.finfo(torch.float16).max
        largest = float(features_EYX.abs().max()) if features_EYX.numel() else 0.0
        if largest > limit:
            raise DataError(
                f"{where}: found a teacher feature of magnitude {largest:g}, expected at most {limit:g}, the largest "
                "of fp16; store this teacher as int8 (--dtype int8)"
            )
        return StoredMap(features_EYX=features_EYX.half().contiguous(), scales_E=None)
    scales_E = features_EYX.abs().amax(dim=(1, 2)) / INT8_LEVELS
    levels = features_EYX / scales_E.clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
    return StoredMap(features_EYX=levels.round().to(torch.int8).contiguous(), scales_E=scales_E.contiguous())


def decode_map(features_EYX: Tensor, scales_E: Tensor | None) -> Tensor:
    """Return the float32 map of stored features, on their device."""
    features = features_EYX.float()
    return features if scales_E is None else features * scales_E[:, None, None]


def checksum(stored: StoredMap) -> int:
    """Return the CRC-32 of a stored map with its scales."""
    value = zlib.crc32(stored.features_EYX.numpy().data)
    return value if stored.scales_E is None else zlib.crc32(stored.scales_E.numpy().data, value)


class FeatureCache:
    """The maps of one folder. Opened once before data workers start; each worker memory-maps the shards itself."""

    def __init__(self, folder: Path, wanted: dict[str, Any], *, where: str) -> None:
        """Read the index. Raises: TeacherCacheError if it is missing, incomplete, or its identity is not `wanted`."""
        self.folder = folder
        self.where = where
        index = read_cache_json(folder / INDEX, where, {"identity": dict, "shards": list})
        for number, shard in enumerate(index["shards"]):
            files.check_fields(
                *(shard, f"{where}: {folder / INDEX}: shard {number}", {"file": str, "items": dict}),
                fail=TeacherCacheError,
                remedy="build the cache again",
            )
        found = index["identity"]
        # Maps of the teacher's own size fit every student, as the loss resizes them.
        expected = wanted if found.get("pooled_to") is not None else {**wanted, "pooled_to": None}
        if found != expected:
            differing = {
                key: (found.get(key), expected.get(key)) for key in expected if found.get(key) != expected[key]
            }
            raise TeacherCacheError(
                f"{where}: {folder} was made by another teacher or for another student; (found, expected): "
                f"{differing}. Build a cache for this configuration in another folder"
            )
        self.is_pooled = found["pooled_to"] is not None
        self.digest = identity_digest(found)
        self.places: dict[str, tuple[str, int]] = {
            key: (shard["file"], crc) for shard in index["shards"] for key, crc in shard["items"].items()
        }
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which memory-maps the shards again."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def read(self, key: str, item: str, *, map_hw: SizeHW) -> StoredMap | None:
        """Return the map of an image, None if it is not in the cache.

        `item` names the image in messages. Raises: TeacherCacheError if the map is damaged or has another size.
        """
        place = self.places.get(key)
        if place is None:
            return None
        file, expected_checksum = place
        try:
            stored = self._load(file, key)
        except (OSError, SafetensorError) as error:
            raise TeacherCacheError(
                f"{self.where}: {item}: {self.folder / file} cannot be read ({error}); delete this shard with its "
                ".json and index.json and build again"
            ) from error
        if checksum(stored) != expected_checksum:
            raise TeacherCacheError(
                f"{self.where}: {item}: its map in {self.folder / file} is damaged (checksum differs from {INDEX}); "
                "delete this shard with its .json and index.json and build again"
            )
        if self.is_pooled and tuple(stored.features_EYX.shape[1:]) != tuple(map_hw):
            raise TeacherCacheError(
                f"{self.where}: {item}: stored map is {tuple(stored.features_EYX.shape[1:])} cells, the student's is "
                f"{tuple(map_hw)}; the image had another orientation when the cache was built, build it again"
            )
        return stored

    def _load(self, file: str, key: str) -> StoredMap:
        """Return the tensors of one image without reading its whole shard."""
        if file not in self._open:
            shard = safe_open(self.folder / file, framework="pt")
            if (shard.metadata() or {}).get("identity") != self.digest:
                raise TeacherCacheError(f"{self.where}: {self.folder / file} belongs to another cache; build it again")
            self._open[file] = shard
        shard = self._open[file]
        features = shard.get_tensor(key)
        return StoredMap(
            features_EYX=features,
            scales_E=shard.get_tensor(key + SCALE_SUFFIX) if features.dtype == torch.int8 else None,
        )


def read_cache_json(path: Path, where: str, fields: files.Fields) -> dict[str, Any]:
    """Return a JSON file of a cache. Raises: TeacherCacheError."""
    if not path.exists():
        raise TeacherCacheError(
            f"{where}: {path} is absent; build the cache with tools/cache_teacher_features.py, or let it finish"
        )
    return files.read_json(path, fields, fail=TeacherCacheError, remedy=f"{where}: build the cache again")

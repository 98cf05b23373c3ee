"""Selects the images of each teacher, and what data workers send of them to the training process.

`data/packing.py` calls it for every sample, in a data worker. The selection is a pure function of (seed, epoch, index),
through the sample's `point_seed`, and of the teacher's name. It does not depend on the number of workers, ranks or
other teachers. An image is sent as its cached map if there is a cache, else as its pixels:

    mask2former with a cache, sam2 without    ->    TeacherTarget("mask2former", map [256, 120, 160], fp16),
                                                    TeacherTarget("sam2", None) and the image [480, 640, 3]
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixel_sail.distillation.cache import FeatureCache, StudentGrid, TeacherCacheError, image_key
from pixel_sail.model.distill_head import lasting_name
from pixel_sail.types import SizeHW, TeacherTarget


@dataclass(frozen=True, kw_only=True)
class TeacherChoice:
    """The part of a teacher that data workers need."""

    name: str
    fraction: float = 1.0
    sources: frozenset[str] = frozenset()
    """Empty: all."""
    masks_only: bool = False
    grid: StudentGrid
    cache: FeatureCache | None = None
    falls_back: bool = False
    """Whether the map of an image that is not in the cache is computed online."""

    def takes(self, source: str, *, point_seed: int, has_masks: bool) -> bool:
        """Return whether a sample with an image is distilled from this teacher."""
        if (self.sources and source not in self.sources) or (self.masks_only and not has_masks):
            return False
        if self.fraction >= 1.0:
            return True
        sampled = np.random.default_rng([point_seed, zlib.crc32(lasting_name(self.name).encode())]).random()
        return bool(sampled < self.fraction)


def teacher_targets(
    choices: Sequence[TeacherChoice],
    *,
    source: str,
    point_seed: int,
    has_masks: bool,
    path: Path,
    grid_hw: SizeHW,
    where: str,
) -> tuple[TeacherTarget, ...]:
    """Return one target for every teacher of this sample.

    Raises: TeacherCacheError for a damaged map, and for a missing one unless its teacher can compute it.
    """
    targets, key = [], None
    for choice in choices:
        if not choice.takes(source, point_seed=point_seed, has_masks=has_masks):
            continue
        stored = None
        if choice.cache is not None:
            key = image_key(path) if key is None else key
            item = f"{where}: {path}"
            stored = choice.cache.read(key, item, map_hw=choice.grid.map_hw(grid_hw))
            if stored is None and not choice.falls_back:
                raise TeacherCacheError(
                    f"{item}: not in the cache {choice.cache.folder} of teacher {choice.name}; build the cache with "
                    f"this data, or set distillation.{choice.name}.on_miss=online"
                )
        targets.append(
            TeacherTarget(
                teacher=choice.name,
                features_EYX=None if stored is None else stored.features_EYX,
                scales_E=None if stored is None else stored.scales_E,
            )
        )
    return tuple(targets)

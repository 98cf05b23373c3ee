"""The teachers of a training run: the part for data workers, and the maps of a batch.

`training/prepare.py` builds them before anything is wrapped or sharded. `training/step.py` gets the maps of every
micro-batch before the student's forward pass, when a teacher's activations are already freed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixel_sail.distillation.cache import FeatureCache, StudentGrid, cache_identity, decode_map
from pixel_sail.distillation.choice import TeacherChoice
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.distillation.teacher import Teacher, TeacherSpec
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.types import Batch, DataError


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """All teachers of a run, in the order of their names."""

    choices: tuple[TeacherChoice, ...] = ()
    networks: Mapping[str, Teacher]
    """Teachers that run during training."""

    def maps(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Return for every teacher the float32 maps [E, h, w] of its images of a batch, in the order of the batch.

        Images and stored maps are moved to the device in their compact types before conversion to float32.
        """
        image_of = dict(zip(batch.original_image_index, batch.original_images, strict=True))
        found: dict[str, list[Tensor | None]] = {}
        waiting: dict[str, list[tuple[int, int]]] = {}
        pairs = zip(batch.teacher_names, batch.teacher_images, batch.teacher_maps, batch.teacher_scales, strict=True)
        for name, image, features, scales in pairs:
            own = found.setdefault(name, [])
            if features is None:
                waiting.setdefault(name, []).append((len(own), image))
                own.append(None)
            else:
                own.append(decode_map(features, scales))
        for name, places in waiting.items():
            computed = self.networks[name].features([image_of[index] for _, index in places])
            for (place, _), features in zip(places, computed, strict=True):
                found[name][place] = features
        return {name: [features for features in maps if features is not None] for name, maps in found.items()}


def student_grid(architecture: Architecture, site: str) -> StudentGrid:
    """Return the settings that determine the size of the student's map at a site."""
    cells = 2**architecture.num_upsample_blocks if site == "pixel_map" else 1
    return StudentGrid(
        site=site,
        patch_size=architecture.patch_size,
        max_long_side=architecture.max_long_side,
        cells_per_patch=cells,
        sizing=architecture.sizing,
    )


def checked_spec(
    name: str, settings: TeacherSettings, build: Callable[[Any, str], Any], *, allow_random: bool
) -> TeacherSpec:
    """Return the spec of an entry of `distillation`. Raises: DataError.

    `build` calls the function of a `_target_` node and names the node in its errors.
    """
    spec = build(settings.model, f"distillation.{name}.model")
    if not isinstance(spec, TeacherSpec):
        raise DataError(f"distillation.{name}.model: returned a {type(spec).__name__}, expected a TeacherSpec")
    if spec.is_random and not allow_random:
        raise DataError(
            f"distillation.{name}: its weights are random, expected trained ones; set its weights, or "
            "allow_random_teachers=true for a test"
        )
    if spec.channels != settings.channels:
        raise DataError(
            f"distillation.{name}.channels is {settings.channels}, expected {spec.channels}, those of this {spec.kind}"
        )
    return spec


def load_teachers(
    teachers: Mapping[str, TeacherSettings],
    architecture: Architecture,
    build: Callable[[Any, str], Any],
    *,
    sources: Sequence[str],
    allow_random: bool,
    device: torch.device,
) -> Teachers:
    """Return the teachers of a run; networks are loaded only if they may be needed.

    Raises: DataError for wrong weights, an unknown source, and a cache that does not fit.
    """
    choices, networks = [], {}
    for name in sorted(teachers):
        settings = teachers[name]
        unknown = sorted(set(settings.sources) - set(sources))
        if unknown:
            raise DataError(f"distillation.{name}.sources names {unknown}, but data.sources holds {sorted(sources)}")
        spec = checked_spec(name, settings, build, allow_random=allow_random)
        grid = student_grid(architecture, settings.site)
        cache = None
        if settings.cache is not None:
            identity = cache_identity(spec.identity(), precision=settings.precision, grid=grid)
            cache = FeatureCache(Path(settings.cache), identity, where=f"distillation.{name}.cache")
        choices.append(
            TeacherChoice(
                name=name,
                fraction=settings.fraction,
                sources=frozenset(settings.sources),
                masks_only=settings.masks_only,
                grid=grid,
                cache=cache,
                falls_back=settings.on_miss == "online",
            )
        )
        if settings.runs_online:
            networks[name] = Teacher(spec, device=device, precision=settings.precision, max_batch=settings.max_batch)
    return Teachers(choices=tuple(choices), networks=networks)

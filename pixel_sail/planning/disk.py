"""Disk space of a run.

`plan.py` uses it. Checkpoints hold all float32 parameters and the moments of trained ones, see training/checkpoint.py.
An old checkpoint is deleted only after the new one is complete.
"""

from collections.abc import Mapping

from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.patches import grid_size
from pixel_sail.planning.memory import moment_bytes
from pixel_sail.types import SizeHW

STATE_FILES = 20_000
"""state.json and manifest.json of a small mixture, headers of two safetensors files."""
EXPORT_FILES = 5_000_000
"""Tokenizer and configuration beside the exported weights; Qwen2.5's tokenizer has 11 MB, a small one 0.1."""


def checkpoint_bytes(
    num_parameters: int, *, trained: int | None = None, orthogonal: int = 0, is_averaged: bool = False
) -> int:
    """Return the size of one checkpoint. `trained`: how many parameters are not frozen, by default all; `orthogonal`:
    how many of them are Muon's."""
    count = num_parameters if trained is None else trained
    moments = moment_bytes(count, orthogonal=orthogonal, is_averaged=is_averaged)
    return 4 * num_parameters + round(moments) + STATE_FILES


def run_folder_bytes(checkpoint: int, *, exported: int, keep: int) -> int:
    """Return the maximum size of a run folder: kept checkpoints, the one being written, and the exported model."""
    return (keep + 1) * checkpoint + 4 * exported + EXPORT_FILES


def teacher_cache_bytes_per_image(architecture: Architecture, settings: TeacherSettings, image_hw: SizeHW) -> int:
    """Return the bytes of one image in an int8 cache of teacher features: one per value, and a scale per channel."""
    rows, columns = grid_size(image_hw, architecture.patch_size, architecture.max_long_side, architecture.sizing)
    cells_per_patch = 2**architecture.num_upsample_blocks if settings.site == "pixel_map" else 1
    return settings.channels * (rows * columns * cells_per_patch**2 + 4)


def all_cache_bytes(
    architecture: Architecture, teachers: Mapping[str, TeacherSettings], image_hw: SizeHW, num_images: int
) -> dict[str, int]:
    """Return the size of the cache of every teacher that has one."""
    return {
        name: num_images * teacher_cache_bytes_per_image(architecture, own, image_hw)
        for name, own in teachers.items()
        if own.cache is not None
    }

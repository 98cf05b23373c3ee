"""A teacher without a network: maps with the attributes of rendered objects.

`configs/distillation/attributes.yaml` names `attributes` below. `refshapes/attribute_maps.py` writes the maps as a
feature cache when the images are rendered. On synthetic images it replaces Mask2Former and SAM 2: an image [128, 128]
has a map [43, 16, 16] of colors, shapes, textures, sizes and places.
"""

from torch import nn

from pixel_sail.distillation.preprocess import PatchMultiple, Preprocessing
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.types import DataError

CELL_PX = 8
"""Side of a map cell in pixels."""
NUM_PLACES = 10
"""Places along each axis."""
CHANNELS = 10 + 6 + 4 + 2 + 2 * NUM_PLACES + 1
"""Colours, shapes, textures, sizes, columns, rows, and no object."""


def attributes() -> TeacherSpec:
    """Return the spec of the teacher whose maps come with the synthetic images; it cannot compute maps of others."""

    def build() -> nn.Module:
        raise DataError(
            "the attribute teacher: found an image without a stored map, expected the training images of "
            "RefShapes, with which the maps are written; keep the caches of distillation=attributes in the "
            "folder that was rendered with the images"
        )

    return TeacherSpec(
        # Part of the identity of caches on disk, so the text must not change.
        kind="drawn attributes",
        channels=CHANNELS,
        preprocessing=Preprocessing(resize=PatchMultiple(patch_size=CELL_PX, max_long_side=1024)),
        weights={},
        build=build,
    )

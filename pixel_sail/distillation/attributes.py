"""A teacher that needs no network: it knows the attributes of rendered objects.

`configs/distillation/attributes.yaml` names `attributes` below; `refshapes/attribute_maps.py` writes its maps when the
images are rendered, as a cache of features. It stands on synthetic images where Mask2Former and SAM 2 stand on images:
an image [128, 128] has a map [43, 16, 16] of colours, shapes, textures, sizes and places.
"""

from torch import nn

from pixel_sail.distillation.preprocess import PatchMultiple, Preprocessing
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.types import DataError

CELL_PX = 8
"""Side of a cell of the map, pixels."""
NUM_PLACES = 10
"""Along each axis."""
CHANNELS = 10 + 6 + 4 + 2 + 2 * NUM_PLACES + 1
"""Colours, shapes, textures, sizes, columns, rows, and no object."""


def attributes() -> TeacherSpec:
    """Return the spec of the teacher whose maps come with the synthetic images; it cannot be run on others."""

    def build() -> nn.Module:
        raise DataError(
            "the attribute teacher: found an image without a stored map, expected the training images of "
            "RefShapes, with which the maps are written; leave the caches of distillation=attributes at the "
            "folder that was rendered with the images"
        )

    return TeacherSpec(
        # A part of the identity of caches on disk, which keeps its text.
        kind="drawn attributes",
        channels=CHANNELS,
        preprocessing=Preprocessing(resize=PatchMultiple(patch_size=CELL_PX, max_long_side=1024)),
        weights={},
        build=build,
    )

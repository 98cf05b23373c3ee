"""Writes the outputs of a perfect teacher for synthetic images: maps of the attributes and positions of objects.

`formats.py` passes the maps of the training images, and this module writes them as the cache of the teacher
`pixel_sail/distillation/attributes.py`. A pixel of a red star at the left edge has 1 in the channels red, star, plain,
small, column 0 (of 10) and its row; a background pixel has 1 in the last of the 43 channels. A cell of the map is the
mean over 8 x 8 pixels: [43, 16, 16] for an image of 128 x 128.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pixel_sail.distillation.attributes import CELL_PX, CHANNELS, NUM_PLACES, attributes
from pixel_sail.distillation.cache import StoredMap, cache_identity, image_key
from pixel_sail.distillation.cache_writer import finish, plan_cache, start_folder, write_shard
from pixel_sail.refshapes.kinds import VALUES
from pixel_sail.refshapes.scene import Scene, SceneObject

AttributeMap = NDArray[np.int8]
LEVELS = 100
"""int8 value of a fully covered cell."""
IMAGES_PER_SHARD = 4096


def object_channels(item: SceneObject, image_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Return the channel values of every pixel of an object [CHANNELS]: its attributes and the position of its center.

    A center between two of the NUM_PLACES positions along an axis is interpolated between both.
    """
    named = [[float(getattr(item, name) == value) for value in values] for name, values in VALUES.items()]
    places = []
    for centre, extent in zip(item.centre_xy, reversed(image_hw), strict=True):
        position = np.clip(centre / extent * NUM_PLACES - 0.5, 0, NUM_PLACES - 1)
        places.append(np.clip(1.0 - np.abs(np.arange(NUM_PLACES) - position), 0.0, None))
    return np.concatenate([*named, *places, [0.0]]).astype(np.float32)


def attribute_map(scene: Scene) -> AttributeMap:
    """Return the map [CHANNELS, height / CELL_PX, width / CELL_PX] of a scene, in hundredths."""
    height, width = scene.image_hw
    rows, columns = height // CELL_PX, width // CELL_PX
    found = np.zeros((CHANNELS, rows, columns), dtype=np.float32)
    for item in scene.objects:
        fraction = item.mask.reshape(rows, CELL_PX, columns, CELL_PX).mean((1, 3), dtype=np.float32)
        found += object_channels(item, scene.image_hw)[:, None, None] * fraction
        found[-1] -= fraction
    found[-1] += 1.0
    levels: AttributeMap = np.rint(found * LEVELS).astype(np.int8)
    return levels


def write_attribute_maps(folder: Path, maps: Mapping[Path, AttributeMap]) -> None:
    """Write the maps of images as a feature cache, which training reads with `distillation=attributes`."""
    keyed = {image_key(path): levels for path, levels in maps.items()}
    identity = cache_identity(attributes().identity(), precision="fp32", grid=None)
    plan = plan_cache(list(keyed), identity, dtype="int8", images_per_shard=IMAGES_PER_SHARD)
    folder.mkdir(parents=True)
    start_folder(folder, plan)
    scales = torch.full((CHANNELS,), 1.0 / LEVELS)

    def stored(keys: Sequence[str]) -> tuple[dict[str, StoredMap], dict[str, str]]:
        return {key: StoredMap(features_EYX=torch.from_numpy(keyed[key]), scales_E=scales.clone()) for key in keys}, {}

    for number in range(len(plan.shards)):
        write_shard(folder, plan, number, stored)
    finish(folder, plan)

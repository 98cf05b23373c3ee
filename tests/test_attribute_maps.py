"""Attribute maps as a teacher: the maps of RefShapes' training images, their cache, and training from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pixel_sail.config import TrainConfig, build, load_config
from pixel_sail.distillation.attributes import CELL_PX, CHANNELS, NUM_PLACES
from pixel_sail.distillation.cache import TeacherCacheError, decode_map, image_key
from pixel_sail.distillation.teachers import load_teachers
from pixel_sail.refshapes import RefShapesSpec, write_refshapes
from pixel_sail.refshapes.attribute_maps import LEVELS, attribute_map, object_channels
from pixel_sail.refshapes.formats import sample_described_scene
from pixel_sail.refshapes.kinds import VALUES
from pixel_sail.types import DataError

GROUPS = [*(len(values) for values in VALUES.values()), NUM_PLACES, NUM_PLACES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_refshapes(folder / "refshapes", RefShapesSpec(num_train=6, num_eval=2, num_fully_annotated=1), num_workers=1)
    return folder


def teachers(data: Path, *overrides: str):
    options = ["experiment=quickstart", "distillation=attributes", f"paths.data={data}", *overrides]
    config = load_config("train", TrainConfig, options)
    return load_teachers(
        *(config.distillation, config.model.architecture, build),
        sources=["refshapes"],
        allow_random=False,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("index", range(4))
def test_a_cell_has_the_attribute_fractions_of_its_pixels(index: int) -> None:
    _, scene, _ = sample_described_scene(0, "train", index)
    found = attribute_map(scene)
    height, width = scene.image_hw
    assert found.shape == (CHANNELS, height // CELL_PX, width // CELL_PX) and found.dtype == np.int8
    # Pixel by pixel: every object has one value of each attribute, and its center counts one along each axis.
    covered = np.zeros(found.shape[1:])
    for item in scene.objects:
        channels = object_channels(item, scene.image_hw)
        sums = [group.sum() for group in np.split(channels[:-1], np.cumsum(GROUPS)[:-1])]
        assert sums == pytest.approx([1.0] * len(GROUPS))
        covered += item.mask.reshape(height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX).mean((1, 3))
    for group in np.split(found[:-1], np.cumsum(GROUPS)[:-1]):
        assert group.sum(0) / LEVELS == pytest.approx(covered, abs=0.05)
    assert found[-1] / LEVELS == pytest.approx(1 - covered, abs=0.01)
    for attribute, group in zip(VALUES, np.split(found[:22], np.cumsum(GROUPS[:4])[:-1]), strict=True):
        for channel, value in zip(group, VALUES[attribute], strict=True):
            mask = sum(
                (item.mask for item in scene.objects if getattr(item, attribute) == value), np.zeros((height, width))
            )
            assert channel.sum() / LEVELS * CELL_PX**2 == pytest.approx(
                mask.sum(), abs=0.005 * channel.size * CELL_PX**2
            )


def test_a_center_counts_for_its_two_neighbors() -> None:
    _, scene, _ = sample_described_scene(0, "train", 0)
    for item in scene.objects:
        places = np.split(object_channels(item, scene.image_hw)[22:42], 2)
        for place, centre, extent in zip(places, item.centre_xy, reversed(scene.image_hw), strict=True):
            assert np.count_nonzero(place) <= 2
            middles = (np.arange(NUM_PLACES) + 0.5) * extent / NUM_PLACES
            assert place @ middles == pytest.approx(np.clip(centre, middles[0], middles[-1]), abs=1e-3)


def test_training_images_have_a_map_and_others_do_not(data: Path) -> None:
    pixels, states = teachers(data).choices
    assert (pixels.name, states.name) == ("attribute_pixels", "attribute_states")
    assert states.cache is not None and len(states.cache) == 6
    images = sorted((data / "refshapes" / "images" / "train2014").iterdir())
    _, scene, _ = sample_described_scene(0, "train", 2)
    stored = states.cache.read(image_key(images[2]), "image", map_hw=(16, 16))
    assert stored is not None
    read = decode_map(stored.features_EYX, stored.scales_E)
    assert torch.allclose(read, torch.from_numpy(attribute_map(scene)).float() / LEVELS)
    assert states.cache.read(image_key(images[-1]), "image", map_hw=(16, 16)) is None


def test_the_teacher_does_not_open_images(data: Path) -> None:
    with pytest.raises(DataError, match=r"the attribute teacher: found an image without a stored map"):
        teachers(data, "distillation.attribute_states.on_miss=online")


def test_data_rendered_before_there_were_maps_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TeacherCacheError, match=r"index\.json is absent"):
        teachers(tmp_path)

"""RefShapes as grounded captions, MUSE and benchmark: the files load, and every mask is the synthetic one."""

import re

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pixel_sail.data.masks import decode_segmentation
from pixel_sail.data.sources import flickr_gcg, gcg_benchmark, grandf, muse, refcocog_gcg
from pixel_sail.refshapes.focus import SceneRules
from pixel_sail.refshapes.grounded_format import grounded_record, rectangles, write_grounded
from pixel_sail.refshapes.kinds import TEXTURES
from pixel_sail.refshapes.scene import encode_jpeg, paint_scene, sample_scene

MARKED = re.compile(r"<p> (.*?) </p> \[SEG\]")


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    images = out / "images" / "train2014"
    images.mkdir(parents=True)
    scenes, records = {}, []
    for image_id, split in enumerate(["train"] * 12 + ["val"] * 3 + ["testA"] * 2, start=1):
        scene = sample_scene(rng(image_id), SceneRules())
        name = f"COCO_train2014_{image_id:012d}.jpg"
        (images / name).write_bytes(encode_jpeg(paint_scene(rng(image_id), scene)))
        height, width = scene.image_hw
        image = {"id": image_id, "file_name": name, "height": height, "width": width}
        records.append({"split": split, "image": image, "grounded": grounded_record(rng(image_id), scene, image)})
        scenes[name] = scene
    write_grounded(out, records, images)
    return out, scenes


def objects_named(phrase, answer, scene):
    """Return the objects that a phrase of RefShapes denotes, from its words only."""
    words = [re.sub(r"(?<=s)es$|(?<!s)s$", "", word) for word in phrase.lower().split()[1:]]
    # In captions with textures, "a red star" is the plain one; in others it may be any.
    if set(TEXTURES) & set(answer.lower().split()) and not set(TEXTURES) & set(words):
        words.append("plain")
    return [{item.size, item.texture, item.colour, item.shape} >= set(words) for item in scene.objects]


@pytest.mark.parametrize("name", ["GranDf_HA", "OpenPsg", "RefCOCOg", "flickr_mergedGT"])
def test_shapes_load_through_every_caption_source_with_exact_masks(shapes, name):
    out, scenes = shapes
    load = {"RefCOCOg": refcocog_gcg.load, "flickr_mergedGT": flickr_gcg.load}.get(name, grandf.load)
    file = out / "glamm_data" / "annotations" / f"{name}{'' if name == 'OpenPsg' else '_'}GCG_train.json"
    source = load(annotations=file, image_dir=out / "images" / "train2014")
    assert len(source) == (6 if name in ("GranDf_HA", "OpenPsg") else 12)
    for index in range(len(source)):
        sample = source.get(index, rng(index))
        scene = scenes[sample.image_path.name]
        (turn,) = sample.turns
        phrases = MARKED.findall(turn.answer)
        assert sample.image_hw == scene.image_hw
        for phrase, mask in zip(phrases, turn.masks, strict=True):
            meant = objects_named(phrase, turn.answer, scene)
            expected = [item.mask for item, is_meant in zip(scene.objects, meant, strict=True) if is_meant]
            np.testing.assert_array_equal(mask, np.any(expected, axis=0))
        np.testing.assert_array_equal(np.any(turn.masks, axis=0), np.any([o.mask for o in scene.objects], axis=0))


def test_shapes_load_through_muse_with_exact_masks(shapes):
    out, scenes = shapes
    source = muse.load(annotations=out / "muse" / "MUSE_train.json", image_dir=out / "images" / "train2014")
    assert len(source) == 12
    for index in range(12):
        sample = source.get(index, rng(index))
        scene = scenes[sample.image_path.name]
        assert len(sample.turns) == 2
        for turn in sample.turns:
            name, value = re.match(r"Which objects have the (\w+) called (\w+)\?", turn.question).groups()
            expected = [item.mask for item in scene.objects if getattr(item, name) == value]
            np.testing.assert_array_equal(turn.masks, expected)


def test_shapes_load_as_benchmark(shapes):
    out, scenes = shapes
    root = out / "glamm_data" / "annotations" / "gcg_val_test"
    images = out / "images" / "train2014"
    items = {split: gcg_benchmark.load(root=root, split=split, image_dir=images) for split in ("val", "test")}
    assert [len(items["val"]), len(items["test"])] == [3, 2]
    for item in (*items["val"], *items["test"]):
        scene = scenes[item.image_path.name]
        assert item.image_path.is_file()
        assert item.image_hw == scene.image_hw
        assert all(phrase in item.captions[0] for phrase in item.phrases)
        areas = sum(int(coco_mask.area(mask)) for mask in item.masks)
        assert areas == sum(object_.area for object_ in scene.objects)


@pytest.mark.parametrize("seed", range(8))
def test_rectangles_decode_to_the_mask(seed):
    mask = rng(seed).random((9, 11)) < 0.5
    polygons = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in rectangles(mask)]
    np.testing.assert_array_equal(decode_segmentation(polygons, mask.shape, "x"), mask)
    assert rectangles(np.zeros((3, 4), dtype=bool)) == []

"""COCO panoptic and Pix2Cap files: real, synthetic and damaged ones are read correctly or rejected with a
reason."""

import copy
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from shared_data import shared_data
from synthetic_panoptic import (
    CATEGORIES,
    DATA,
    PIXELS,
    SEGMENTS,
    changed,
    changed_segment,
    json_file,
    mask_areas,
    pixels_of,
    save_png,
    write,
)

from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_segmentation, union_masks
from pixel_sail.data.panoptic import load_categories, open_panoptic
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.data.sources import coco_panoptic, coco_semantic, coco_vp, pix2cap_seg, pix2cap_vp
from pixel_sail.data.templates import segmentation
from pixel_sail.refshapes.formats import CATEGORY_ID, SCENE_RULES
from pixel_sail.refshapes.panoptic_format import write_panoptic
from pixel_sail.refshapes.scene import encode_jpeg, paint_scene, sample_scene
from pixel_sail.rle import encode_mask as shape_rle
from pixel_sail.types import DataError


@pytest.fixture(autouse=True)
def _index_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


# The files


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("Annotations/annotations", "Images/train2017"),
        ("annotations", "train2017"),
        ("annotations", "images/train2017"),
    ],
)
def test_every_layout_of_the_coco_folder_is_found(tmp_path, annotations, images):
    (tmp_path / images).mkdir(parents=True)
    file = open_panoptic(write(tmp_path, annotations=annotations), "train2017")
    image = file.image(1)
    assert (image.image_path, image.image_id, image.image_hw) == (tmp_path / images / "000000000005.jpg", 5, (4, 6))
    assert image.png_path.is_file()


def test_folders_may_be_given_one_by_one(tmp_path):
    write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "annotations" / "panoptic_train2017").rename(tmp_path / "pngs")
    file = open_panoptic(
        "nowhere", "any", annotations=json_file(tmp_path), png_dir=tmp_path / "pngs", image_dir=tmp_path / "elsewhere"
    )
    assert set(file.masks(file.image(1))) == {1, 2, 3, 8, 9, 70000}
    assert file.image(1).image_path == tmp_path / "elsewhere" / "000000000005.jpg"


def test_image_is_named_as_the_png_or_else_as_the_file_says(tmp_path):
    data = copy.deepcopy(DATA)
    data["images"][0]["file_name"] = "COCO_train2014_000000000005.jpg"
    file = open_panoptic(write(tmp_path, data), "train2017", image_dir=tmp_path)
    assert file.image(1).image_path.name == "000000000005.jpg"
    (tmp_path / "COCO_train2014_000000000005.jpg").touch()
    assert file.image(1).image_path.name == "COCO_train2014_000000000005.jpg"
    (tmp_path / "000000000005.jpg").touch()
    assert file.image(1).image_path.name == "000000000005.jpg"


def test_absent_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"found none of .*Annotations/annotations/panoptic_train2017\.json"):
        open_panoptic(tmp_path, "train2017")
    write(tmp_path)
    (tmp_path / "annotations" / "panoptic_train2017").rename(tmp_path / "away")
    with pytest.raises(DataError, match="expected the folder of panoptic PNGs"):
        open_panoptic(tmp_path, "train2017")
    with pytest.raises(DataError, match="expected the folder of panoptic PNGs"):
        open_panoptic(tmp_path, "train2017", png_dir=tmp_path / "nothing")


@pytest.mark.parametrize(("area", "differs"), [(400, True), (33, False), (3, False), (None, False), ("x", False)])
def test_a_segment_whose_pixels_are_not_the_stated_area_is_remarked(tmp_path, area, differs):
    data = copy.deepcopy(DATA)
    data["annotations"][1]["segments_info"][0]["area"] = area
    file = open_panoptic(write(tmp_path, data), "train2017")
    with collect_remarks() as heard:
        file.masks(file.image(1))
    found = [remark.message for remark in heard]
    assert found == (["segment 1 has 3 pixels in the PNG, the file states 400"] if differs else [])


def test_masks_are_the_pixels_of_their_colour(tmp_path):
    file = open_panoptic(write(tmp_path), "train2017")
    masks = file.masks(file.image(1))
    for number, mask in masks.items():
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, pixels_of(number))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda png: png.unlink(), "found no such PNG"),
        (lambda png: png.write_bytes(png.read_bytes()[:-30]), "cannot be decoded"),
        (lambda png: png.write_bytes(b"no image"), "cannot be decoded"),
        (lambda png: save_png(png, PIXELS.T), r"PNG of \(6, 4\) \(height, width\), expected \(4, 6\)"),
        (lambda png: save_png(png, np.where(PIXELS == 2, 0, PIXELS)), "found no pixel of segment 2"),
        (lambda png: save_png(png, np.where(PIXELS == 0, 77, PIXELS)), r"3 pixels of unlisted segments \(one is 77\)"),
        (lambda png: Image.fromarray(PIXELS.astype(np.uint8)).save(png), "mode L, expected 8-bit RGB"),
    ],
)
def test_wrong_png_is_rejected_with_file_and_record(tmp_path, damage, message):
    source = coco_panoptic.load(root=write(tmp_path))
    damage(tmp_path / "annotations" / "panoptic_train2017" / "000000000005.png")
    with pytest.raises(DataError, match=r"panoptic_train2017\.json: annotations\[1\] \(image_id 5\).*" + message):
        source.get(0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(image_id="5"), "found image_id = '5'"),
        (changed(image_id=6), "found 0 records with 6"),
        (changed(file_name=None), "found file_name = None"),
        (changed(file_name="5.jpg"), "found file_name = '5.jpg'"),
        (changed(segments_info=None), "found segments_info = None"),
        (changed(segments_info=[7]), r"segments_info\[0\]: found id = None"),
        (changed(segments_info=[*SEGMENTS, SEGMENTS[0]]), "found a segment id twice"),
        (changed_segment(1, id=0), r"segments_info\[1\]: found id 0"),
        (changed_segment(1, id=256**3), "expected 1 .. 16777215"),
        (changed_segment(1, category_id="dog"), "found category_id = 'dog'"),
        (changed_segment(1, category_id=1), "found category_id 1 of segment 2"),
        (changed_segment(1, iscrowd="no"), "found iscrowd = 'no'"),
        (changed_segment(1, description=3), "found description = 3"),
        (changed_segment(1, description="a [SEG] dog"), r"found '\[SEG\]' in a description"),
    ],
)
def test_malformed_record_is_kept_and_named_when_read(tmp_path, data, message):
    source = coco_panoptic.load(root=write(tmp_path, data))
    assert len(source) == 1
    with pytest.raises(DataError, match=message) as error:
        source.get(0, np.random.default_rng(0))
    assert "panoptic_train2017.json" in str(error.value)


def test_file_level_damage_is_rejected_when_the_source_is_made(tmp_path):
    twice = copy.deepcopy(DATA)
    twice["annotations"][0]["image_id"] = 5
    with pytest.raises(DataError, match="1 images with several records, for example image_id 5"):
        coco_panoptic.load(root=write(tmp_path / "a", twice))
    with pytest.raises(DataError, match=r"categories\[3\]: found id 18"):
        coco_panoptic.load(root=write(tmp_path / "b", {**DATA, "categories": [*CATEGORIES, CATEGORIES[0]]}))
    with pytest.raises(DataError, match="expected a list under 'categories'"):
        coco_panoptic.load(root=write(tmp_path / "c", {k: v for k, v in DATA.items() if k != "categories"}))


# RefShapes in these formats


@pytest.fixture
def sampled(tmp_path):
    """Return a folder with six synthetic images as panoptic and Pix2Cap files, and their scenes."""
    records, scenes = [], []
    (tmp_path / "images").mkdir()
    for index in range(6):
        rng = np.random.default_rng([7, index])
        scene = sample_scene(rng, SCENE_RULES["train"])
        name = f"COCO_train2014_{index + 1:012d}.jpg"
        (tmp_path / "images" / name).write_bytes(encode_jpeg(paint_scene(rng, scene)))
        objects = [
            {"category_id": CATEGORY_ID[item.shape], "segmentation": shape_rle(item.mask), "area": item.area,
             "bbox": [0, 0, 1, 1], "iscrowd": 0} for item in scene.objects
        ]  # fmt: skip
        image = {"id": index + 1, "file_name": name, "height": scene.image_hw[0], "width": scene.image_hw[1]}
        texts = [f"the {item.size} {item.colour} {item.shape} number {item.index}" for item in scene.objects]
        records.append({"image": image, "objects": objects, "descriptions": texts})
        scenes.append(scene)
    write_panoptic(tmp_path, records, CATEGORY_ID)
    return tmp_path, scenes


def test_synthetic_scenes_come_back_as_their_masks(sampled):
    root, scenes = sampled
    file = open_panoptic(root / "panoptic", "train", image_dir=root / "images")
    assert len(file) == len(scenes)
    for number, scene in enumerate(scenes):
        image = file.image(number)
        load_image(image.image_path, where="sampled", expected_hw=image.image_hw)
        masks = list(file.masks(image).values())
        for mask, item in zip(masks, scene.objects, strict=False):
            np.testing.assert_array_equal(mask, item.mask)
        assert sum(mask.astype(int) for mask in masks).tolist() == np.ones(scene.image_hw, dtype=int).tolist()
        assert {segment.description for segment in image.segments} == {""}
    record = json.loads((root / "panoptic/annotations/panoptic_train.json").read_text())["annotations"][0]
    assert [segment["area"] for segment in record["segments_info"]] == [
        int(mask.sum()) for mask in file.masks(file.image(0)).values()
    ]


def test_synthetic_scenes_make_samples_of_every_source(sampled):
    root, scenes = sampled
    place = {"root": root / "panoptic", "split": "train", "image_dir": root / "images"}
    described = root / "pix2cap" / "pix2cap_coco_train.json"
    instance, semantic = coco_panoptic.load(**place), coco_semantic.load(**place)
    for index, scene in enumerate(scenes):
        counts = Counter(item.shape for item in scene.objects)
        turns = instance.get(index, np.random.default_rng(index)).turns
        assert {turn.answer.split("-")[0]: len(turn.masks) for turn in turns if "-" in turn.answer} == counts
        assert sum(turn.answer == "background [SEG]." for turn in turns) == 1
        assert len(semantic.get(index, np.random.default_rng(index)).turns) == len(counts) + 1
    seg, vp = pix2cap_seg.load(file=described, **place), pix2cap_vp.load(file=described, **place)
    for index, scene in enumerate(scenes):
        for turn in seg.get(index, np.random.default_rng(index)).turns:
            found = re.search(r"number (\d+)", turn.question)
            if found:
                np.testing.assert_array_equal(turn.masks[0], scene.objects[int(found[1])].mask)
        assert vp.get(index, np.random.default_rng(index)).prompts


def test_scenes_without_a_text_for_every_object_are_rejected(tmp_path):
    record = {"image": {"id": 1, "file_name": "a.jpg", "height": 2, "width": 2}, "objects": [], "descriptions": ["x"]}
    with pytest.raises(DataError, match="1 descriptions, expected one for each of 0 objects"):
        write_panoptic(tmp_path, [record], CATEGORY_ID)


# Real files


def _lightly(split):
    root = shared_data("coco128_lightly")
    folder = root / "panoptic_segmentation" / "annotations"
    return {
        "root": root / "panoptic_segmentation", "split": split, "annotations": folder / f"panoptic_{split}.json",
        "png_dir": folder / f"panoptic_{split}", "image_dir": root / "images" / split,
    }  # fmt: skip


@pytest.mark.parametrize(("split", "num_segments", "num_crowds"), [("train2017", 1111, 6), ("val2017", 1078, 5)])
def test_shared_coco_panoptic_masks_have_the_stated_areas(split, num_segments, num_crowds):
    place = _lightly(split)
    file = open_panoptic(**place)
    records = json.loads(place["annotations"].read_text())["annotations"]
    segments = crowds = 0
    for number, record in enumerate(records):
        image = file.image(number)
        assert image.image_path.is_file()
        areas = {segment["id"]: segment["area"] for segment in record["segments_info"]}
        assert {number: int(mask.sum()) for number, mask in file.masks(image).items()} == areas
        segments += len(areas)
        crowds += sum(segment.is_crowd for segment in image.segments)
    assert (len(records), segments, crowds) == (100, num_segments, num_crowds)


def test_shared_coco_panoptic_has_133_names_to_speak():
    place = _lightly("train2017")
    categories = load_categories(place["annotations"])
    names = segmentation.spoken_names({k: v.name for k, v in categories.items()}, "shared")
    assert (len(set(names.values())), sum(category.is_thing for category in categories.values())) == (133, 80)
    assert not any("-" in name or "merged" in name for name in names.values())
    assert {names[199], names[177], names[184], names[187]} == {"wall", "wooden wall", "tree", "sky"}


def test_shared_coco_panoptic_makes_samples_of_every_image():
    place = _lightly("val2017")
    instance, semantic, regions = (m.load(**place) for m in (coco_panoptic, coco_semantic, coco_vp))
    assert (len(instance), len(semantic), len(regions)) == (100, 100, 100)
    num_ignored = 0
    for index in range(0, 100, 3):
        sample = instance.get(index, np.random.default_rng(index))
        load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        for turn in sample.turns:
            assert turn.answer.count("[SEG]") == len(turn.masks)
            lefts = [int(mask.any(axis=0).argmax()) for mask in turn.masks]
            assert lefts == sorted(lefts)
            num_ignored += turn.ignored is not None
        for turn in semantic.get(index, np.random.default_rng(index)).turns:
            assert turn.masks[0].any()
        assert 1 <= len(regions.get(index, np.random.default_rng(index)).prompts) <= 5
    assert num_ignored <= 5


def test_shared_panoptic_pngs_equal_their_rle_twins():
    root = shared_data("panopticapi_sample") / "sample_data"
    file = open_panoptic(
        root, "any", annotations=root / "panoptic_examples.json", png_dir=root / "panoptic_examples",
        image_dir=root / "input_images",
    )  # fmt: skip
    twins = json.loads((root / "panoptic_coco_detection_format.json").read_text())
    rows = twins["annotations"] if isinstance(twins, dict) else twins
    compared = 0
    for number in range(len(file)):
        image = file.image(number)
        load_image(image.image_path, where="shared", expected_hw=image.image_hw)
        masks = file.masks(image)
        for category_id in {segment.category_id for segment in image.segments}:
            own = [masks[s.segment_id] for s in image.segments if s.category_id == category_id]
            rles = [r for r in rows if r["image_id"] == image.image_id and r["category_id"] == category_id]
            other = [decode_segmentation(r["segmentation"], image.image_hw, "twin") for r in rles]
            np.testing.assert_array_equal(union_masks(own, image.image_hw), union_masks(other, image.image_hw))
            assert len(own) == len(other)
            compared += len(own)
    assert compared == 50


def test_shared_two_channel_pngs_are_rejected():
    root = shared_data("panopticapi_sample") / "sample_data"
    file = open_panoptic(
        root, "any", annotations=root / "panoptic_examples.json", png_dir=root / "panoptic_examples_2ch_format"
    )
    for number in range(2):
        with pytest.raises(DataError, match="found no pixel of segment"):
            file.masks(file.image(number))


def test_shared_coco_panoptic_with_texts_is_read_as_pix2cap(tmp_path):
    """Pix2Cap's file is not available: its texts are attached to COCO's segments, as in that file."""
    place = _lightly("train2017")
    data = json.loads(place.pop("annotations").read_text())
    for record in data["annotations"]:
        for number, segment in enumerate(record["segments_info"]):
            segment["description"] = f"Segment {segment['id']} is described." if number % 2 else ""
    file = tmp_path / "pix2cap_coco_train.json"
    file.write_text(json.dumps(data))
    num_usable = sum(len(record["segments_info"]) > 1 for record in data["annotations"])
    seg, vp = pix2cap_seg.load(file=file, **place), pix2cap_vp.load(file=file, **place)
    assert len(seg) == len(vp) == num_usable
    areas = {s["id"]: s["area"] for record in data["annotations"] for s in record["segments_info"]}
    for index in range(0, num_usable, 10):
        for turn in seg.get(index, np.random.default_rng(index)).turns:
            assert mask_areas(turn) == [areas[int(re.search(r"Segment (\d+) is", turn.question)[1])]]
        sample = vp.get(index, np.random.default_rng(index))
        by_area = sorted(int(prompt.mask.sum()) for prompt in sample.prompts)
        named = [re.search(r"Segment (\d+) is", turn.answer) for turn in sample.turns]
        assert sorted(areas[int(match[1])] for match in named if match) == by_area

"""Coordinates that look like fractions are rejected wherever regions are read; a pixel in the corner is accepted."""

import json

import numpy as np
import pytest
from PIL import Image
from test_reasonseg import shape, write

from pixel_sail.data.coordinates import check_pixels, look_like_fractions, shows_pixels
from pixel_sail.data.masks import decode_rle, decode_segmentation
from pixel_sail.data.records import open_records
from pixel_sail.data.sources import boxed_expressions, muse, osprey, refcocog_gcg
from pixel_sail.data.sources.reasonseg import expressions as reason_expressions
from pixel_sail.data.sources.refer import expressions, load, load_refer
from pixel_sail.predictor_io import Box, Point, region_mask
from pixel_sail.types import DataError

HW = (48, 64)
FRACTIONS = [0.1, 0.2, 0.6, 0.2, 0.6, 0.8, 0.1, 0.8]
CORNER = [0, 0, 1, 0, 1, 1, 0, 1]
PIXELS = [10, 10, 30, 10, 30, 20, 10, 20]
LOOK = r"within 0 \.\. 1 in an image of \(48, 64\) \(height, width\); such coordinates look like fractions"


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "index_cache"))


def test_fractions_and_pixels_are_distinguished_by_the_image_size():
    assert look_like_fractions(FRACTIONS, HW) and look_like_fractions([0.0, 1.02], HW)
    assert not look_like_fractions(PIXELS, HW) and not look_like_fractions([0.5, 1.2], HW)
    assert not look_like_fractions(FRACTIONS, (4, 4)) and not look_like_fractions([], HW)


def test_fractions_may_be_slightly_beyond_the_border():
    with pytest.raises(DataError, match="look like fractions"):
        check_pixels([-0.1, 0.2, 0.6, 0.2, 0.6, 0.8], (48, 64), "x")
    check_pixels([-3.0, 0.2, 0.6, 0.2, 0.6, 0.8], (48, 64), "x")


def test_the_pixel_in_the_corner_counts_where_the_file_shows_pixels():
    with pytest.raises(DataError, match=LOOK):
        decode_segmentation([CORNER], HW, "w")
    with pytest.raises(DataError, match=LOOK):
        decode_segmentation([CORNER], HW, "w", lambda: False)
    mask = decode_segmentation([CORNER], HW, "w", lambda: True)
    assert np.argwhere(mask).tolist() == [[0, 0]]
    with pytest.raises(DataError, match=LOOK):
        decode_segmentation([FRACTIONS], HW, "w", lambda: True)


def test_one_part_in_pixels_makes_the_corner_a_part():
    assert decode_segmentation([CORNER, PIXELS], HW, "w").sum() == 1 + 200


def test_a_file_is_searched_for_pixels(tmp_path):
    rle = {"size": [48, 64], "counts": [48 * 64]}
    files = {
        "fractions": [{"segmentation": [FRACTIONS], "id": 900, "bbox": [6, 9, 40, 20]}, {"a": [{"segmentation": rle}]}],
        "pixels": [{"annotation": [{"segmentation": [CORNER]}, {"segmentation": [PIXELS]}]}],
    }
    found = {}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        found[name] = shows_pixels(open_records(tmp_path / f"{name}.json"))
    assert found == {"fractions": False, "pixels": True}


def refer_folder(root, *segmentations):
    folder = root / "mine"
    folder.mkdir(parents=True)
    numbers = range(1, len(segmentations) + 1)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in numbers]
    annotations = [{"id": i, "image_id": i, "segmentation": s} for i, s in zip(numbers, segmentations, strict=True)]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    refs = [
        {
            "ref_id": i,
            "image_id": i,
            "ann_id": [i],
            "split": "val",
            "sentences": [{"sent_id": i, "sent": "a", "raw": "a"}],
        }
        for i in numbers
    ]
    (folder / "grefs(x).json").write_text(json.dumps(refs))
    return root


def test_a_refer_file_of_fractions_is_rejected_in_training_and_evaluation(tmp_path):
    refer_folder(tmp_path, [FRACTIONS], [CORNER])
    source = load(root=tmp_path, dataset="mine", split="val")
    for index in (0, 1):
        with pytest.raises(DataError, match=rf"grefs\(x\)\.json: ref_id {index + 1}, ann_id {index + 1}: .*{LOOK}"):
            source.get(index, np.random.default_rng(0))
    with pytest.raises(DataError, match=LOOK):
        expressions(load_refer(tmp_path, "mine", "val"))


def test_a_refer_file_in_pixels_may_have_a_region_of_one_pixel(tmp_path):
    items = expressions(load_refer(refer_folder(tmp_path, [PIXELS], [CORNER]), "mine", "val"))
    assert [int(decode_rle(item.target).sum()) for item in items] == [200, 1]


def test_boxes_of_fractions_are_rejected(tmp_path):
    record = {"image_id": 1, "local_image": "a.jpg", "expression": "a", "height": 48, "width": 64}
    for box, reason in (([0.1, 0.2, 0.6, 0.8], LOOK), ([0, 0, 1, 1], LOOK)):
        (tmp_path / "b.json").write_text(json.dumps([record | {"bbox_xyxy": box}]))
        with pytest.raises(DataError, match=reason):
            boxed_expressions.load(annotations=tmp_path / "b.json", image_dir=tmp_path)
    (tmp_path / "b.json").write_text(json.dumps([record | {"bbox_xyxy": box} for box in ([0, 0, 1, 1], [2, 3, 9, 9])]))
    items = boxed_expressions.load(annotations=tmp_path / "b.json", image_dir=tmp_path)
    assert [int(decode_rle(item.target).sum()) for item in items] == [1, 42]


def test_muse_osprey_and_refcocog_captions_of_fractions_are_rejected(tmp_path):
    answer = [{"segmentation": [FRACTIONS], "category_name": "mug"}]
    ref = {"sentence": "a mug", "segmentation": [FRACTIONS]}
    contents = {
        "muse": [{"file_name": "a.jpg", "height": 48, "width": 64, "questions": ["a?"], "answers": [answer]}],
        "osprey": [
            {"file_name": "a.jpg", "height": 48, "width": 64, "annotation": [{"segmentation": [FRACTIONS]}],
             "conversations": [{"from": "human", "value": "<region1>?"}, {"from": "gpt", "value": "A bus."}]}
        ],
        "gcg": [{"1": {"img_file_name": "a.jpg", "caption": "a mug", "refs": [ref]}}],
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    sources = [
        muse.load(annotations=tmp_path / "muse.json", image_dir=tmp_path),
        osprey.load(annotations=tmp_path / "osprey.json", image_dirs=[tmp_path], name="osprey"),
        refcocog_gcg.load(annotations=tmp_path / "gcg.json", image_dir=tmp_path),
    ]
    for source in sources:
        with pytest.raises(DataError, match=LOOK):
            source.get(0, np.random.default_rng(0))


@pytest.mark.parametrize("points", [[[0.1, 0.2], [0.6, 0.2], [0.6, 0.8]], [[0, 0], [1, 0], [1, 1]]])
def test_a_reasonseg_file_of_fractions_is_rejected_and_one_shape_in_pixels_makes_all_pixels(tmp_path, points):
    write(tmp_path / "one", shapes=[shape("target", points)], size_hw=HW)
    with pytest.raises(DataError, match=rf"a\.json: .*{LOOK}"):
        reason_expressions(root=tmp_path / "one", split="train")
    write(tmp_path / "two", shapes=[shape("target", points), shape("target", [[5, 5], [9, 5], [9, 9]])], size_hw=HW)
    (item,) = reason_expressions(root=tmp_path / "two", split="train")
    assert decode_rle(item.target)[0, 0]


def test_marks_given_as_fractions_are_rejected_and_whole_numbers_are_pixels():
    for region in (Box(0.1, 0.2, 0.6, 0.8), Box(0, 0, 0.5, 1), Point(0.5, 0.25)):
        with pytest.raises(DataError, match=LOOK):
            region_mask(region, HW, "prompt 0")
    assert region_mask(Box(0, 0, 1, 1), HW, "p").sum() == region_mask(Point(0, 1), HW, "p").sum() == 1
    assert region_mask(Box(0.5, 0.5, 3.5, 2), HW, "p").sum() == 8


def test_percentages_are_read_as_pixels():
    check_pixels([10.0, 20.0, 60.0, 80.0], HW, "w")

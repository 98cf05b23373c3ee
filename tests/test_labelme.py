"""LabelMe's shapes: each kind is rasterized as LabelMe draws it (pixels counted by hand); lines and points are
rejected."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from test_reasonseg import painted, rng, write

from pixel_sail.data.labelme import paint_shape, read_shape
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.sources.reasonseg import expressions, load
from pixel_sail.types import DataError

HW = (80, 100)


def shape(kind, points, label="target", **changes):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}, **changes}


def mask_of(kind, points, **changes):
    return paint_shape(read_shape(shape(kind, points, **changes), "w", is_ignored=False), HW)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "points",
    [
        [[10, 10], [60, 50]],
        [[60, 50], [10, 10]],
        [[60, 10], [10, 50]],
        [[10.9, 50.2], [60.9, 10.2]],
        [[10, 10], [60, 10], [60, 50], [10, 50]],
    ],
)
def test_a_rectangle_is_filled_whichever_corners_are_named(points):
    expected = np.zeros(HW, dtype=bool)
    expected[10:51, 10:61] = True
    np.testing.assert_array_equal(mask_of("rectangle", points), expected)


def test_a_circle_reaches_from_its_centre_to_the_point_on_it():
    mask = mask_of("circle", [[50, 40], [50, 60]])
    assert mask.sum() == 1257  # points of the plane with whole coordinates no further than 20 from one of them
    assert mask[20, 50] and mask[60, 50] and mask[40, 30] and not mask[19, 50] and not mask[21, 40]
    assert mask_of("circle", [[50, 40], [50, 40]]).sum() == 1
    assert mask_of("circle", [[0, 0], [3, 4]]).sum() == 26  # a quarter of 81, with its two radii


def test_a_mask_is_placed_in_its_rectangle_and_clipped_at_the_border():
    pixels = np.zeros((3, 4), dtype=np.uint8)
    pixels[0, 0], pixels[2, 3] = 255, 1
    for text in (png(pixels), png(pixels > 0)):
        mask = mask_of("mask", [[10, 20], [13, 22]], mask=text)
        assert np.argwhere(mask).tolist() == [[20, 10], [22, 13]]
    assert np.argwhere(mask_of("mask", [[-1, 77], [2, 79]], mask=png(pixels))).tolist() == [[79, 2]]
    assert np.argwhere(mask_of("mask", [[97, -2], [100, 0]], mask=png(pixels))).tolist() == []


@pytest.mark.parametrize("kind", [None, "", "polygon"])
def test_a_shape_without_a_type_is_a_polygon(kind):
    assert mask_of(kind, [[1, 1], [3, 1], [3, 3], [1, 3]]).sum() == 9


@pytest.mark.parametrize(
    "kind", ["line", "linestrip", "point", "points", "rotation", "cuboid", "Rectangle", 3, {"a": 1}]
)
def test_a_kind_without_area_or_unknown_is_rejected_by_name(kind):
    with pytest.raises(
        DataError, match=rf"^w: found shape_type {re.escape(repr(kind))}, expected one of \('polygon', 'rectangle', "
    ):
        mask_of(kind, [[1, 1], [3, 1], [3, 3]])


@pytest.mark.parametrize(
    ("kind", "points", "changes", "reason"),
    [
        ("rectangle", [[1, 1]], {}, "found a rectangle of 1 points, expected 2 or 4"),
        ("rectangle", [[5, 0], [10, 5], [5, 10], [0, 5]], {}, "found a rectangle that is turned"),
        ("circle", [[1, 1], [2, 2], [3, 3]], {}, "found a circle of 3 points, expected 2"),
        ("mask", [[1, 1], [2, 2]], {}, "found mask = None, expected str"),
        ("mask", [[1, 1], [2, 2]], {"mask": "iVBORw0KGgo="}, "found a mask that is not a PNG"),
        ("mask", [[1, 1], [2, 2]], {"mask": "?"}, "found a mask that is not a PNG"),
        ("mask", [[1, 1], [5, 2]], {"mask": png(np.ones((3, 5), np.uint8))}, r"mask of \(3, 5\).*expected \(2, 5\)"),
        ("mask", [[1, 1], [2, 2]], {"mask": png(np.zeros((2, 2), np.uint8))}, "without a pixel"),
    ],
)
def test_an_incomplete_shape_is_rejected(kind, points, changes, reason):
    with pytest.raises(DataError, match=reason):
        mask_of(kind, points, **changes)


def test_all_kinds_reach_training_and_evaluation(tmp_path):
    shapes = [
        shape("rectangle", [[30, 30], [10, 10]], group_id=1),
        shape("circle", [[60, 40], [60, 43]], group_id=1),
        shape("rectangle", [[11, 11], [12, 12]], "ignore"),
        shape("point", [[1, 1]], "flag"),
    ]
    write(tmp_path, shapes=shapes, size_hw=HW, imageHeight=80, imageWidth=100, imageData="AAAA")
    (item,) = expressions(root=tmp_path, split="train")
    assert int(decode_rle(item.target).sum()) == 21 * 21 - 4 + 29
    assert int(decode_rle(item.ignored).sum()) == 4
    (turn,) = load(root=tmp_path).get(0, rng()).turns
    np.testing.assert_array_equal(turn.masks[0], decode_rle(item.target))


def test_a_line_called_target_is_rejected_and_a_file_of_it_is_no_missing_target(tmp_path):
    write(tmp_path, shapes=[shape("linestrip", [[10, 10], [60, 10], [60, 50]])], size_hw=HW)
    with pytest.raises(DataError, match=r"a\.json: shape 0: found shape_type 'linestrip'"):
        expressions(root=tmp_path, split="train")
    with pytest.raises(DataError, match="linestrip"):
        load(root=tmp_path).get(0, rng())


@pytest.mark.parametrize("label", ["_background_", "Negative"])
def test_a_label_that_names_no_target_is_rejected(tmp_path, label):
    with pytest.raises(DataError, match="shape 0: found the label"):
        painted(tmp_path, shape("polygon", [[1, 1], [6, 1], [6, 5]], label))


@pytest.mark.parametrize(
    ("stated_hw", "exif"), [((100, 80), None), ((160, 200), None), ((80, 100), 6)], ids=["turned", "resized", "exif"]
)
def test_a_file_that_states_another_size_than_the_image_is_rejected(tmp_path, stated_hw, exif):
    shapes = [shape("rectangle", [[30, 30], [10, 10]])]
    write(tmp_path, shapes=shapes, size_hw=HW, exif=exif, imageHeight=stated_hw[0], imageWidth=stated_hw[1])
    with pytest.raises(DataError, match=r"found imageHeight and imageWidth \(\d+, \d+\), expected \(\d+, \d+\)"):
        expressions(root=tmp_path, split="train")


def test_a_file_that_states_the_upright_size_of_a_turned_image_is_read(tmp_path):
    shapes = [shape("rectangle", [[30, 30], [10, 10]])]
    write(tmp_path, shapes=shapes, size_hw=HW, exif=6, imageHeight=100, imageWidth=80)
    (item,) = expressions(root=tmp_path, split="train")
    assert item.image_hw == (100, 80) and int(decode_rle(item.target).sum()) == 441


def test_a_target_outside_the_image_is_rejected(tmp_path):
    write(tmp_path, shapes=[shape("rectangle", [[30, 90], [10, 99]])], size_hw=HW)
    with pytest.raises(DataError, match=r"shape 0: found a rectangle without a pixel in the image of \(80, 100\)"):
        expressions(root=tmp_path, split="train")

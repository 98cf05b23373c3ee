"""Every COCO segmentation format decodes to the same boolean mask; damaged ones raise an error with the reason."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from pixel_sail.data.masks import (
    check_rle,
    decode_rle,
    decode_segmentation,
    merge_to_rle,
    summed_as_released,
    union_masks,
)
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError

SIZE_HW = (4, 4)
FIRST_SQUARE = [0, 0, 2, 0, 2, 2, 0, 2]
SECOND_SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]
TWO_SQUARES = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
RUNS_DOWN_COLUMNS = [0, 2, 2, 3, 2, 2, 5]


def test_overlapping_polygons_are_united_not_summed():
    mask = decode_segmentation([FIRST_SQUARE, SECOND_SQUARE], SIZE_HW, "test")
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, TWO_SQUARES)


def test_overlapping_instances_are_united_not_summed():
    rle = merge_to_rle([[FIRST_SQUARE], {"size": [4, 4], "counts": RUNS_DOWN_COLUMNS}], SIZE_HW, "test")
    np.testing.assert_array_equal(decode_rle(rle), TWO_SQUARES)
    assert json.loads(json.dumps(rle)) == {"size": [4, 4], "counts": "02210O3"}


@pytest.mark.parametrize("counts", [RUNS_DOWN_COLUMNS, "02210O3", b"02210O3"])
def test_all_run_length_forms_give_the_same_mask(counts):
    mask = decode_segmentation({"size": [4, 4], "counts": counts}, SIZE_HW, "test")
    np.testing.assert_array_equal(mask, TWO_SQUARES)


def test_height_comes_first():
    mask = np.zeros((2, 5), dtype=bool)
    mask[1, 4] = True
    rle = encode_mask(mask)
    assert rle["size"] == [2, 5]
    np.testing.assert_array_equal(decode_segmentation(rle, (2, 5), "test"), mask)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_encoded_masks_come_back_and_pass_the_check(density):
    rng = np.random.default_rng(7)
    mask = rng.random((61, 83)) < density
    rle = check_rle(encode_mask(mask), (61, 83), "test")
    np.testing.assert_array_equal(decode_rle(rle), mask)


def test_long_runs_pass_the_check():
    mask = np.zeros((1000, 900), dtype=bool)
    mask[3:700, 400:800] = True
    assert decode_rle(check_rle(encode_mask(mask), None, "test")).sum() == 697 * 400


def test_union_of_masks():
    top, left = np.zeros(SIZE_HW, dtype=bool), np.zeros(SIZE_HW, dtype=bool)
    top[0], left[:, 0] = True, True
    assert union_masks([top, left], SIZE_HW).sum() == 7
    assert union_masks([], SIZE_HW).sum() == 0
    assert top.sum() == 4, "inputs must not change"


def test_union_rejects_masks_of_another_size():
    with pytest.raises(DataError, match=r"mask 0 is \(4, 5\), expected"):
        union_masks([np.zeros((4, 5), dtype=bool)], SIZE_HW)


def test_summed_masks_cannot_be_encoded():
    with pytest.raises(DataError, match="expected \\[height, width\\] of bool"):
        encode_mask(TWO_SQUARES.astype(np.uint8) * 2)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[0, 0, 2, 0, 2, 2, 0]], "7 numbers"),
        ([[0, 0, 2, 2]], "4 numbers"),
        ([[], [0, 0, 2, 2]], "polygon 0: found 0 numbers"),
        ([FIRST_SQUARE, [0, 0, 2]], "polygon 1: found 3 numbers"),
        ([FIRST_SQUARE, [0, "1"]], "polygon 1: found coordinate '1'"),
        ([FIRST_SQUARE, {"size": [4, 4], "counts": [16]}], "polygons and run-length encodings in one list"),
        ([{"size": [4, 5], "counts": [20]}], r"part 0: found RLE size \[4, 5\], expected \[4, 4\]"),
        ([{"size": [4, 4], "counts": [16]}, {"size": [4, 4], "counts": [15]}], "part 1: found RLE runs that cover 15"),
        ([], "empty polygon list"),
        ([0, 0, 2, 0, 2, 2], "wrap a single polygon"),
        ([[0, 0, 2, 0, float("nan"), 2]], "coordinate nan"),
        ([[0, 0, 2, 0, 1e300, 2]], "coordinate 1e"),
        ([[0, 0, 2, 0, "2", 2]], "coordinate '2'"),
        (None, "type NoneType"),
        ({"size": [4, 5], "counts": RUNS_DOWN_COLUMNS}, r"size \[4, 5\], expected \[4, 4\]"),
        ({"size": [4], "counts": RUNS_DOWN_COLUMNS}, "expected \\[height, width\\]"),
        ({"size": [4, 4], "counts": [0, 2, 2]}, "cover 4 pixels"),
        ({"size": [4, 4], "counts": [0, -2, 18]}, "shortest run -2"),
        ({"size": [4, 4], "counts": [0.0, 16]}, "expected integers"),
        ({"size": [4, 4], "counts": "02210O"}, "cover 11 pixels"),
        ({"size": [4, 4], "counts": "02210o"}, "do not parse"),
        ({"size": [4, 4], "counts": "\ud800"}, "do not parse"),
        ({"size": [4, 4], "counts": "no counts"}, "do not parse"),
        ({"size": [4, 4]}, "expected a compressed RLE"),
    ],
)
def test_damaged_segmentation_is_rejected_with_place_and_reason(segmentation, reason):
    with pytest.raises(DataError, match=reason) as caught:
        decode_segmentation(segmentation, SIZE_HW, "file.json: annotation 12")
    assert str(caught.value).startswith("file.json: annotation 12")


@pytest.mark.parametrize("counts", [RUNS_DOWN_COLUMNS, "02210O3", b"02210O3"])
def test_a_list_of_one_encoding_is_that_encoding(counts):
    segmentation = [{"size": [4, 4], "counts": counts}]
    np.testing.assert_array_equal(decode_segmentation(segmentation, SIZE_HW, "test"), TWO_SQUARES)
    assert summed_as_released(segmentation * 2, SIZE_HW, "test") is None


def test_a_list_of_encodings_is_their_union():
    parts = [encode_mask(decode_segmentation([square], SIZE_HW, "t")) for square in (FIRST_SQUARE, SECOND_SQUARE)]
    np.testing.assert_array_equal(decode_segmentation(parts, SIZE_HW, "test"), TWO_SQUARES)
    np.testing.assert_array_equal(decode_rle(merge_to_rle([parts], SIZE_HW, "test")), TWO_SQUARES)


@pytest.mark.parametrize("short", [[], [0, 0], [3, 3, 3, 4], (1, 1, 4, 4)])
def test_a_short_polygon_among_good_ones_is_skipped_and_remarked(short):
    with collect_remarks() as heard:
        mask = decode_segmentation([FIRST_SQUARE, short, SECOND_SQUARE], SIZE_HW, "f.json: annotation 12")
    np.testing.assert_array_equal(mask, TWO_SQUARES)
    assert [(r.topic, r.where) for r in heard] == [("short polygon", "f.json: annotation 12")]
    assert [r.message for r in heard] == ["skipped 1 of 3 polygons, polygon 1 has fewer than three points"]


def test_an_unhandled_remark_is_logged_once_per_file(caplog):
    for number, file in enumerate(("once.json", "once.json", "another.json")):
        decode_segmentation([FIRST_SQUARE, []], SIZE_HW, f"{file}: annotation {number}")
    assert [record.args[0] for record in caplog.records] == ["once.json: annotation 0", "another.json: annotation 2"]


def test_the_sum_as_released_leaves_short_polygons_out_as_the_union_does():
    plain = summed_as_released([[FIRST_SQUARE, SECOND_SQUARE]], SIZE_HW, "t")
    assert plain is not None and plain == summed_as_released([[FIRST_SQUARE, [1, 1], SECOND_SQUARE]], SIZE_HW, "t")


def test_merging_nothing_is_rejected():
    with pytest.raises(DataError, match="no segmentation"):
        merge_to_rle([], SIZE_HW, "test")


def test_run_check_agrees_with_pycocotools_on_polygons():
    rng = np.random.default_rng(3)
    for _ in range(50):
        polygon = rng.uniform(-10, 110, size=12).tolist()
        rle = merge_to_rle([[polygon]], (90, 100), "test")
        assert decode_rle(check_rle(rle, (90, 100), "test")).sum() == coco_mask.area(rle)


MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda size: arrays(np.bool_, size, elements=st.booleans())
)


@given(MASKS)
def test_any_mask_comes_back_from_its_encoding(mask):
    rle = encode_mask(mask)
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(decode_rle(check_rle(rle, mask.shape, "sampled")), mask)
    np.testing.assert_array_equal(decode_segmentation(rle | {"counts": rle["counts"].encode()}, mask.shape, "w"), mask)


@given(MASKS)
def test_uncompressed_and_compressed_runs_mean_the_same(mask):
    flat = mask.ravel(order="F")
    runs, value = [], False
    for pixel in flat.tolist():
        if pixel == value and runs:
            runs[-1] += 1
        elif pixel == value:
            runs.append(1)
        else:
            runs += [1] if runs else [0, 1]
            value = pixel
    found = decode_segmentation({"size": list(mask.shape), "counts": runs}, mask.shape, "sampled")
    np.testing.assert_array_equal(found, mask)


@given(st.lists(MASKS.map(lambda mask: mask[:1, :1]), min_size=1, max_size=4))
def test_a_union_is_or_whatever_the_order(masks):
    union = union_masks(masks, (1, 1))
    assert union.dtype == np.bool_ and bool(union) == any(bool(mask) for mask in masks)
    np.testing.assert_array_equal(union_masks(masks[::-1], (1, 1)), union)


@given(st.text(max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_counts_that_are_not_a_mask_are_rejected_by_name(counts, height, width):
    try:
        rle = check_rle({"size": [height, width], "counts": counts}, (height, width), "sampled")
    except DataError as error:
        assert str(error).startswith("sampled")
    else:
        assert decode_rle(rle).shape == (height, width)

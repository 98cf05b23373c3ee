"""IoU scores on hand-computed examples, and on 305 real mask pairs with independently computed scores."""

import json

import numpy as np
import pytest
from shared_data import shared_data

from pixel_sail.metrics.iou import IoUSums
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError


def _mask(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


EMPTY = _mask("....", "....", "....", "....")
TOP_LEFT = _mask("##..", "##..", "....", "....")
TOP_ROWS = _mask("####", "####", "....", "....")
SHIFTED = _mask(".##.", ".##.", "....", "....")
CORNER = _mask("....", "....", "....", "...#")


def test_hand_computed_pairs():
    sums = IoUSums()
    for prediction, target in [(TOP_LEFT, TOP_ROWS), (SHIFTED, TOP_LEFT), (CORNER, TOP_LEFT), (TOP_ROWS, TOP_ROWS)]:
        sums = sums.add(IoUSums.from_masks(prediction, target))
    assert (sums.intersection, sums.union) == (4 + 2 + 0 + 8, 8 + 6 + 5 + 8)
    scores = sums.summary()
    assert scores["ciou"] == pytest.approx(14 / 27, abs=1e-12)
    assert scores["giou"] == pytest.approx((1 / 2 + 1 / 3 + 0 + 1) / 4, abs=1e-12)
    assert (scores["p50"], scores["p60"], scores["p90"]) == (0.5, 0.25, 0.25)
    assert (scores["count"], scores["missing"]) == (4, 0)
    assert "n_acc" not in scores


def test_iou_equal_to_a_threshold_is_a_hit():
    target = np.zeros((10, 10), dtype=bool)
    target[0] = True
    for index, num_pixels in enumerate((5, 6, 7, 8, 9)):
        prediction = np.zeros_like(target)
        prediction[0, :num_pixels] = True
        assert IoUSums.from_masks(prediction, target).hits == (1,) * (index + 1) + (0,) * (4 - index)


def test_missing_prediction_is_an_empty_mask_and_is_counted():
    missing = IoUSums.from_masks(None, TOP_LEFT)
    empty = IoUSums.from_masks(EMPTY, TOP_LEFT)
    assert (missing.missing, empty.missing) == (1, 0)
    assert (missing.intersection, missing.union, missing.iou_sum) == (0, 4, 0.0)
    assert (missing.intersection, missing.union, missing.iou_sum) == (empty.intersection, empty.union, empty.iou_sum)


@pytest.mark.parametrize("target", [None, EMPTY])
@pytest.mark.parametrize("empty_iou", [0.0, 1.0])
def test_pair_without_pixels_counts_as_configured(target, empty_iou):
    sums = IoUSums.from_masks(EMPTY, target, empty_iou=empty_iou)
    assert (sums.iou_sum, sums.union, sums.hits) == (empty_iou, 0, (int(empty_iou),) * 5)
    assert sums.summary()["giou"] == sums.summary()["ciou"] == empty_iou


def test_no_target_and_target_accuracy():
    sums = IoUSums()
    for prediction, target in [(EMPTY, None), (None, None), (CORNER, None), (EMPTY, TOP_LEFT), (CORNER, TOP_LEFT)]:
        sums = sums.add(IoUSums.from_masks(prediction, target))
    scores = sums.summary()
    assert scores["n_acc"] == pytest.approx(2 / 3, abs=1e-12)
    assert scores["t_acc"] == 0.5
    assert scores["missing"] == 1
    assert (sums.intersection, sums.union) == (0, 0 + 0 + 1 + 4 + 5)


def test_false_positive_on_no_target_adds_to_the_union():
    sums = IoUSums.from_masks(TOP_LEFT, TOP_LEFT).add(IoUSums.from_masks(TOP_LEFT, None))
    assert sums.summary()["ciou"] == 0.5


def test_rles_and_masks_give_identical_sums():
    rng = np.random.default_rng(0)
    for _ in range(30):
        prediction, target = rng.random((2, 17, 23)) < rng.random()
        from_rles = IoUSums.from_rles(encode_mask(prediction), encode_mask(target))
        assert from_rles == IoUSums.from_masks(prediction, target)
    assert IoUSums.from_rles(None, encode_mask(TOP_LEFT)) == IoUSums.from_masks(None, TOP_LEFT)


def test_ignored_pixels_are_in_neither_mask():
    # Without the top row: 2 pixels predicted, 4 in the target, 2 in common.
    ignored = _mask("####", "....", "....", "....")
    sums = IoUSums.from_masks(TOP_LEFT, TOP_ROWS, ignored=ignored)
    assert (sums.intersection, sums.union, sums.iou_sum) == (2, 4, 0.5)
    # The prediction becomes empty: right for an expression without target, otherwise a miss.
    assert IoUSums.from_masks(TOP_LEFT, None, ignored=TOP_ROWS).num_no_target_correct == 1
    assert IoUSums.from_masks(TOP_LEFT, CORNER, ignored=TOP_ROWS).num_target_nonempty == 0
    assert IoUSums.from_masks(CORNER, TOP_LEFT, ignored=TOP_ROWS).num_no_target == 1


def test_ignored_rles_and_masks_give_identical_sums():
    rng = np.random.default_rng(1)
    for _ in range(30):
        prediction, target, ignored = rng.random((3, 17, 23)) < rng.random()
        rles = [encode_mask(mask) for mask in (prediction, target, ignored)]
        expected = IoUSums.from_masks(prediction & ~ignored, target & ~ignored)
        assert IoUSums.from_rles(rles[0], rles[1], ignored=rles[2]) == expected
        assert IoUSums().update(rles[0], rles[1], ignored=rles[2]) == expected
        assert IoUSums.from_masks(prediction, target, ignored=ignored) == expected
        assert IoUSums.from_rles(None, rles[1], ignored=rles[2]) == IoUSums.from_masks(None, target & ~ignored)


def test_ignored_region_must_have_the_size_of_the_masks():
    ignored = np.zeros((4, 5), dtype=bool)
    with pytest.raises(DataError, match=r"item 3: found an ignored region of size \[4, 5\], expected \[4, 4\]"):
        IoUSums.from_masks(TOP_LEFT, None, ignored=ignored, where="item 3")
    with pytest.raises(DataError, match=r"item 3: found an ignored region of size \[4, 5\], expected \[4, 4\]"):
        IoUSums.from_rles(None, encode_mask(TOP_LEFT), ignored=encode_mask(ignored), where="item 3")


def test_update_and_add_leave_their_inputs_alone():
    start = IoUSums()
    updated = start.update(encode_mask(TOP_LEFT), encode_mask(TOP_ROWS))
    assert start == IoUSums()
    assert updated.add(updated).count == 2
    assert updated.count == 1


@pytest.mark.parametrize(("prediction_hw", "target_hw"), [((4, 5), (5, 4)), ((4, 4), (4, 5))])
def test_sizes_must_agree(prediction_hw, target_hw):
    prediction, target = np.zeros(prediction_hw, dtype=bool), np.zeros(target_hw, dtype=bool)
    with pytest.raises(DataError, match="item 3: found a prediction of size"):
        IoUSums.from_masks(prediction, target, where="item 3")
    with pytest.raises(DataError, match="item 3: found a prediction of size"):
        IoUSums().update(encode_mask(prediction), encode_mask(target), where="item 3")


def test_masks_with_other_values_than_true_and_false_are_rejected():
    with pytest.raises(DataError, match="target of uint8"):
        IoUSums.from_masks(TOP_LEFT, TOP_LEFT.astype(np.uint8))


def test_summary_of_nothing_is_rejected():
    with pytest.raises(DataError, match="0 scored pairs"):
        IoUSums().summary()


def test_305_real_pairs_give_the_independent_numbers():
    content = json.loads((shared_data("derived_iou_pairs") / "pairs.json").read_text())
    expected = json.loads((shared_data("derived_iou_pairs") / "summary.json").read_text())
    sums = IoUSums()
    for pair in content["pairs"]:
        sums = sums.update(pair["pred"], pair["gt"])
    scores = sums.summary()
    assert sums.count == expected["n_pairs"] == 305
    assert sums.intersection == expected["cumulative_intersection"]
    assert sums.union == expected["cumulative_union"]
    assert scores["ciou"] == pytest.approx(expected["cIoU(oIoU)"], abs=1e-9)
    assert scores["giou"] == pytest.approx(expected["mIoU/gIoU(mean over pairs)"], abs=1e-9)
    for name, expected_name in [
        ("p50", "P@0.5"),
        ("p60", "P@0.6"),
        ("p70", "P@0.7"),
        ("p80", "P@0.8"),
        ("p90", "P@0.9"),
    ]:
        assert scores[name] == pytest.approx(expected[expected_name], abs=1e-9)

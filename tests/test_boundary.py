"""Boundary IoU against a per-pixel erosion, and against values computed by hand."""

from pathlib import Path

import numpy as np
import pytest

from pixel_sail.evaluation.predictions import measure_boundaries, measure_predictions
from pixel_sail.metrics.boundary import boundary_sums, rim, rim_width
from pixel_sail.rle import encode_mask
from pixel_sail.types import Expression, Prediction


def slow_rim(mask, width):
    result = np.zeros_like(mask)
    padded = np.pad(mask, width)
    for row, column in zip(*np.nonzero(mask), strict=True):
        result[row, column] = not padded[row : row + 2 * width + 1, column : column + 2 * width + 1].all()
    return result


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_rim_is_what_a_repeated_erosion_takes_away(width):
    rng = np.random.default_rng(width)
    blobs = np.kron(rng.random((4, 5)) < 0.6, np.ones((6, 6))).astype(bool)
    for mask in (blobs, np.ones((9, 12), bool), np.zeros((5, 5), bool)):
        np.testing.assert_array_equal(rim(mask, width), slow_rim(mask, width))


def square(row, column, side=40, size_hw=(128, 128)):
    mask = np.zeros(size_hw, bool)
    mask[row : row + side, column : column + side] = True
    return mask


def test_a_square_moved_by_two_pixels():
    assert rim_width((128, 128)) == 4
    # Rims of width 4 have 40² - 32² = 576 pixels. Moved by 2, upper and lower bar (4 rows) share 38 pixels in each of
    # their rows, 2 * 4 * 38; left and right bar share 2 columns of the 32 rows in between, 2 * 2 * 32; and each reaches
    # into the other's bar nowhere else.
    both = 2 * 4 * 38 + 2 * 2 * 32
    assert boundary_sums(square(30, 32), square(30, 30)).iou_sum == pytest.approx(both / (2 * 576 - both))


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        (None, square(3, 3), 0.0),
        (square(3, 3), square(3, 3), 1.0),
        (square(80, 80), square(3, 3), 0.0),
        (None, np.zeros((128, 128), bool), 1.0),
    ],
)
def test_the_ends_of_the_scale(prediction, target, expected):
    assert boundary_sums(prediction, target).iou_sum == expected


def test_predictions_are_scored_by_expression_and_ignored_pixels_do_not_count():
    target, ignored = square(30, 30), square(30, 30, side=10)
    item = {"sent_id": 0, "image_id": 1, "image_path": Path("one.jpg"), "image_hw": (128, 128), "text": "it"}
    expressions = [
        Expression(ref_id=1, target=encode_mask(target), ignored=encode_mask(ignored), **item),
        Expression(ref_id=2, target=encode_mask(target), **item),
        Expression(ref_id=3, target=None, **item),
    ]
    exact = Prediction(
        ref_id=1, sent_id=0, image_id=1, text="it", segmentation=encode_mask(target & ~ignored), answer=""
    )
    moved = Prediction(ref_id=2, sent_id=0, image_id=1, text="it", segmentation=encode_mask(square(30, 32)), answer="")
    nothing = Prediction(ref_id=3, sent_id=0, image_id=1, text="it", segmentation=None, answer="")
    measured = measure_boundaries(expressions, [moved, exact, nothing])
    alone = boundary_sums(square(30, 32), target).iou_sum
    assert measured.scores["boundary_iou"] == pytest.approx((2 + alone) / 3)
    assert measured.fractions["boundary_iou"].numerators_N.tolist() == pytest.approx([1.0, alone, 1.0])
    # The other scores stay what they are without boundaries.
    plain = measure_predictions(expressions, [moved, exact, nothing])
    assert {name: measured.scores[name] for name in plain.scores} == plain.scores

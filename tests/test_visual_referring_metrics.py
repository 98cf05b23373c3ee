"""Scores of questions with several masks per answer, in all protocols, and the sums of the released scripts."""

import numpy as np
import pytest

from pixel_sail.metrics.released_iou import ReleasedIoUSums
from pixel_sail.metrics.visual_referring import perbench_overall, score_each, score_first_as_released, score_union
from pixel_sail.rle import encode_mask
from pixel_sail.types import RLE, DataError


def _columns(*columns: int) -> RLE:
    """Columns of four pixels in an image of 4 x 8."""
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, list(columns)] = True
    return encode_mask(mask)


LEFT, RIGHT, BOTH, NOTHING = _columns(0), _columns(7), _columns(0, 7), _columns()

# Predictions, targets; then intersection, union and IoU sum of `standard`, of `each`, of `paper`.
CASES = {
    "exact": ([LEFT], [LEFT], (4, 4, 1), (4, 4, 1), (4, 4, 1)),
    "second target missed": ([LEFT], [LEFT, RIGHT], (4, 8, 0.5), (4, 8, 1), (4, 4, 1)),
    "both in one mask": ([BOTH], [LEFT, RIGHT], (8, 8, 1), (4, 12, 0.5), (4, 8, 0.5)),
    "exchanged": ([RIGHT, LEFT], [LEFT, RIGHT], (8, 8, 1), (0, 16, 0), (0, 8, 0)),
    "one too many": ([LEFT, RIGHT], [LEFT], (4, 8, 0.5), (4, 8, 1), (4, 4, 1)),
    "overlapping parts": ([BOTH, RIGHT], [BOTH], (8, 8, 1), (8, 12, 1), (8, 8, 1)),
    "no mask": ([], [LEFT, RIGHT], (0, 8, 0), (0, 8, 0), (0, 0, 0)),
    "empty mask": ([NOTHING], [LEFT], (0, 4, 0), (0, 4, 0), (0, 4, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_question_in_three_protocols(case):
    predictions, targets, union, each, paper = CASES[case]
    for score, expected in [(score_union, union), (score_each, each), (score_first_as_released, paper)]:
        sums = score(predictions, targets, where="item")
        assert (sums.intersection, sums.union) == expected[:2], score.__name__
        assert sums.iou_sum == pytest.approx(expected[2], abs=1e-5), score.__name__


def test_protocols_differ_over_a_few_questions():
    questions = [([LEFT], [LEFT, RIGHT]), ([], [LEFT]), ([RIGHT], [RIGHT])]
    standard, each, paper = (
        sums[0].add(sums[1]).add(sums[2])
        for sums in (
            [score(*question, where="item") for question in questions]
            for score in (score_union, score_each, score_first_as_released)
        )
    )
    assert (standard.count, standard.missing, each.count, each.missing) == (3, 1, 4, 2)
    assert (paper.count, paper.missing, paper.num_targets) == (3, 1, 4)
    assert standard.summary()["ciou"] == each.summary()["ciou"] == 0.5
    assert standard.summary()["giou"] == each.summary()["giou"] == 0.5
    # The missed question is excluded from cIoU, and two hits are divided by four targets.
    assert paper.summary()["ciou"] == pytest.approx(1.0, abs=1e-9)
    assert paper.summary()["giou"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([LEFT], [], "item 4: found no target"),
        ([LEFT, encode_mask(np.ones((8, 4), dtype=bool))], [LEFT], r"prediction 1 of size \[8, 4\], expected \[4, 8\]"),
        ([], [LEFT, encode_mask(np.ones((4, 7), dtype=bool))], r"target 1 of size \[4, 7\]"),
    ],
)
@pytest.mark.parametrize("score", [score_union, score_each, score_first_as_released])
def test_unsound_questions_are_rejected(score, predictions, targets, message):
    with pytest.raises(DataError, match=message):
        score(predictions, targets, where="item 4")


def test_released_sums_treat_a_missing_prediction_as_configured():
    halves = ReleasedIoUSums.from_rles(LEFT, BOTH)
    empty = halves.add(ReleasedIoUSums.from_rles(None, BOTH, missing="empty"))
    skipped = halves.add(ReleasedIoUSums.from_rles(None, BOTH, missing="skipped"))
    assert (empty.missing, skipped.missing) == (1, 1)
    assert empty.summary()["ciou"] == pytest.approx(4 / 16, abs=1e-9)
    assert skipped.summary()["ciou"] == pytest.approx(4 / 8, abs=1e-9)
    assert empty.summary()["giou"] == skipped.summary()["giou"] == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(DataError, match="found missing='zero'"):
        ReleasedIoUSums.from_rles(None, BOTH, missing="zero")


def test_released_sums_keep_the_small_constants():
    one = encode_mask(np.ones((1, 1), dtype=bool))
    assert ReleasedIoUSums.from_rles(one, one).summary()["giou"] == 1 / (1 + 1e-5)
    # No target and nothing predicted is right, one pixel too many is wrong and stays in the union.
    assert ReleasedIoUSums.from_rles(NOTHING, None).summary()["giou"] == 1.0
    assert ReleasedIoUSums.from_rles(None, None).iou_sum == 1.0
    assert (ReleasedIoUSums.from_rles(LEFT, None).union, ReleasedIoUSums.from_rles(LEFT, None).iou_sum) == (4, 0)


def test_released_sums_without_any_item_are_rejected():
    with pytest.raises(DataError, match="0 scored items"):
        ReleasedIoUSums().summary()


@pytest.mark.parametrize(
    ("meteor", "accuracy", "ciou", "giou", "overall"),
    [
        (13.4, 0.12, 0, 0, 8.5),
        (12.6, 0.14, 24.3, 14.6, 15.3),
        (19.2, 0.71, 31.9, 21.9, 39.0),
        (21.4, 0.69, 29.7, 19.8, 38.4),
        (24.2, 0.74, 33.4, 23.5, 42.2),
    ],
)
def test_overall_gives_the_printed_column_of_the_paper(meteor, accuracy, ciou, giou, overall):
    own = perbench_overall(meteor=meteor / 100, accuracy=accuracy, ciou=ciou / 100, giou=giou / 100)
    assert 100 * own == pytest.approx(overall, abs=0.0501)


def test_overall_of_percentages_is_rejected():
    with pytest.raises(DataError, match=r"found meteor = 21\.4, expected a fraction"):
        perbench_overall(meteor=21.4, accuracy=0.69, ciou=0.297, giou=0.198)

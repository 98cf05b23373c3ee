"""AP50, mIoU and recall of grounded captions against hand-computed values, and AP50 against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pixel_sail.metrics.grounded_caption import GroundedCaptionScores, iou_matrix, score_image, word_overlap
from pixel_sail.rle import encode_mask
from pixel_sail.types import RLE, DataError


def _span(start: int, stop: int) -> RLE:
    """Pixels start .. stop of one row of a hundred."""
    mask = np.zeros((1, 100), dtype=bool)
    mask[0, start:stop] = True
    return encode_mask(mask)


def _score(predicted, targets, *, protocol, phrases=None, target_phrases=None, image_id="a"):
    return score_image(
        image_id,
        predicted=predicted,
        predicted_phrases=phrases if phrases is not None else ["x"] * len(predicted),
        targets=targets,
        target_phrases=target_phrases if target_phrases is not None else ["x"] * len(targets),
        similarity=word_overlap,
        protocol=protocol,
    )


A, B, C = _span(0, 10), _span(20, 30), _span(40, 50)
HALF_A = _span(0, 6)  # IoU 0.6 with A

# Predicted, targets; then (mIoU, found) of `standard` and of `paper`.
CASES = {
    "one of two": ([A], [A, B], (0.5, 1), (1.0, 1)),
    "one too many": ([A, C], [A], (0.5, 1), (1.0, 1)),
    "below the bound": ([_span(0, 4)], [A], (0.4, 0), (0.4, 0)),
    "at the bound": ([_span(0, 5)], [A], (0.5, 1), (0.5, 1)),
    "nothing in common": ([C], [A, B], (0.0, 0), (0.0, 0)),
    "nothing predicted": ([], [A, B], (0.0, 0), (0.0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_iou_and_found_targets_by_hand(case):
    predicted, targets, standard, paper = CASES[case]
    for protocol, (miou, found) in [("standard", standard), ("paper", paper)]:
        (image,) = _score(predicted, targets, protocol=protocol).images
        assert image.mean_iou == pytest.approx(miou, abs=1e-12), protocol
        assert (image.num_found, image.num_targets) == (found, len(targets)), protocol


def test_standard_pairs_for_the_largest_sum_and_paper_takes_the_largest_first():
    predicted, targets = [_span(0, 10), _span(0, 6)], [_span(0, 9), _span(3, 13)]
    iou = iou_matrix(predicted, targets, "pair")
    assert iou == pytest.approx(np.array([[0.9, 7 / 13], [6 / 9, 3 / 13]]), abs=1e-12)
    (standard,) = _score(predicted, targets, protocol="standard").images
    (paper,) = _score(predicted, targets, protocol="paper").images
    # 7/13 + 6/9 > 0.9 + 3/13.
    assert standard.mean_iou == pytest.approx((7 / 13 + 6 / 9) / 2, abs=1e-12)
    assert paper.mean_iou == pytest.approx((0.9 + 3 / 13) / 2, abs=1e-12)
    assert (standard.num_found, paper.num_found) == (2, 1)
    assert (standard.hits, paper.hits) == ((True, True), (True, False))


def test_paper_recall_stops_at_the_first_wrong_phrase():
    wrong_first = dict(
        predicted=[A, _span(20, 28)], targets=[A, B], phrases=["dog", "cat"], target_phrases=["bus", "cat"]
    )
    assert _score(**wrong_first, protocol="standard").images[0].num_found == 1
    assert _score(**wrong_first, protocol="paper").images[0].num_found == 0
    wrong_last = wrong_first | {"phrases": ["bus", "dog"]}
    assert [_score(**wrong_last, protocol=p).images[0].num_found for p in ("standard", "paper")] == [1, 1]


def test_a_mask_without_phrase_is_a_miss_and_under_paper_fails_the_image():
    forgotten = dict(predicted=[A, _span(20, 28)], targets=[A, B], target_phrases=["x", "x"])
    assert [_score(**forgotten, phrases=["x"], protocol=p).images[0].num_found for p in ("standard", "paper")] == [1, 0]
    surplus = ["x", "x", "not looked at"]
    assert [_score(**forgotten, phrases=surplus, protocol=p).images[0].num_found for p in ("standard", "paper")] == [
        2,
        2,
    ]
    unnamed = forgotten | {"target_phrases": ["x"]}
    assert [_score(**unnamed, phrases=["x", "x"], protocol=p).images[0].num_found for p in ("standard", "paper")] == [
        1,
        0,
    ]


def test_image_without_masks_on_both_sides_is_right_in_standard():
    images = [_score([], [], protocol=p, image_id="b").images[0] for p in ("standard", "paper")]
    assert [image.mean_iou for image in images] == [1.0, 0.0]


def test_summary_over_images():
    for protocol, ap50, miou in [("standard", 51 / 101, 0.5), ("paper", 51 / 101, 1.0)]:
        assert _score([A], [A, B], protocol=protocol).summary() == pytest.approx(
            {"ap50": ap50, "miou": miou, "recall": 0.5, "count": 1, "targets": 2}, abs=1e-12
        )
    # Two hits among four predictions, three targets: precision 1/2 up to recall 2/3.
    first = _score([A, C, HALF_A], [A], protocol="standard", image_id="z")
    second = _score([B], [B, C], protocol="standard", image_id="b")
    scores = first.add(second).summary()
    assert scores["ap50"] == pytest.approx(0.5 * 67 / 101, abs=1e-12)
    assert scores["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-12)
    assert scores["recall"] == pytest.approx(2 / 3, abs=1e-12)
    assert scores == second.add(first).summary()


def test_paper_ap_depends_on_the_order_within_an_image_and_standard_does_not():
    ap = {
        (protocol, order): _score(predicted, [A], protocol=protocol).summary()["ap50"]
        for protocol in ("standard", "paper")
        for order, predicted in [("good first", [A, C]), ("good last", [C, A])]
    }
    assert ap["paper", "good first"] == pytest.approx(1.0, abs=1e-12)
    assert ap["paper", "good last"] == ap["standard", "good first"] == ap["standard", "good last"] == 0.5


def _coco_ap50(images: dict[str, tuple[list[RLE], list[RLE]]]) -> float:
    """Return AP50 as pycocotools computes it, every confidence 1."""
    annotations, results = [], []
    for image_id, (predicted, targets) in images.items():
        fixed = {"image_id": image_id, "category_id": 1}
        results += [{**fixed, "segmentation": rle, "score": 1.0} for rle in predicted]
        annotations += [{**fixed, "segmentation": rle, "iscrowd": 0, "area": 10.0} for rle in targets]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image_id, "height": 1, "width": 100} for image_id in images],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


@pytest.mark.parametrize("seed", range(8))
def test_paper_ap50_equals_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    images: dict[str, tuple[list[RLE], list[RLE]]] = {}
    for number in range(12):
        targets, predicted = [], []
        for _ in range(rng.integers(0, 5)):
            start, length = rng.integers(0, 80), rng.integers(5, 20)
            targets.append(_span(start, start + length))
            for _ in range(rng.integers(0, 3)):
                shift = rng.integers(-6, 7)
                predicted.append(_span(max(0, start + shift), start + shift + length))
        if number == 0:
            predicted += [_span(0, 1)] * 120 + targets
        images[f"sa_{rng.integers(0, 10**6)}"] = (predicted, targets)
    scores = GroundedCaptionScores(protocol="paper")
    for image_id, (predicted, targets) in images.items():
        scores = scores.add(_score(predicted, targets, protocol="paper", image_id=image_id))
    own = scores.summary()["ap50"]
    assert own == pytest.approx(_coco_ap50(images), abs=1e-12)
    assert 0 < own < 1


def test_word_overlap():
    expected = [[1.0, 1 / 3, 0.0], [0.0, 0.0, 0.0]]
    assert word_overlap(["A red dog", ""], ["a dog Red", "dog", ""]) == pytest.approx(np.array(expected), abs=1e-12)
    assert word_overlap([], ["x"]).shape == (0, 1)


def test_unsound_calls_are_rejected():
    with pytest.raises(DataError, match=r"image a: found masks of sizes \[\(1, 100\), \(2, 2\)\]"):
        _score([encode_mask(np.ones((2, 2), dtype=bool))], [A], protocol="standard")
    with pytest.raises(DataError, match="found protocol 'coco'"):
        _score([A], [A], protocol="coco")
    with pytest.raises(DataError, match=r"found similarities of shape \(1, 2\), expected \(1, 1\)"):
        score_image(
            "a", predicted=[A], predicted_phrases=["x"], targets=[A], target_phrases=["x"],
            similarity=lambda first, second: np.ones((1, 2)),
        )  # fmt: skip
    one = _score([A], [A], protocol="paper")
    with pytest.raises(DataError, match=r"found 1 images scored twice, such as \['a'\]"):
        one.add(one)
    with pytest.raises(DataError, match="found protocols 'paper' and 'standard'"):
        one.add(GroundedCaptionScores(protocol="standard"))
    with pytest.raises(DataError, match="found 0 targets in 1 images"):
        _score([A], [], protocol="standard").summary()

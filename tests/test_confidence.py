"""Bootstrap intervals, unpaired and paired, against a loop over items and hand-computed examples."""

import numpy as np
import pytest

from pixel_sail.evaluation import confidence
from pixel_sail.evaluation.confidence import bootstrap, interval, seed_for
from pixel_sail.evaluation.task_scores import ItemFractions, measure
from pixel_sail.metrics.iou import IoUSums


def looped(pairs, images, seed, resamples):
    """Reference: resample images one at a time and sum items one by one."""
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(images))
    values = []
    for _ in range(resamples):
        top = bottom = 0.0
        for sampled in rng.integers(len(names), size=len(names)):
            for (numerator, denominator), image in zip(pairs, images, strict=True):
                if image == names[sampled]:
                    top, bottom = top + numerator, bottom + denominator
        values.append(top / bottom if bottom else np.nan)
    return np.array(values)


@pytest.fixture()
def sampled():
    """60 items of 11 images: pixel counts, IoUs, and a score of a few items only."""
    rng = np.random.default_rng(5)
    images = [f"image {number}" for number in rng.integers(11, size=60)]
    unions = rng.integers(1, 400_000, size=60)
    pixels = [(int(rng.integers(0, union + 1)), int(union)) for union in unions]
    means = [(top / bottom, 1) for top, bottom in pixels]
    rare = [(int(number == 3), int(number in (3, 20))) for number in range(60)]
    return images, {"ciou": pixels, "giou": means, "n_acc": rare}


def fractions_of(pairs):
    return {name: ItemFractions.of(values) for name, values in pairs.items()}


@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
def test_resamples_equal_those_of_a_loop_over_items(sampled, monkeypatch, at_once):
    images, pairs = sampled
    monkeypatch.setattr(confidence, "_MAX_SAMPLED", at_once)
    samples = bootstrap(fractions_of(pairs), images, seed=9, resamples=50)
    for name, values in pairs.items():
        np.testing.assert_allclose(samples[name], looped(values, images, 9, 50), rtol=1e-12, equal_nan=True)
    assert np.isnan(samples["n_acc"]).any() and np.isfinite(samples["n_acc"]).any()


def test_pixels_are_counted_exactly():
    # Sums beyond 32-bit integers and floats: 3 * (2 ** 40 + 1) of 3 * 2 ** 41.
    pairs = [(2**40 + 1, 2**41)] * 3
    samples = bootstrap({"ciou": ItemFractions.of(pairs)}, ["a", "b", "c"], seed=0, resamples=20)
    assert set(samples["ciou"].tolist()) == {(2**40 + 1) / 2**41}


def test_two_images_give_the_three_values_computed_by_hand():
    # 2 of 4 and 3 of 4 pixels: twice the first, one of each, both the second.
    samples = bootstrap({"ciou": ItemFractions.of([(2, 4), (3, 4)])}, ["a", "b"], seed=1, resamples=4000)["ciou"]
    values, counts = np.unique(samples, return_counts=True)
    assert values.tolist() == [0.5, 0.625, 0.75]
    # Fractions 1/4, 1/2, 1/4; three standard deviations of a count of 1000 are 82.
    assert np.abs(counts - [1000, 2000, 1000]).max() < 100
    assert interval(samples) == (0.5, 0.75)


def test_questions_about_one_image_are_sampled_together():
    # Right and wrong in every image: no resample of images can change the fraction.
    pairs, images = [(1, 1), (0, 1)] * 6, [number // 2 for number in range(12)]
    accuracy = {"accuracy": ItemFractions.of(pairs)}
    assert interval(bootstrap(accuracy, images, seed=0)["accuracy"]) == (0.5, 0.5)
    low, high = interval(bootstrap(accuracy, range(12), seed=0)["accuracy"])
    assert low < 0.5 < high


def test_one_image_has_no_width():
    samples = bootstrap({"giou": ItemFractions.of([(0.2, 1), (0.9, 1)])}, ["a", "a"], seed=0)
    assert interval(samples["giou"]) == pytest.approx((0.55, 0.55))


def test_a_score_that_is_nowhere_defined_has_no_interval():
    samples = bootstrap({"n_acc": ItemFractions.of([(0, 0), (0, 0)])}, ["a", "b"], seed=0)
    assert interval(samples["n_acc"]) is None
    assert bootstrap({}, ["a", "b"], seed=0) == {}


def test_the_interval_is_the_middle_95_percent_of_what_is_defined():
    values = np.concatenate([np.arange(0, 101) / 100, [np.nan] * 7])
    assert interval(values) == pytest.approx((0.025, 0.975))


def test_seeds_differ_between_evals_and_not_between_runs():
    assert seed_for(0, "refcoco_val") == seed_for(0, "refcoco_val")
    assert len({seed_for(seed, name) for seed in (0, 1) for name in ("refcoco_val", "refcoco_testA")}) == 4


def test_a_score_and_itself_differ_by_nothing_in_every_resample(sampled):
    images, pairs = sampled
    fractions = fractions_of(pairs)
    both = {f"{run}/{name}": value for run in "ab" for name, value in fractions.items()}
    samples = bootstrap(both, images, seed=2, resamples=100)
    difference = samples["a/ciou"] - samples["b/ciou"]
    assert interval(difference) == (0.0, 0.0)


def test_pairing_makes_a_small_steady_difference_visible(sampled):
    images, pairs = sampled
    worse = {"giou": ItemFractions.of((top - 0.01, 1) for top, _ in pairs["giou"])}
    both = {"a": ItemFractions.of(pairs["giou"]), "b": worse["giou"]}
    samples = bootstrap(both, images, seed=2)
    low, high = interval(samples["b"] - samples["a"])
    assert (low, high) == pytest.approx((-0.01, -0.01))
    alone = interval(samples["a"])
    assert alone[1] - alone[0] > 0.05


def test_fractions_of_items_add_up_to_the_scores():
    rng = np.random.default_rng(0)
    masks = rng.random((12, 2, 9, 7)) < 0.4
    sums = [IoUSums.from_masks(pair[0], pair[1]) for pair in masks] + [IoUSums.from_masks(masks[0, 0], None)]
    measured = measure(sums)
    assert set(measured.scores) == {*measured.fractions, "count", "missing"}
    for name, fraction in measured.fractions.items():
        assert fraction.numerators_N.sum() / fraction.denominators_N.sum() == pytest.approx(measured.scores[name])
    per_item = measured.fractions["n_acc"].per_item()
    assert per_item[-1] == 0.0 and np.isnan(per_item[:-1]).all()

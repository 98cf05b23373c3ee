"""Bootstrap intervals of scores and of differences of scores, resampled by image.

`TaskScores.fractions` and the image of every item -> `bootstrap` -> samples of each score -> `interval` ->
`results.jsonl`, the report, `tools/compare_runs.py`.

Questions about one image are not independent, so images are sampled with replacement, each with all its questions. For
two images with fractions 2/4 and 3/4 the resamples are (first, first) = 0.5, (first, second) and (second, first) =
0.625, (second, second) = 0.75, each in a quarter of the resamples. The score of a resample is computed like the score
itself, as a ratio of sums: for cIoU exactly the pixels of all its items.

A resample in which a score is undefined (N-acc without no-target items) is excluded from its interval.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from pixel_sail.evaluation.task_scores import ItemFractions, Values

RESAMPLES = 1000
LEVEL = 0.95
_MAX_SAMPLED = 1 << 22
"""Random numbers sampled at a time, to bound memory."""

Interval = tuple[float, float]


def seed_for(seed: int, name: str) -> int:
    """Return the seed of an eval's resamples. It differs between evals and is equal for all runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def bootstrap(
    fractions: Mapping[str, ItemFractions], images: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Values]:
    """Return every score of every resample, each [resamples]; NaN if undefined.

    images: the image of each item [N]. All scores use the same resamples, so that they can be subtracted.
    """
    numbers: dict[Hashable, int] = {}
    owners_N = np.array([numbers.setdefault(image, len(numbers)) for image in images], dtype=np.int64)
    columns = [column for score in fractions.values() for column in (score.numerators_N, score.denominators_N)]
    if not columns or not numbers:
        return {}
    sums_IK = np.stack([np.bincount(owners_N, weights=column, minlength=len(numbers)) for column in columns], axis=1)
    sums_RK = np.concatenate([times_RI @ sums_IK for times_RI in _resample_counts(len(numbers), seed, resamples)])
    scores = {}
    for index, name in enumerate(fractions):
        numerators_R, denominators_R = sums_RK[:, 2 * index], sums_RK[:, 2 * index + 1]
        values = np.full(resamples, np.nan)
        scores[name] = np.divide(numerators_R, denominators_R, out=values, where=denominators_R > 0)
    return scores


def interval(samples_R: Values, level: float = LEVEL) -> Interval | None:
    """Return the percentile interval of resampled values, None if none is defined."""
    defined = samples_R[np.isfinite(samples_R)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resample_counts(num_images: int, seed: int, resamples: int) -> Iterator[Values]:
    """Yield how often each image is in each resample [some resamples, I]."""
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, _MAX_SAMPLED // num_images)
    for start in range(0, resamples, rows_at_once):
        rows = min(rows_at_once, resamples - start)
        sampled_RI = rng.integers(num_images, size=(rows, num_images))
        places = sampled_RI + num_images * np.arange(rows)[:, None]
        times = np.bincount(places.ravel(), minlength=rows * num_images)
        yield times.reshape(rows, num_images).astype(np.float64)

"""Two runs on the same items: the difference of every score, with a paired bootstrap interval.

Two `StoredEval` of one benchmark -> `compare` -> `Difference` per score -> `tools/compare_runs.py`. Both runs are
resampled with the same images, so that difficulty shared by both does not widen the interval:

    Difference(score="ciou", a=0.71, b=0.73, interval=(0.012, 0.029), a_better=310, b_better=402, equal=517)

The difference is b - a. Items that do not contribute to a score (an item with a target to N-acc) are not counted.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixel_sail.evaluation.confidence import RESAMPLES, Interval, bootstrap, interval, seed_for
from pixel_sail.evaluation.stored import StoredEval, read_protocol, read_stored
from pixel_sail.types import DataError


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score in both runs."""

    score: str
    a: float
    b: float
    interval: Interval | None = None
    """95 % interval of b - a; None if the score is not a sum over items."""
    a_better: int | None = None
    """Number of items on which a scores higher; None if items have no score."""
    b_better: int | None = None
    equal: int | None = None


def compare(
    first: Path, second: Path, *, seed: int = 0, resamples: int = RESAMPLES, loaders: Collection[str] = ()
) -> list[Difference]:
    """Return the differences of all scores of one eval, given its folder in both runs. `loaders`: see `read_stored`.

    Raises: DataError if the runs have different questions, before any annotations are read.
    """
    check_same_questions(first, second)
    a, b = read_stored(first, loaders), read_stored(second, loaders)
    check_same_targets(a, b)
    task_scores = {"a": a.measure(), "b": b.measure()}
    common = [name for name in task_scores["a"].fractions if name in task_scores["b"].fractions]
    fractions = {f"{run}/{name}": task_scores[run].fractions[name] for run in task_scores for name in common}
    samples = bootstrap(fractions, a.images(), seed=seed_for(seed, first.name), resamples=resamples)
    result = []
    for name, value in task_scores["a"].scores.items():
        other = task_scores["b"].scores.get(name)
        if other is None or isinstance(value, int):
            continue
        difference = Difference(score=name, a=value, b=float(other))
        if name in common:
            of_a, of_b = (task_scores[run].fractions[name].per_item() for run in task_scores)
            difference = replace(
                difference,
                interval=interval(samples[f"b/{name}"] - samples[f"a/{name}"]),
                a_better=int(np.sum(of_a > of_b)),
                b_better=int(np.sum(of_b > of_a)),
                equal=int(np.sum(of_a == of_b)),
            )
        result.append(difference)
    return result


def check_same_questions(first: Path, second: Path) -> None:
    """Check that both runs answered the same questions. Raises: DataError."""
    one, other = read_protocol(first), read_protocol(second)
    if one["questions_sha256"] == other["questions_sha256"]:
        return
    sides = [{**protocol["eval"]["settings"], **protocol["eval"]} for protocol in (one, other)]
    keys = sorted({*sides[0], *sides[1]} - {"settings"})
    changed = [key for key in keys if sides[0].get(key) != sides[1].get(key)]
    prompts = [protocol["predict"]["prompt"] for protocol in (one, other)]
    raise DataError(
        f"{first} and {second}: found different questions (sha256 {one['questions_sha256'][:12]} and "
        f"{other['questions_sha256'][:12]}; differing settings of the eval: {changed or 'none'}, prompts {prompts}), "
        "expected the same items with the same prompts; compare runs on one dataset with one predict.prompt and "
        "one max_images"
    )


def check_same_targets(a: StoredEval, b: StoredEval) -> None:
    """Check that two copies of the annotations have the same targets. Raises: DataError."""
    for item, other in zip(a.task.items, b.task.items, strict=True):
        if replace(item, image_path=other.image_path) != other:
            raise DataError(
                f"{a.folder} and {b.folder}: found an item with another target or answer in the annotations of the "
                f"second, {other!r:.300}, expected the same annotations; evaluate both runs on one copy"
            )

"""Scores and the contribution of each item to them, for resampling and comparison by item.

The sums of `metrics/` -> `measure` -> `TaskScores`, which every `Task` returns -> `confidence.py` (intervals),
`results.py` (rows), `tools/compare_runs.py`. Two expressions with 2 of 4 and 3 of 4 pixels right:

    TaskScores(scores={"ciou": 0.625, "giou": 0.625, "count": 2, ...},
             fractions={"ciou": ItemFractions(numerators_N=[2, 3], denominators_N=[4, 4]),
                        "giou": ItemFractions(numerators_N=[0.5, 0.75], denominators_N=[1, 1]), ...})

A score that is not a ratio of sums over items (METEOR 1.5, BLEU, AP50) has no fractions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, float | int]

Values = NDArray[np.float64]

PAPER_PREFIX = "paper_"
"""Prefix of scores computed as in the released scripts. Others are standard scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemFractions:
    """One score as a sum of numerators over a sum of denominators, item by item. Pixel counts are exact to 2 ** 53."""

    numerators_N: Values
    denominators_N: Values
    """0 if an item does not contribute to the score, such as one with a target to N-acc."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "ItemFractions":
        """Return the fractions of (numerator, denominator) pairs."""
        table = np.array(list(pairs), dtype=np.float64).reshape(-1, 2)
        return cls(numerators_N=table[:, 0], denominators_N=table[:, 1])

    def per_item(self) -> Values:
        """Return the score of each item alone [N], NaN if it does not contribute."""
        values = np.full(len(self.numerators_N), np.nan)
        np.divide(self.numerators_N, self.denominators_N, out=values, where=self.denominators_N > 0)
        return values


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The scores of one benchmark and, for ratios of sums, the contribution of each item."""

    scores: Scores
    fractions: Mapping[str, ItemFractions]


class ItemSums(Protocol):
    """Sums over one or more items from which scores are computed."""

    def add(self, other: Any) -> Any:
        """Return the sums over the items of both."""

    def summary(self) -> dict[str, float | int]:
        """Return the scores by name."""

    def fractions(self) -> dict[str, tuple[float, float]]:
        """Return numerator and denominator of every score that is a ratio."""


Sums = TypeVar("Sums", bound=ItemSums)


def measure(sums: Sequence[Sums], *, prefix: str = "", names: Sequence[str] | None = None) -> TaskScores:
    """Return the scores over items from the sums of each, at least one.

    names: the selected scores, by default all. With a prefix counts are excluded, since the scores without have them.
    """
    total = reduce(lambda first, second: first.add(second), sums)
    each = [item.fractions() for item in sums]
    scores = {
        name: value
        for name, value in total.summary().items()
        if (names is None or name in names) and (not prefix or name in each[0])
    }
    fractions = {name: ItemFractions.of(item[name] for item in each) for name in each[0] if name in scores}
    return TaskScores(
        scores={f"{prefix}{name}": value for name, value in scores.items()},
        fractions={f"{prefix}{name}": value for name, value in fractions.items()},
    )


def merge_scores(*parts: TaskScores, **more: int) -> TaskScores:
    """Merge the scores of all parts, with additional counts."""
    scores: dict[str, float | int] = {}
    fractions: dict[str, ItemFractions] = {}
    for part in parts:
        scores |= part.scores
        fractions |= part.fractions
    return TaskScores(scores=scores | more, fractions=fractions)

"""Mixes sources in a deterministic, shuffled order.

`data/packing.py` reads one position after another of an endless stream. The item at a position and its random generator
depend on (seed, position) alone, never on workers, ranks or time.

Example: sources of 4 and 3 items with repeats 1 and 2.4 make epochs of 4 + 7 = 11 positions: each item of the first
source once, each of the second twice, and one of them, a different one in every epoch, a third time. Position 25 is
entry 3 of epoch 2. With weights 3 and 1 and epochs of 8 samples, 6 are from the first source and 2 from the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixel_sail.types import DataError, Sample, Source


@dataclass(frozen=True, kw_only=True)
class StreamItem:
    """The item at one position of the mixture."""

    epoch: int
    source: int
    source_name: str
    item: int
    copy: int
    """How often the item occurred earlier in this epoch, counted by passes over its source."""


@dataclass(frozen=True, kw_only=True)
class MixtureItem:
    """The sample at one position of the mixture."""

    sample: Sample
    source_name: str
    """Name of the source in the mixture, used in logs."""
    position: int
    epoch: int
    point_seed: int


class Mixture:
    """Sources with repeats or weights, reshuffled in every epoch."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        repeats: Mapping[str, float],
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
        epoch_samples: int = 0,
    ) -> None:
        """Fix how many items of each source an epoch has. `repeats`: how often each item occurs in an epoch, 1 by
        default. `weights`, as an alternative: relative number of the `epoch_samples` positions per source, for every
        source. Raises: DataError."""
        self.names = sorted(sources)
        self.sources = [sources[name] for name in self.names]
        self.seed = seed
        sizes = [len(source) for source in self.sources]
        if weights:
            if repeats:
                raise DataError("data.repeats and data.weights: found both, expected at most one; remove one of them")
            self.epoch_items = _epoch_items_by_weight(self.names, sizes, weights, epoch_samples)
        else:
            self.epoch_items = _epoch_items_by_repeats(self.names, sizes, repeats)
        self.epoch_length = sum(self.epoch_items)
        if self.epoch_length == 0:
            raise DataError(
                f"data.sources: found no items in {self.names}, expected at least one; check root, split and repeats"
            )
        self._order_epoch = -1
        self._order: NDArray[np.int64] = np.empty((0, 3), dtype=np.int64)

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the (source, item, copy) triples [epoch_length, 3] of an epoch in order."""
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            parts = []
            for source, number in enumerate(self.epoch_items):
                size = len(self.sources[source])
                rest = (
                    rng.permutation(size)[: number - size * (number // size)] if size else np.empty(0, dtype=np.int64)
                )
                items = np.concatenate((np.tile(np.arange(size), number // size if size else 0), rest))
                copies = np.arange(len(items)) // max(size, 1)
                parts.append(np.stack((np.full(len(items), source), items, copies), axis=1))
            self._order = rng.permutation(np.concatenate(parts)).astype(np.int64)
            self._order_epoch = epoch
        return self._order

    def stream_item(self, position: int) -> StreamItem:
        """Return the item at a position of the endless stream of epochs."""
        epoch, offset = divmod(position, self.epoch_length)
        source, item, copy = (int(value) for value in self.epoch_order(epoch)[offset])
        return StreamItem(epoch=epoch, source=source, source_name=self.names[source], item=item, copy=copy)

    def item(self, position: int) -> MixtureItem:
        """Return the sample at a position. Raises: DataError when its item is wrong."""
        item = self.stream_item(position)
        rng = np.random.default_rng([self.seed, 1, item.epoch, item.source, item.item, item.copy])
        sample = self.sources[item.source].get(item.item, rng)
        return MixtureItem(
            sample=sample,
            source_name=item.source_name,
            position=position,
            epoch=item.epoch,
            point_seed=int(rng.integers(2**62)),
        )


def _epoch_items_by_repeats(names: list[str], sizes: list[int], repeats: Mapping[str, float]) -> list[int]:
    """Return the number of positions of an epoch for each source."""
    _check_names(repeats, names, "data.repeats")
    return [round(float(repeats.get(name, 1.0)) * size) for name, size in zip(names, sizes, strict=True)]


def _epoch_items_by_weight(
    names: list[str], sizes: list[int], weights: Mapping[str, float], num_samples: int
) -> list[int]:
    """Return the same from weights: integers that sum to `num_samples`, each within one of its exact fraction."""
    _check_names(weights, names, "data.weights")
    if set(weights) != set(names) or sum(weights.values()) <= 0:
        raise DataError(
            f"data.weights: found {sorted(weights)}, expected a weight for each of {names}, not all 0; add the rest"
        )
    if num_samples < 1:
        raise DataError(
            f"data.epoch_samples: found {num_samples}, expected 1 or more with data.weights; set the samples per epoch"
        )
    empty = [name for name, size in zip(names, sizes, strict=True) if weights[name] > 0 and size == 0]
    if empty:
        raise DataError(f"data.weights: found no items in {empty}, expected at least one; check root and split")
    limits = np.cumsum([weights[name] for name in names]) / sum(weights.values()) * num_samples
    return [int(number) for number in np.diff(np.round(limits).astype(np.int64), prepend=0)]


def _check_names(values: Mapping[str, float], names: list[str], key: str) -> None:
    unknown = set(values) - set(names)
    if unknown:
        raise DataError(f"{key}: found {sorted(unknown)}, expected names in data.sources {names}; correct the names")
    for name, value in values.items():
        if value < 0:
            raise DataError(f"{key}.{name}: found {value}, expected 0 or more; correct the config")

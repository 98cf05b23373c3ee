"""A mixture of sources in a deterministic order.

Place in the flow: `data/packing.py` asks for position after position of an endless stream; which item that is, and the
random generator it is drawn with, depend on (seed, position) alone - never on workers, ranks or time.

Example: sources of 4 and 3 items with repeats 1 and 2.4 make epochs of 4 + 7 = 11 positions: all items of the first,
each of the second twice, and one of them, another in every epoch, a third time; position 25 is entry 3 of epoch 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixel_sail.types import DataError, Sample, Source


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One position of the stream."""

    sample: Sample
    position: int
    epoch: int
    point_seed: int


class Mixture:
    """Sources with repeats, shuffled anew in every epoch."""

    def __init__(self, sources: Mapping[str, Source], repeats: Mapping[str, float], *, seed: int) -> None:
        unknown = set(repeats) - set(sources)
        if unknown:
            raise DataError(f"data.repeats names {sorted(unknown)}, but data.sources holds {sorted(sources)}")
        self.names = sorted(sources)
        self.sources = [sources[name] for name in self.names]
        self.repeats = [float(repeats.get(name, 1.0)) for name in self.names]
        self.seed = seed
        self.epoch_length = sum(self._share(i) for i in range(len(self.sources)))
        if self.epoch_length == 0:
            raise DataError(f"data: the sources {self.names} hold no item; check root, split and repeats")
        self._order_epoch = -1
        self._order: NDArray[np.int64] = np.empty((0, 3), dtype=np.int64)

    def _share(self, source: int) -> int:
        """Return how many positions of an epoch a source fills."""
        if self.repeats[source] < 0:
            raise DataError(f"data.repeats.{self.names[source]} is {self.repeats[source]}, expected 0 or more")
        return round(self.repeats[source] * len(self.sources[source]))

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the (source, item, copy) triples [epoch_length, 3] of an epoch in their order."""
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            parts = []
            for source in range(len(self.sources)):
                size, share = len(self.sources[source]), self._share(source)
                rest = rng.permutation(size)[: share - size * (share // size)] if size else np.empty(0, dtype=np.int64)
                items = np.concatenate((np.tile(np.arange(size), share // size if size else 0), rest))
                copies = np.arange(len(items)) // max(size, 1)
                parts.append(np.stack((np.full(len(items), source), items, copies), axis=1))
            self._order = rng.permutation(np.concatenate(parts)).astype(np.int64)
            self._order_epoch = epoch
        return self._order

    def draw(self, position: int) -> Drawn:
        """Return what stands at a position of the endless stream of epochs."""
        epoch, offset = divmod(position, self.epoch_length)
        source, item, copy = (int(value) for value in self.epoch_order(epoch)[offset])
        rng = np.random.default_rng([self.seed, 1, epoch, source, item, copy])
        sample = self.sources[source].get(item, rng)
        return Drawn(sample=sample, position=position, epoch=epoch, point_seed=int(rng.integers(2**62)))

"""How many samples a pack will hold, measured without opening an image.

Place in the flow: `planning/length.py` asks before a run begins, since the length of an epoch in steps depends on it.
The first positions of the mixture's stream, in their shuffled order the sample that a survey would draw, are packed by
the rule of `data/packing.py` itself. Only the pixels are left out: a sample is as long as its text and the size of its
image say.

    5,000 photographs with their questions  ->  PackForecast(num_positions=4098, num_packs=651, samples_per_pack=6.29,
                                                             positions_per_pack=6.295, standard_error=0.02)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pixel_sail.data.image_sizes import upright_hw
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import LanePosition, LaneStream, PackingSettings
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Example, Sample

MAX_POSITIONS, MIN_POSITIONS = 4096, 256
"""Positions of the stream that are looked at: a whole epoch, but no more and no fewer than these. Samples differ in
length by about a fifth to a half of the mean, so that 4,096 of them tell it to 0.3 to 0.8 %."""

BLOCKS = 16
"""Packs are averaged in so many blocks, whose spread is that of the mean. Neighbouring packs are not independent: they
share what the lane holds back."""


@dataclass(frozen=True, kw_only=True)
class PackForecast:
    """What packs hold on the average."""

    num_positions: int
    """Positions of the stream that were looked at."""
    num_packs: int
    samples_per_pack: float
    positions_per_pack: float
    """More than samples where some cannot be used."""
    standard_error: float
    """Of `samples_per_pack`."""


class SizedStream(LaneStream):
    """A lane whose samples have no pixels, and all else."""

    def _encode(self, sample: Sample) -> tuple[Example, Image.Image | None]:
        size_hw = sample.image_hw
        if sample.image_path is None:
            size_hw = None
        elif size_hw is None:
            size_hw = upright_hw(sample.image_path, sample.sample_id)
        return self.processor.lay_out(sample, size_hw, independent_turns=self.settings.independent_turns), None


def forecast_packs(
    mixture: Mixture,
    processor: PixelSailProcessor,
    settings: PackingSettings,
    *,
    max_skipped_share: float = 0.0,
    cost: Callable[[Example], float] = len,
    max_positions: int = MAX_POSITIONS,
) -> PackForecast:
    """Return what the packs of a mixture hold, measured on its first positions; the same in every process.

    `cost`: what a sample takes of a pack's budget. Raises: DataError, as training would for these samples.
    """
    stream = SizedStream(
        mixture, processor, settings, lane=0, num_lanes=1, max_skipped_share=max_skipped_share, cost=cost
    )
    packs = ((len(pack.examples), pack.after) for pack in stream)
    return summed_up(packs, num_positions=min(max(mixture.epoch_length, MIN_POSITIONS), max_positions))


def summed_up(packs: Iterable[tuple[int, LanePosition]], *, num_positions: int) -> PackForecast:
    """Return the means over the first packs of a lane, as many as use up `num_positions`. packs: samples of a pack, and
    where the lane is after it."""
    counts, consumed = [], 0
    for count, after in packs:
        counts.append(count)
        consumed = after.consumed
        if consumed >= num_positions:
            break
    blocks = [block.mean() for block in np.array_split(np.array(counts), min(BLOCKS, len(counts)))]
    return PackForecast(
        num_positions=consumed,
        num_packs=len(counts),
        samples_per_pack=float(np.mean(counts)),
        positions_per_pack=consumed / len(counts),
        standard_error=float(np.std(blocks, ddof=1) / len(blocks) ** 0.5) if len(blocks) > 1 else 0.0,
    )

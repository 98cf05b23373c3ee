"""How many samples a sequence will hold, measured without opening an image.

`planning/length.py` asks before a run begins, since the length of an epoch in steps depends on it. The first positions
of the mixture's stream, in their shuffled order the sample that a survey would take, are packed by the rule of
`data/packing.py` itself. Only the pixels are left out: a sample is as long as its text and the size of its image say.

    5,000 images with their questions  ->  PackingForecast(num_positions=4098, num_sequences=651,
                                  samples_per_sequence=6.29, positions_per_sequence=6.295, standard_error=0.02)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pixel_sail.data.image_sizes import upright_hw
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings, StreamState
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Example, Sample

MAX_POSITIONS, MIN_POSITIONS = 4096, 256
"""Positions of the mixture that are looked at: a whole epoch, but no more and no fewer than these. Samples differ in
length by about a fifth to a half of the mean, so that 4,096 of them tell it to 0.3 to 0.8 %."""

BLOCKS = 16
"""Sequences are averaged in so many blocks, whose spread is that of the mean. Neighbouring sequences are not
independent: they share what the stream holds back."""


@dataclass(frozen=True, kw_only=True)
class PackingForecast:
    """What sequences hold on the average."""

    num_positions: int
    """Positions of the mixture that were looked at."""
    num_sequences: int
    samples_per_sequence: float
    positions_per_sequence: float
    """More than samples where some cannot be used."""
    standard_error: float
    """Of `samples_per_sequence`."""


class SizedStream(PackedStream):
    """A stream whose samples have no pixels, and all else."""

    def _encode(self, sample: Sample) -> tuple[Example, Image.Image | None]:
        size_hw = sample.image_hw
        if sample.image_path is None:
            size_hw = None
        elif size_hw is None:
            size_hw = upright_hw(sample.image_path, sample.sample_id)
        return self.processor.lay_out(sample, size_hw, independent_turns=self.settings.independent_turns), None


def forecast_packing(
    mixture: Mixture,
    processor: PixelSailProcessor,
    settings: PackingSettings,
    *,
    max_skipped_fraction: float = 0.0,
    cost: Callable[[Example], float] = len,
    max_positions: int = MAX_POSITIONS,
) -> PackingForecast:
    """Return what the sequences of a mixture hold, measured on its first positions; the same in every process.

    `cost`: what a sample takes of `seq_len`. Raises: DataError, as training would for these samples.
    """
    stream = SizedStream(
        mixture, processor, settings, index=0, num_streams=1, max_skipped_fraction=max_skipped_fraction, cost=cost
    )
    sequences = ((len(sequence.examples), sequence.after) for sequence in stream)
    return summed_up(sequences, num_positions=min(max(mixture.epoch_length, MIN_POSITIONS), max_positions))


def summed_up(sequences: Iterable[tuple[int, StreamState]], *, num_positions: int) -> PackingForecast:
    """Return the means over the first sequences of a stream, as many as use up `num_positions`. sequences: samples of a
    sequence, and where the stream is after it."""
    counts, consumed = [], 0
    for count, after in sequences:
        counts.append(count)
        consumed = after.consumed
        if consumed >= num_positions:
            break
    blocks = [block.mean() for block in np.array_split(np.array(counts), min(BLOCKS, len(counts)))]
    return PackingForecast(
        num_positions=consumed,
        num_sequences=len(counts),
        samples_per_sequence=float(np.mean(counts)),
        positions_per_sequence=consumed / len(counts),
        standard_error=float(np.std(blocks, ddof=1) / len(blocks) ** 0.5) if len(blocks) > 1 else 0.0,
    )

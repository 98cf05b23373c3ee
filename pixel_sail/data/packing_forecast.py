"""Forecasts how many samples a packed sequence will hold, without opening an image.

`planning/length.py` needs it before a run begins, since the number of steps per epoch depends on it. The first
positions of the mixture, a random sample because the mixture is shuffled, are packed by `data/packing.py`. Only the
pixels are skipped: the length of a sample follows from its text and the size of its image.

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
"""Positions of the mixture to pack: a whole epoch, within these limits. Sample lengths have a standard deviation of a
fifth to a half of their mean, so 4,096 samples estimate the mean to 0.3 to 0.8 %."""

BLOCKS = 16
"""Number of blocks of sequences whose means give the standard error. Neighboring sequences are not independent: they
share the packing buffer."""


@dataclass(frozen=True, kw_only=True)
class PackingForecast:
    """Average contents of a packed sequence."""

    num_positions: int
    """Positions of the mixture that were packed."""
    num_sequences: int
    samples_per_sequence: float
    positions_per_sequence: float
    """Larger than `samples_per_sequence` when some samples are skipped."""
    standard_error: float
    """Of `samples_per_sequence`."""


class SizedStream(PackedStream):
    """A stream whose examples have everything but pixels."""

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
    """Return the average contents of the mixture's sequences, from its first positions; the same in every process.

    `cost`: cost of a sample, counted against `seq_len`. Raises: DataError, as training would for these samples.
    """
    stream = SizedStream(
        mixture, processor, settings, index=0, num_streams=1, max_skipped_fraction=max_skipped_fraction, cost=cost
    )
    sequences = ((len(sequence.examples), sequence.after) for sequence in stream)
    return summed_up(sequences, num_positions=min(max(mixture.epoch_length, MIN_POSITIONS), max_positions))


def summed_up(sequences: Iterable[tuple[int, StreamState]], *, num_positions: int) -> PackingForecast:
    """Return the means over the first sequences of a stream, until `num_positions` are consumed. sequences: number of
    samples in a sequence, and the state of the stream after it."""
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

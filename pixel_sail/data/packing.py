"""Samples into packs: sequences of at most `token_budget` tokens.

Place in the flow: `data/loader.py` runs one `LaneStream` per lane. The endless stream of the mixture is dealt to a
fixed number of lanes, lane l getting positions l, l + L, l + 2L, ...; every lane fills its own packs one after
another, and one optimizer step takes one pack of every lane. Ranks and workers only share out the lanes, so that the
global batch does not depend on their number, and a lane's whole state is one integer: how many of its samples are used
up.

    lane 0 of 2: samples 0 2 4 | 6 8 | 10 ...      lane 1 of 2: samples 1 3 | 5 7 9 | ...
    step 1 = {0, 2, 4} and {1, 3},  step 2 = {6, 8} and {5, 7, 9}
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pixel_sail.data.images import load_image
from pixel_sail.data.mixture import Mixture
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import DataError, Example


@dataclass(kw_only=True)
class PackingSettings:
    """How samples are put into sequences."""

    token_budget: int = 4096
    """Most tokens of a pack; a longer sample is an error."""
    independent_turns: bool = False
    """True: every question of a sample sees the image and itself only. False (release): they form one conversation."""
    max_samples: int = 0
    """Most samples of a pack, 0 for no limit."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One sequence: its samples, and how many samples of its lane are used up once it was trained on."""

    lane: int
    consumed: int
    examples: tuple[Example, ...]


class LaneStream:
    """The packs of one lane, in order, from any starting point."""

    def __init__(
        self,
        mixture: Mixture,
        processor: PixelSailProcessor,
        settings: PackingSettings,
        *,
        lane: int,
        num_lanes: int,
        consumed: int = 0,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.settings = settings
        self.lane = lane
        self.num_lanes = num_lanes
        self.consumed = consumed

    def example(self, number: int) -> Example:
        """Return sample `number` of this lane as tokens; DataError when it is wrong or longer than a pack."""
        drawn = self.mixture.draw(self.lane + number * self.num_lanes)
        sample = drawn.sample
        image = None
        if sample.image_path is not None:
            image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        example = self.processor.encode_sample(sample, image, independent_turns=self.settings.independent_turns)
        if len(example) > self.settings.token_budget:
            raise DataError(
                f"{sample.sample_id}: {len(example)} tokens found, at most data.packing.token_budget = "
                f"{self.settings.token_budget} expected; raise the budget or draw fewer turns per sample"
            )
        return replace(example, point_seed=drawn.point_seed)

    def __iter__(self) -> Iterator[Pack]:
        """Yield packs without end; the sample that no longer fits opens the next pack."""
        waiting: Example | None = None
        number = self.consumed
        while True:
            examples: list[Example] = [waiting] if waiting is not None else []
            used = sum(len(example) for example in examples)
            waiting = None
            while not self.settings.max_samples or len(examples) < self.settings.max_samples:
                example = self.example(number)
                number += 1
                if used + len(example) > self.settings.token_budget:
                    waiting = example
                    break
                examples.append(example)
                used += len(example)
            consumed = number if waiting is None else number - 1
            yield Pack(lane=self.lane, consumed=consumed, examples=tuple(examples))

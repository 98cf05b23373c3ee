"""Packed sequences of assumed samples, to plan runs without their data.

`tools/plan_run.py` uses them if files are missing. Assumed samples are packed by `data/packing.py`, as in the run:

    assumed_sequences(architecture, PackingSettings(seq_len=8192), Assumptions(), rows=1)
      ->  micro-batches such as Workload(rows=1, tokens_per_row=7915, samples=6, ...), and
          PackingForecast(samples_per_sequence=6.5, ...)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pixel_sail.data.packing import PackingSettings, StreamState, pack_samples
from pixel_sail.data.packing_forecast import PackingForecast, summed_up
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.image_layout import image_tokens
from pixel_sail.model.patches import grid_size
from pixel_sail.planning.balance import SampleCost
from pixel_sail.planning.workload import ImageLoad, Workload
from pixel_sail.types import SizeHW

COCO_SIZES: dict[SizeHW, int] = {
    (480, 640): 30,
    (427, 640): 31,
    (640, 480): 10,
    (640, 427): 8,
    (375, 500): 6,
    (500, 375): 5,
    (612, 612): 4,
    (360, 640): 3,
    (333, 500): 2,
    (640, 640): 1,
}
"""Sizes of COCO's images in percent, from 397 of them; sizes with nearly the same patch grid are merged. With patches
of 16 pixels they average 1,106 tokens, the 397 images 1,100."""

USUAL_HW: SizeHW = (480, 640)

NUM_SAMPLES = 2048
"""Samples of a plan. The samples per sequence vary by 10 %, so their mean has an error of about 0.5 %."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions about data that is not available."""

    image_hw: SizeHW | None = None
    """Size of every image. None: sampled from the sizes of COCO."""
    text_tokens: int = 100
    """Text tokens of a sample, questions and answers: the mean of a geometric distribution."""
    supervised_fraction: float = 0.5
    """Fraction of the text tokens that is supervised."""
    masks_per_image: int = 4
    images_with_masks: float = 0.6
    """Fraction of the images that have masks."""


def assumed_sample(
    architecture: Architecture, image_hw: SizeHW, *, text_tokens: int, supervised: int, masks: int
) -> Workload:
    """Return one sample alone in a row."""
    grid = grid_size(image_hw, architecture.patch_size, architecture.max_long_side, architecture.sizing)
    image = image_tokens(architecture.base, grid)
    length = image + text_tokens
    is_prefix = architecture.attention == "prefix"
    return Workload(
        rows=1,
        tokens_per_row=length,
        images=(ImageLoad(rows=grid[0], columns=grid[1], masks=masks, image_hw=image_hw),),
        supervised=supervised,
        samples=1,
        real_tokens=length,
        seen_pairs=prefix_pairs(image, text_tokens) if is_prefix else length * (length + 1) // 2,
        computed_pairs=image**2 + text_tokens * length,
        computed_keys=image + length,
    )


def prefix_pairs(image_tokens: int, text_tokens: int) -> int:
    """Return the visible pairs of one sample: all within the image, text sees the image and its own past."""
    return image_tokens**2 + text_tokens * image_tokens + text_tokens * (text_tokens + 1) // 2


def assumed_samples(architecture: Architecture, assumptions: Assumptions, number: int) -> list[Workload]:
    """Return assumed samples, the same at every call."""
    rng = np.random.default_rng(0)
    sizes, percents = list(COCO_SIZES), np.array(list(COCO_SIZES.values()))
    samples = []
    for _ in range(number):
        sampled_hw = sizes[rng.choice(len(sizes), p=percents / percents.sum())]
        text = assumptions.text_tokens
        if text > 1:
            text = int(rng.geometric(1 / text))
        has_masks = rng.random() < assumptions.images_with_masks
        samples.append(
            assumed_sample(
                architecture,
                assumptions.image_hw or sampled_hw,
                text_tokens=text,
                supervised=round(text * assumptions.supervised_fraction),
                masks=assumptions.masks_per_image if has_masks else 0,
            )
        )
    return samples


def assumed_sequences(
    architecture: Architecture,
    packing: PackingSettings,
    assumptions: Assumptions,
    *,
    rows: int,
    num_samples: int = NUM_SAMPLES,
) -> tuple[list[Workload], PackingForecast]:
    """Return micro-batches of `rows` sequences of assumed samples, and the forecast of their packing. A sample that is
    longer than a sequence gets its own."""
    samples = assumed_samples(architecture, assumptions, num_samples)
    weigh = SampleCost(architecture=architecture).of if packing.balance == "flops" else _tokens
    costs = [weigh(sample) for sample in samples]

    def read(number: int) -> tuple[Workload, float]:
        return samples[number % num_samples], costs[number % num_samples]

    sequences: list[tuple[Workload, ...]] = []

    def noted() -> Iterator[tuple[int, StreamState]]:
        for sequence, after in pack_samples(read, packing, held={}, upcoming=0):
            sequences.append(sequence)
            yield len(sequence), after

    forecast = summed_up(noted(), num_positions=num_samples)
    grouped = [sequences[start : start + rows] for start in range(0, len(sequences) - rows + 1, rows)]
    return [micro_batch_workload(group) for group in grouped or [sequences]], forecast


def _tokens(work: Workload) -> float:
    return work.real_tokens


def micro_batch_workload(sequences: Sequence[Sequence[Workload]]) -> Workload:
    """Return the micro-batch of some sequences of samples, one sequence per row."""
    samples = [sample for sequence in sequences for sample in sequence]
    return Workload(
        rows=len(sequences),
        tokens_per_row=max(sum(sample.real_tokens for sample in sequence) for sequence in sequences),
        images=tuple(image for sample in samples for image in sample.images),
        supervised=sum(sample.supervised for sample in samples),
        samples=len(samples),
        real_tokens=sum(sample.real_tokens for sample in samples),
        seen_pairs=sum(sample.seen_pairs for sample in samples),
        computed_pairs=sum(sample.computed_pairs for sample in samples),
        computed_keys=sum(sample.computed_keys for sample in samples),
    )

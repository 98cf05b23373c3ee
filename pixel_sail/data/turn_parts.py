"""Conversations longer than a sequence: divided between turns into parts, of which one is kept.

A source of conversations sets `Sample.part_choice`; `data/packing.py` calls `fitting_part` where a sample is longer
than a sequence. With turns of 3000, 4000, 2500 and 1000 tokens, an image of 1082 and a budget of 8192 the parts are
turns (1, 2) and (3, 4): of part_choice 0.0 the first is kept, of 0.7 the second.
"""

from collections.abc import Sequence
from dataclasses import replace

from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Sample, SizeHW


def fitting_part(sample: Sample, processor: PixelSailProcessor, grid_hw: SizeHW | None, budget: int) -> Sample:
    """Return the sample with the turns of one of its parts, each of which has at most `budget` tokens with the image.

    `grid_hw`: patch grid of the image, None without one. A turn longer than that is a part of its own, too long as
    before. A sample whose turns must stay together is returned as it is.
    """
    if sample.part_choice is None:
        return sample
    num_image = 0 if grid_hw is None else len(processor.image_span(grid_hw).token_ids_S)
    # One for the token that ends an answer. What stands before a question is counted for each, also where base eve
    # begins with the image instead: two tokens more than needed.
    lengths = [
        len(processor.question_ids(turn.question)) + len(processor.text_ids(turn.answer)) + 1 for turn in sample.turns
    ]
    parts = divided(lengths, budget - num_image)
    part = parts[int(sample.part_choice * len(parts))]
    return replace(sample, turns=tuple(sample.turns[index] for index in part))


def divided(lengths: Sequence[int], room: int) -> list[range]:
    """Return ranges of indices in order, each as long as fits into `room` or of one index."""
    parts: list[range] = []
    used = 0
    for index, length in enumerate(lengths):
        if not parts or used + length > room:
            parts.append(range(index, index))
            used = 0
        parts[-1] = range(parts[-1].start, index + 1)
        used += length
    return parts

"""Splits conversations longer than a sequence between turns, and keeps one part.

A source of conversations sets `Sample.part_choice`; `data/packing.py` calls `fitting_part` if a sample is longer than a
sequence. With turns of 3000, 4000, 2500 and 1000 tokens, an image of 1082 and a `budget` of 8192 the parts are turns
(1, 2) and (3, 4): part_choice 0.0 keeps the first, 0.7 the second.
"""

from collections.abc import Sequence
from dataclasses import replace

from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Sample, SizeHW


def fitting_part(sample: Sample, processor: PixelSailProcessor, grid_hw: SizeHW | None, budget: int) -> Sample:
    """Return the sample with the turns of one of its parts, each at most `budget` tokens including the image.

    `grid_hw`: patch grid of the image, None without one. A turn longer than that is a part of its own, and still too
    long. A sample whose turns must stay together is returned unchanged.
    """
    if sample.part_choice is None:
        return sample
    num_image = 0 if grid_hw is None else len(processor.image_span(grid_hw).token_ids_S)
    # One for the end-of-answer token. The tokens before a question are counted for each, also where it begins with the
    # image instead: two tokens more than needed.
    lengths = [
        len(processor.question_ids(turn.question)) + len(processor.text_ids(turn.answer)) + 1 for turn in sample.turns
    ]
    parts = divided(lengths, budget - num_image)
    part = parts[int(sample.part_choice * len(parts))]
    return replace(sample, turns=tuple(sample.turns[index] for index in part))


def divided(lengths: Sequence[int], room: int) -> list[range]:
    """Return ranges of consecutive indices, each of at most `room` in total or of one index."""
    parts: list[range] = []
    used = 0
    for index, length in enumerate(lengths):
        if not parts or used + length > room:
            parts.append(range(index, index))
            used = 0
        parts[-1] = range(parts[-1].start, index + 1)
        used += length
    return parts

"""Helpers for tests of visual-prompt sources: sample regions and inspect samples.

Imported by tests only. Region k of a synthetic record is column k of a 4 x 40 image.
"""

import numpy as np

SIZE = (4, 40)


def column(index, size_hw=SIZE):
    mask = np.zeros(size_hw, dtype=bool)
    mask[:, index] = True
    return mask


def get(source, index=0, seed=0):
    return source.get(index, np.random.default_rng(seed))


def marked_regions(sample):
    """Return which region every prompt token marks."""
    return {prompt.prompt_id: int(np.argwhere(prompt.mask)[0, 1]) for prompt in sample.prompts}

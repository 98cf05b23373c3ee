"""Templates of MUSE: questions answered with several objects, each with its mask.

`data/sources/muse.py` appends a mask request to a question of the file with `muse_question`; if the file has no answer
text, `muse_answer` generates it. Templates are our own except those marked "released".

Example: muse_answer(["mug", "tea bag"], rng) is "Mug: [SEG] and tea bag: [SEG]." or "I found mug and tea bag.
Their masks: [SEG] and [SEG]."
"""

from collections.abc import Sequence

import numpy as np

MASK_REQUESTS = (
    "Please respond with segmentation mask.",  # released
    "Answer with segmentation masks.",
    "Show the masks of what you name.",
    "Please segment everything that belongs to the answer.",
)
"""Suffix of the question, which itself does not request masks."""

SEPARATE_ANSWERS = (
    "{name}: [SEG]",
    "the mask of {name} is [SEG]",
    "{name} is here [SEG]",
)
"""One per object, in the order of the objects."""

JOINT_ANSWERS = (
    "{names}: {masks}.",
    "It is about {names}, with the masks {masks}.",
    "These are {names}, segmented in this order: {masks}.",
    "I found {names}. Their masks: {masks}.",
    "Here you see {names}: {masks}.",
)
"""One for all objects."""

ONE_OBJECT_ANSWERS = (
    "The answer is {names}, {masks}.",
    "Only {names} fits: {masks}.",
    "One object, {names}: {masks}.",
)
"""Joint answers for a single object."""


def muse_question(question: str, rng: np.random.Generator) -> str:
    """Return a question of the file, with the request for masks."""
    return f"{question.strip()} {MASK_REQUESTS[rng.integers(len(MASK_REQUESTS))]}"


def muse_answer(names: Sequence[str], rng: np.random.Generator) -> str:
    """Return an answer that names every object in order with one [SEG] each: with equal probability one by one or
    jointly.

    `names` must not be empty.
    """
    if rng.random() < 0.5:
        template = SEPARATE_ANSWERS[rng.integers(len(SEPARATE_ANSWERS))]
        text = listed([template.format(name=name) for name in names]) + "."
    else:
        templates = JOINT_ANSWERS if len(names) > 1 else ONE_OBJECT_ANSWERS
        template = templates[rng.integers(len(templates))]
        text = template.format(names=listed([name.lower() for name in names]), masks=listed(["[SEG]"] * len(names)))
    return text[0].upper() + text[1:]


def listed(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([*([", ".join(items[:-1])] if len(items) > 1 else []), items[-1]])

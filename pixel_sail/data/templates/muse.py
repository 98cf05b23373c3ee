"""The templates of MUSE: questions whose answer is several objects, each with its mask.

`data/sources/muse.py` asks with a question of the file and `muse_question`; where the file words no answer,
`muse_answer` does. Templates are our own but for the one marked "released".

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
"""Follows the question, which does not say by itself that masks are wanted."""

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
"""A joint answer that has only one object."""


def muse_question(question: str, rng: np.random.Generator) -> str:
    """Return a question of the file, with the request for masks."""
    return f"{question.strip()} {MASK_REQUESTS[rng.integers(len(MASK_REQUESTS))]}"


def muse_answer(names: Sequence[str], rng: np.random.Generator) -> str:
    """Return an answer that names every object, in order, with one [SEG] each: one by one or together, half and half.

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

"""Templates of two questions about a marked region: its class, and its description.

`data/sources/coco_vp.py` uses the class question, `pix2cap_vp.py` the description; `data/regions.py` replaces {region}.
Questions are our own; a published checkpoint was trained with those marked "released".

Example: "What kind of object is {region}? The candidate categories: dog, rug, truck, others." -> "{region}: rug".
"""

from collections.abc import Sequence

import numpy as np

from pixel_sail.data.templates.region import CAPTION_QUESTION

CLASS_QUESTIONS = (
    "What kind of object is {region}?",
    "Which category does {region} belong to?",
    "Name the class of {region}.",
    "What is marked by {region}?",
    "How would you label {region}?",
    "Assign {region} to a category.",
)

CANDIDATES = " The candidate categories: {names}."  # released
OTHERS = "others"  # released: the last candidate, and the answer where no other candidate is right

DETAIL_QUESTIONS = (
    CAPTION_QUESTION,  # released; what region benchmarks ask
    "Describe {region} in detail.",
    "What can be seen at {region}? Say all that matters.",
    "Please write a full description of {region}.",
    "Tell me everything about {region}.",
    "How does {region} look, and what is around it?",
    "Explain what {region} is and what it is doing.",
    "Give a careful account of {region}.",
    "I would like to know more about {region}.",
    "What makes {region} different from the rest of the image?",
    "Put {region} into words, with its looks and its place.",
    "Look closely at {region} and report what you find.",
    "Which details does {region} have?",
    "Someone cannot see this image. Describe {region} for them.",
    "Characterise {region} in one or two sentences.",
)


def class_question(rng: np.random.Generator, candidates: Sequence[str] = ()) -> str:
    """Return a question for the class of {region}, to be chosen among the candidates if there are any."""
    question = CLASS_QUESTIONS[rng.integers(len(CLASS_QUESTIONS))]
    return question + CANDIDATES.replace("{names}", ", ".join(candidates)) if candidates else question


def class_answer(name: str) -> str:
    """Return the answer that names the class of {region}."""
    return "{region}: " + name  # released, without a full stop


def detail_question(rng: np.random.Generator) -> str:
    """Return a question for a description of {region}."""
    return DETAIL_QUESTIONS[rng.integers(len(DETAIL_QUESTIONS))]


def describe_answer(description: str) -> str:
    """Return the answer that describes {region}."""
    return "{region}: " + description  # released

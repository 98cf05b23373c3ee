"""Templates of reasoning segmentation: questions and phrases that imply an object without naming it.

`data/sources/reasonseg.py` calls `reasoning_turn` for training and fills the constant prompts for evaluation. Templates
are our own except those marked "released".

Example: the phrase "something that keeps the rain off" is asked as "What is something that keeps the rain off in this
image? Please output segmentation mask." and answered "It is [SEG]."
"""

import numpy as np

from pixel_sail.data.templates.referring import FIXED_REFER_ANSWER, REFER_ANSWERS
from pixel_sail.types import BoolMask, Turn

SENTENCE_PROMPT = "{sent} Please output segmentation mask."
"""Released, training and evaluation: `sent` is a whole question or request."""

PHRASE_PROMPT = "What is {sent} in this image? Please output segmentation mask."
"""Released, training and evaluation: `sent` is a noun phrase."""

SENTENCE_QUESTIONS = (
    SENTENCE_PROMPT,
    "{sent} Answer with a mask.",
    "{sent} Show it by segmenting it.",
    "{sent} Please mark it in the picture.",
)

PHRASE_QUESTIONS = (
    PHRASE_PROMPT,
    "Segment {sent}.",
    "Which part of the picture is {sent}? Answer with a mask.",
    "Find {sent} in this image and return its segmentation.",
)


def evaluation_question(text: str, *, is_sentence: bool) -> str:
    """Return the released question about `text`."""
    return (SENTENCE_PROMPT if is_sentence else PHRASE_PROMPT).format(sent=text)


def reasoning_turn(
    text: str,
    mask: BoolMask,
    rng: np.random.Generator,
    *,
    is_sentence: bool,
    ignored: BoolMask | None = None,
    as_released: bool = False,
) -> Turn:
    """Return the turn with the question about `text` and `mask` as its answer; `ignored` pixels do not count.

    `as_released`: use the released question and answer, as in the evaluation, instead of sampling one of several.
    """
    if as_released:
        question = evaluation_question(text, is_sentence=is_sentence)
        return Turn(question=question, answer=FIXED_REFER_ANSWER, masks=(mask,), ignored=ignored)
    templates = SENTENCE_QUESTIONS if is_sentence else PHRASE_QUESTIONS
    sent = text if is_sentence else text.removesuffix(".")
    question = templates[rng.integers(len(templates))].format(sent=sent)
    answer = REFER_ANSWERS[rng.integers(len(REFER_ANSWERS))]
    return Turn(question=question, answer=answer, masks=(mask,), ignored=ignored)

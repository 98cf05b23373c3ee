"""Templates of referring segmentation: the question about an expression and the answer with its mask.

`data/sources/refer.py` calls `referring_turn` for training; the evaluation fills one of the two constant prompts.
Question templates are our own; answers and prompts marked "released" are part of the protocol with which a published
checkpoint was trained or evaluated.

Example: ("the lady in blue", mask) -> Turn(question="Which pixels belong to the lady in blue?", answer="[SEG].",
masks=(mask,)).
"""

import numpy as np

from pixel_sail.types import BoolMask, Turn

STANDARD_REFER_PROMPT = "Please segment {sent} in this image."
"""Evaluation prompt without the leading space; also the question of style "fixed"."""

PAPER_REFER_PROMPT = " Please segment {sent} in this image."
"""Released evaluation prompt: a leading space remains where the image marker was removed from the text."""

REFER_QUESTIONS = (
    "Please segment {expression} in this image.",
    "Segment {expression}.",
    "Find {expression} and return its mask.",
    "Which pixels belong to {expression}?",
    "Where exactly is {expression}? Answer with a segmentation mask.",
    "I am looking for {expression}. Can you outline it pixel by pixel?",
    "Could you mark {expression} for me?",
    "Cut out {expression} from this picture.",
    "Show me the region described as: {expression}.",
    "Give the segmentation of {expression} in the image.",
    "In this photo, separate {expression} from everything else.",
    "Mask what these words refer to: {expression}.",
)

REFER_ANSWERS = (
    "It is [SEG].",  # released
    "Sure, [SEG].",  # released
    "[SEG].",  # released
    "Here it is: [SEG].",
    "The mask is [SEG].",
)

FIXED_REFER_ANSWER = "It is [SEG]."

NO_TARGET_ANSWER = "No target [SEG]."
"""Released: a no-target answer also has a [SEG], whose mask is trained to be empty."""

SHORT_REFER_PROMPT = "{sent}"
"""The expression alone, for small models that learn only this task."""

SHORT_REFER_ANSWER = "[SEG]."  # released

QUESTION_STYLES = ("varied", "fixed", "short")


def referring_turn(
    expression: str, mask: BoolMask, rng: np.random.Generator, *, style: str, has_target: bool = True
) -> Turn:
    """Return the turn with the question about `expression` and `mask` as its answer.

    Style "varied" samples question and answer from `rng`; "fixed" always uses the standard prompt and `It is [SEG].`;
    "short" uses the expression alone and answers `[SEG].`, for small quick runs. Without a target the answer is `No
    target [SEG].` and the mask must be all False. Raises: ValueError for an unknown style or a no-target mask with
    pixels.
    """
    if style not in QUESTION_STYLES:
        raise ValueError(f"question style: found {style!r}, expected one of {QUESTION_STYLES}; correct the config")
    if not has_target and mask.any():
        raise ValueError(
            f"turn for {expression!r}: found {int(mask.sum())} mask pixels, expected none without a target; "
            "pass an all-False mask"
        )
    if style == "fixed":
        question, answer = STANDARD_REFER_PROMPT.format(sent=expression), FIXED_REFER_ANSWER
    elif style == "short":
        question, answer = SHORT_REFER_PROMPT.format(sent=expression), SHORT_REFER_ANSWER
    else:
        template = REFER_QUESTIONS[rng.integers(len(REFER_QUESTIONS))]
        question = template.format(expression=expression)
        answer = REFER_ANSWERS[rng.integers(len(REFER_ANSWERS))]
    return Turn(question=question, answer=answer if has_target else NO_TARGET_ANSWER, masks=(mask,))

"""Templates of grounded captions: the question for a description with masks, and the format of a phrase with its mask.

`data/sources/grounded_caption.py` calls `caption_question` for training, and `data/phrases.py` marks the phrases. The
evaluation uses one of the two constant prompts. Question templates are our own; "released" marks the protocol with
which a published checkpoint was trained or evaluated.

Example: marked_phrase("a red hat") is `<p> a red hat </p> [SEG]`.
"""

import numpy as np

STANDARD_CAPTION_PROMPT = (
    "Could you please give me a detailed description of the image? Please respond with interleaved segmentation masks "
    "for the corresponding parts of the answer."
)
"""Evaluation prompt without the extra spaces."""

PAPER_CAPTION_PROMPT = STANDARD_CAPTION_PROMPT.replace("interleaved", "interleaved    ")
"""Released evaluation prompt: a line continued inside a string left five spaces before "segmentation"."""

CAPTION_QUESTIONS = (
    STANDARD_CAPTION_PROMPT,  # released; asked in training too, so that no test question is a new one
    "Describe the image and give a mask for every phrase that names something you can see.",
    "What is in this picture? Mark each thing you mention with its segmentation.",
    "Write a caption of the photo and ground its phrases with masks.",
    "Please caption this image, with a segmentation mask after each part that can be pointed at.",
    "Tell me what this image shows and outline the things you name.",
    "Give me a description of the scene in which every object comes with its mask.",
    "Put the content of the picture into words, adding a mask wherever you name an object.",
)

MARKS = ("[SEG]", "<p>", "</p>")
"""Strings that a caption itself must not contain."""


def marked_phrase(phrase: str) -> str:
    """Return a phrase followed by its mask token (released form)."""
    return f"<p> {phrase} </p> [SEG]"


def caption_question(rng: np.random.Generator, *, as_released: bool = False) -> str:
    """Return one of the questions with equal probability; `as_released` excludes the one for a detailed description."""
    questions = [question for question in CAPTION_QUESTIONS if not as_released or question != STANDARD_CAPTION_PROMPT]
    return questions[rng.integers(len(questions))]

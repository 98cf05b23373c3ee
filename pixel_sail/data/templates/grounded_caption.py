"""The templates of grounded captions: how a description with masks is asked for and how a phrase is tied to its mask.

`data/sources/grounded_caption.py` asks `caption_question` for training, `data/phrases.py` marks the phrases; the
evaluation asks one of the two constant prompts. Question templates are our own; what is marked "released" is a protocol
fact that a published checkpoint was trained or scored with.

Example: marked_phrase("a red hat") is `<p> a red hat </p> [SEG]`.
"""

import numpy as np

STANDARD_CAPTION_PROMPT = (
    "Could you please give me a detailed description of the image? Please respond with interleaved segmentation masks "
    "for the corresponding parts of the answer."
)
"""Evaluation prompt without the stray blanks."""

PAPER_CAPTION_PROMPT = STANDARD_CAPTION_PROMPT.replace("interleaved", "interleaved    ")
"""Released evaluation prompt: a line continued inside a string left five blanks before "segmentation"."""

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
"""What a caption must not hold by itself."""


def marked_phrase(phrase: str) -> str:
    """Return a phrase followed by its mask token (released form)."""
    return f"<p> {phrase} </p> [SEG]"


def caption_question(rng: np.random.Generator, *, as_released: bool = False) -> str:
    """Return one of the questions, all equally likely; `as_released`: not the one for a detailed description."""
    questions = [question for question in CAPTION_QUESTIONS if not as_released or question != STANDARD_CAPTION_PROMPT]
    return questions[rng.integers(len(questions))]

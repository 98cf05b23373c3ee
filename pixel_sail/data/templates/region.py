"""Templates of questions about marked regions, and the prompts of region benchmarks.

`data/sources/osprey.py`, `refcocog_vp.py` and `sam_captions.py` sample questions with {region} for the region's name,
which `data/regions.py` fills in; the evaluation of region captions and of PerBench uses the constant prompts. Question
templates are our own; "released" marks the protocol with which a published checkpoint was trained or evaluated.

Example: DESCRIBE_QUESTIONS[0] becomes `Describe <Prompt11>.`, its answer `<Prompt11>: a man in a red coat.`
"""

import numpy as np

DESCRIBE_QUESTIONS = (
    "Describe {region}.",
    "What do you see at {region}?",
    "What is there to say about {region}?",
    "Say what {region} shows.",
    "How would you describe {region}?",
    "Tell me about {region}.",
    "What does the picture show at {region}?",
    "Write down what {region} is and how it looks.",
)
"""For a description of any length."""

CAPTION_QUESTION = "Can you provide me with a detailed description of the region in the picture marked by {region}?"
"""Released: the prompt of region benchmarks, also used in training."""

DETAILED_QUESTIONS = (
    CAPTION_QUESTION,  # so that no test question is a new one, with its suffix neither
    "Describe {region} as precisely as you can.",
    "Give a thorough description of {region}.",
    "What exactly is {region}, how does it look, and what surrounds it?",
    "I want to know everything that can be seen of {region}.",
    "Please go through all details of {region}.",
    "Write several sentences about {region}: what it is, its colours, its parts, its place in the picture.",
    "Imagine I cannot see the picture. What would you tell me about {region}?",
    "Study {region} and report everything you notice.",
    "Which features tell {region} apart? Be complete.",
    "Explain at length what is marked by {region}.",
    "Paint {region} in words, leaving nothing out.",
    "Let me have the full account of {region}.",
    "Starting with what it is, describe {region} down to small details.",
    "What could a careful observer say about {region}?",
)
"""For a long description."""

RELEASED_SHORT_QUESTION = "Please give me a short description of {region}."
"""The only question of the released fine-tuning on region captions."""

SHORT_QUESTIONS = (
    "Describe {region} in a few words.",
    "Which phrase refers to {region}?",
    "Sum up {region} in one phrase.",
    "How would you refer to {region} so that nobody takes it for something else?",
    "Give {region} a short caption.",
    "In brief, what is {region}?",
    "Name {region} together with what sets it apart.",
    "One short phrase for {region}, please.",
    RELEASED_SHORT_QUESTION,
)
"""For a phrase, as in referring expressions."""

NAME_QUESTIONS = (
    "What is {region}?",
    "What is the thing at {region} called?",
    "Name what {region} marks.",
    "Which kind of thing is {region}?",
    "Say in one or two words what {region} is.",
)
"""For a free-form name, without candidates."""

REGION_ANSWER = "{region}: "  # released
"""Prefix of an answer about one region."""

DETAILED_SUFFIX = " Please provide as detailed as possible."  # released
"""Suffix of every question about captions of PerBench's kind, in training and evaluation."""

SINGLE_WORD_SUFFIX = " Answer the question using a single word or phrase."  # released
"""Suffix of every question of Osprey's short form."""

REGION_CAPTION_PROMPT = CAPTION_QUESTION.replace("{region}", "<Prompt0>")
"""Released evaluation prompt of RefCOCOg region captions."""

PERBENCH_CAPTION_PROMPT = REGION_CAPTION_PROMPT + DETAILED_SUFFIX
"""Released evaluation prompt of PerBench's detailed captions."""

PERBENCH_CHOICE_PROMPT = "Please answer the question according to the <Prompt0>. {question}Select a correct choice."
"""Released evaluation prompt of PerBench's choices; questions end with a line break in the file."""

MARKED_OBJECT = "the marked object"
"""Name of the region in synthetic multiple-choice questions."""

PERBENCH_REFERRING_ANSWER = "It is [SEG]."
"""Released: prefix of a second answer, generated if the first one to PerBench's visual referring has no mask."""


def describe_question(rng: np.random.Generator) -> str:
    """Return a question for a description of {region} of any length."""
    return _sample(DESCRIBE_QUESTIONS, rng)


def detailed_question(rng: np.random.Generator) -> str:
    """Return a question for a long description of {region}."""
    return _sample(DETAILED_QUESTIONS, rng)


def short_question(rng: np.random.Generator) -> str:
    """Return a question for a phrase that refers to {region}."""
    return _sample(SHORT_QUESTIONS, rng)


def released_short_question(rng: np.random.Generator) -> str:
    """Return the released question for a phrase that refers to {region}, with the signature of the samplers."""
    return RELEASED_SHORT_QUESTION


def name_question(rng: np.random.Generator) -> str:
    """Return a question for the name of {region}, without candidates."""
    return _sample(NAME_QUESTIONS, rng)


def _sample(questions: tuple[str, ...], rng: np.random.Generator) -> str:
    return questions[rng.integers(len(questions))]

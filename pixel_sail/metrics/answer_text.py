"""Extraction of captions and phrases from generated answers.

`metrics/captions.py` and `metrics/grounded_caption.py` score the result. Functions that end in `_as_released` follow
the released scripts, for the `paper` protocol.

Example:

    "<p> A man </p> [SEG] runs.<|endoftext|>"  ->  GroundedText(caption="A man runs.", phrases=("A man",))
"""

import re
from dataclasses import dataclass

_CONTROL = re.compile(r"<\|[^|<>]*\|>|<s>|</s>")
_MARK = re.compile(r"</?p>|\[SEG\]|<Prompt\d+>")
_LEADING_NAME = re.compile(r"^\s*<Prompt\d+>\s*:")
_PHRASE_OR_SEG = re.compile(r"<p>(?P<phrase>.*?)</p>|(?P<seg>\[SEG\])", re.DOTALL)
_ANY_TAG = re.compile(r"<.*?>")
_ASSISTANT = "ASSISTANT: "


@dataclass(frozen=True, kw_only=True)
class GroundedText:
    """A description and its phrases."""

    caption: str
    phrases: tuple[str, ...]


def plain_description(text: str) -> str:
    """Return an answer without control tokens, marks, and a leading `<Prompt0>:`."""
    return _one_blank(_MARK.sub(" ", _LEADING_NAME.sub("", _CONTROL.sub(" ", text))))


def grounded_text(text: str) -> GroundedText:
    """Return the description and one phrase per [SEG]: the last one marked since the previous [SEG], or "".

    Phrases thus stay aligned with masks even if the model omits marks.
    """
    phrases, waiting = [], ""
    for match in _PHRASE_OR_SEG.finditer(text):
        if match["seg"]:
            phrases.append(waiting)
            waiting = ""
        else:
            waiting = plain_description(match["phrase"])
    # A removed mark between a word and a full stop must not leave a blank.
    caption = re.sub(r" +([.,;:!?])", r"\1", plain_description(text))
    return GroundedText(caption=caption, phrases=tuple(phrases))


def object_caption_as_released(text: str) -> str:
    """Return a PerBench description as released. It normally still begins with ": "."""
    return text.replace("<Prompt0>", "").replace("<|endoftext|>", "").strip()


def region_caption_as_released(text: str) -> str:
    """Return a RefCOCOg region caption as released: without tags, full stops, colons and outer apostrophes."""
    for removed in ("<|endoftext|>", ".", "<Prompt0>", ":"):
        text = text.replace(removed, "")
    return _one_blank(_without_tags(_after_assistant(text))).strip("'")


def grounded_text_as_released(text: str) -> GroundedText:
    """Return the description and all marked phrases, in order, with or without a following [SEG].

    Line breaks are deleted, which joins the adjacent words, and outer apostrophes of the description are removed.
    """
    for removed, put in (("<s>", ""), ("\n", ""), ("  ", " "), ("<|endoftext|>", "")):
        text = text.replace(removed, put)
    text = _after_assistant(text)
    phrases = tuple(phrase.strip() for phrase in re.findall(r"<p>(.*?)</p>", text))
    return GroundedText(caption=_one_blank(_without_tags(text)).strip("'").strip(), phrases=phrases)


def _after_assistant(text: str) -> str:
    return text.split(_ASSISTANT)[-1]


def _without_tags(text: str) -> str:
    return _ANY_TAG.sub("", text).replace("[SEG]", "")


def _one_blank(text: str) -> str:
    return " ".join(text.split())

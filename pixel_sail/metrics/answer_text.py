"""What of a generated answer is scored: descriptions without marks, phrases beside the masks they name.

The text of a prediction, as generated -> here -> `metrics/captions.py`, `metrics/grounded_caption.py`. Functions that
end in `_as_released` do what the released scripts do, for the `paper` protocol.

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
    """Return an answer without control tokens, marks, and the `<Prompt0>:` that it may begin with."""
    return _one_blank(_MARK.sub(" ", _LEADING_NAME.sub("", _CONTROL.sub(" ", text))))


def grounded_text(text: str) -> GroundedText:
    """Return the description and one phrase per [SEG]: the last one marked since the [SEG] before, "" if there is none.

    So phrases stand beside masks whatever marks the model forgot.
    """
    phrases, waiting = [], ""
    for match in _PHRASE_OR_SEG.finditer(text):
        if match["seg"]:
            phrases.append(waiting)
            waiting = ""
        else:
            waiting = plain_description(match["phrase"])
    # A mark between a word and a full stop leaves no blank behind.
    caption = re.sub(r" +([.,;:!?])", r"\1", plain_description(text))
    return GroundedText(caption=caption, phrases=tuple(phrases))


def object_caption_as_released(text: str) -> str:
    """Return a PerBench description as released: it normally still begins with ": "."""
    return text.replace("<Prompt0>", "").replace("<|endoftext|>", "").strip()


def region_caption_as_released(text: str) -> str:
    """Return a RefCOCOg region caption as released: without tags, full stops, colons and outer apostrophes."""
    for removed in ("<|endoftext|>", ".", "<Prompt0>", ":"):
        text = text.replace(removed, "")
    return _one_blank(_without_tags(_after_assistant(text))).strip("'")


def grounded_text_as_released(text: str) -> GroundedText:
    """Return the description and all marked phrases, in order, whether a [SEG] follows them or not.

    A line break is nothing, so that the words beside it become one, and outer apostrophes of the description are left
    out.
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

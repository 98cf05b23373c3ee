"""Finding phrases in a caption and marking them, one [SEG] each, without breaking the text.

Place in the flow: the grounded-caption sources name phrases with masks; this module says where in the caption each
stands, and `mark_caption` writes the answer a model is trained on:

    "A man in a red hat." with the phrases "a man in a red hat" and "Red hat"
    -> "<p> A man in a red hat </p> [SEG]."     ("Red hat" lies inside the longer phrase and is dropped)

Rules, in this order:
1. A stated span counts if it holds the phrase. Otherwise the phrase is looked for as whole words, upper or lower case
   alike, and the occurrence nearest to the stated span is taken; a span that only differs in wording is believed if
   it begins and ends with whole words. What is left is "not found".
2. Longer phrases are placed first. Phrases on the very same characters share one place (their masks are united). A
   phrase without a stated span may move to another occurrence that is free. What still overlaps is "overlapped".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pixel_sail.data.wording.grounded_caption import MARKS, marked_phrase
from pixel_sail.types import DataError

Span = tuple[int, int]
"""First character and one past the last."""


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A piece of a caption, as an annotation names it."""

    text: str = ""
    """"" where only the span is known."""
    span: Span | None = None
    """As stated by the file, not checked."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one or more phrases stand."""

    span: Span
    phrases: tuple[int, ...]
    """Indices of the phrases that share this place."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What became of every phrase of a caption."""

    places: tuple[Place, ...]
    """In reading order; no two overlap."""
    not_found: tuple[int, ...]
    overlapped: tuple[int, ...]


def place_phrases(caption: str, phrases: Sequence[Phrase]) -> Placement:
    """Return a place for as many phrases as can be marked side by side."""
    options = [_options(caption, phrase) for phrase in phrases]
    found = sorted((i for i, spans in enumerate(options) if spans), key=lambda i: _longest_first(options[i][0]))
    taken: dict[Span, list[int]] = {}
    overlapped = []
    for index in found:
        span = next((span for span in options[index] if span in taken or _is_free(span, taken)), None)
        if span is None:
            overlapped.append(index)
        else:
            taken.setdefault(span, []).append(index)
    return Placement(
        places=tuple(Place(span=span, phrases=tuple(sorted(taken[span]))) for span in sorted(taken)),
        not_found=tuple(i for i, spans in enumerate(options) if not spans),
        overlapped=tuple(sorted(overlapped)),
    )


def mark_caption(caption: str, placement: Placement, where: str) -> str:
    """Return the caption with every place marked, blanks and quotes around the whole of it removed.

    Raises: DataError if the caption itself holds a mark, as nobody could tell it from ours.
    """
    for mark in MARKS:
        if mark in caption:
            raise DataError(f"{where}: found {mark!r} in the caption, expected plain text; repair the caption")
    parts, end = [], 0
    for place in placement.places:
        parts += [caption[end : place.span[0]], marked_phrase(caption[slice(*place.span)])]
        end = place.span[1]
    return plain_caption("".join(parts) + caption[end:])


def plain_caption(text: str) -> str:
    """Return a caption without blanks around it, and without the pair of quotes some files put around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text


def _options(caption: str, phrase: Phrase) -> list[Span]:
    """Return the spans a phrase could have, the best first; none when it is not in the caption."""
    words = phrase.text.strip().strip('"').removesuffix(".").split()
    stated = _trimmed(caption, phrase.span)
    if stated is not None and caption[slice(*stated)].lower().split() == " ".join(words).lower().split():
        return [stated]
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    found = [match.span() for match in re.finditer(pattern, caption, re.IGNORECASE)] if words else []
    if phrase.span is None:
        return found
    if found:
        start = phrase.span[0]
        return [min(found, key=lambda span: (abs(span[0] - start), span))]
    return [stated] if stated is not None and _is_whole_words(caption, stated) else []


def _trimmed(caption: str, span: Span | None) -> Span | None:
    """Return a span without the blanks at its ends; None if it is not within the caption or holds nothing else."""
    if span is None or not 0 <= span[0] < span[1] <= len(caption):
        return None
    text = caption[slice(*span)]
    start = span[0] + len(text) - len(text.lstrip())
    return (start, start + len(text.strip())) if text.strip() else None


def _is_whole_words(caption: str, span: Span) -> bool:
    return not any(0 < cut < len(caption) and caption[cut - 1].isalnum() and caption[cut].isalnum() for cut in span)


def _is_free(span: Span, taken: dict[Span, list[int]]) -> bool:
    return all(span[1] <= start or span[0] >= end for start, end in taken)


def _longest_first(span: Span) -> tuple[int, int]:
    return span[0] - span[1], span[0]

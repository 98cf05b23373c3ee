"""Finds phrases in a caption and marks each with one [SEG].

The grounded-caption sources have phrases with masks. This module finds the position of each phrase in the caption, and
`mark_caption` writes the answer to train on:

    "A man in a red hat." with the phrases "a man in a red hat" and "Red hat"
    -> "<p> A man in a red hat </p> [SEG]."     ("Red hat" is inside the longer phrase and is dropped)

Rules, in this order:
1. A stated span is accepted if it contains the phrase, whether it counts characters, bytes of UTF-8 or units of UTF-16.
   Otherwise the phrase is searched as whole words, ignoring case, and the occurrence nearest to the stated span is
   used. Without one, a span that begins and ends with whole words is accepted if it rephrases the phrase: articles
   and marks aside, the words of one are among those of the other, in order ("two men" for "two young men", "the man"
   for "A man"). The rest is "not found", and also "misplaced" if its span contains other words.
2. Longer phrases are placed first, and among equal ones those that are in the caption word for word. Phrases on the
   same characters share one span (their masks are united), except rephrased ones: two phrasings may be two objects. A
   phrase without a stated span may move to another free occurrence. What still overlaps is "overlapped".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pixel_sail.data.templates.grounded_caption import MARKS, marked_phrase
from pixel_sail.types import DataError

_ARTICLES = frozenset({"a", "an", "the"})

Span = tuple[int, int]
"""First character and one past the last."""


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase of a caption, as annotated."""

    text: str = ""
    """"" if only the span is known."""
    span: Span | None = None
    """As stated by the file, unchecked."""


@dataclass(frozen=True, kw_only=True)
class MarkedSpan:
    """The span of one or more phrases."""

    span: Span
    phrases: tuple[int, ...]
    """Indices of the phrases that share this span."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The result for every phrase of a caption."""

    spans: tuple[MarkedSpan, ...]
    """In reading order; no two overlap."""
    not_found: tuple[int, ...]
    misplaced: tuple[int, ...]
    """Those of `not_found` whose stated span contains other words."""
    overlapped: tuple[int, ...]


def place_phrases(caption: str, phrases: Sequence[Phrase]) -> Placement:
    """Return spans for as many phrases as can be marked without overlap."""
    options = [_options(caption, phrase) for phrase in phrases]
    found = sorted((i for i, option in enumerate(options) if option.spans), key=lambda i: options[i].rank())
    taken: dict[Span, list[int]] = {}
    overlapped = []
    for index in found:
        may_share = not options[index].is_reworded
        spans = options[index].spans
        span = next((span for span in spans if (span in taken and may_share) or _is_free(span, taken)), None)
        if span is None:
            overlapped.append(index)
        else:
            taken.setdefault(span, []).append(index)
    not_found = tuple(i for i, option in enumerate(options) if not option.spans)
    return Placement(
        spans=tuple(MarkedSpan(span=span, phrases=tuple(sorted(taken[span]))) for span in sorted(taken)),
        not_found=not_found,
        misplaced=tuple(i for i in not_found if phrases[i].text.strip() and _trimmed(caption, phrases[i].span)),
        overlapped=tuple(sorted(overlapped)),
    )


def mark_caption(caption: str, placement: Placement, where: str) -> str:
    """Return the caption with every span marked; whitespace and quotes around the whole caption are removed.

    Raises: DataError if the caption itself contains a mark, which would be ambiguous.
    """
    for mark in MARKS:
        if mark in caption:
            raise DataError(f"{where}: found {mark!r} in the caption, expected plain text; repair the caption")
    parts, end = [], 0
    for marked in placement.spans:
        parts += [caption[end : marked.span[0]], marked_phrase(caption[slice(*marked.span)])]
        end = marked.span[1]
    return plain_caption("".join(parts) + caption[end:])


def plain_caption(text: str) -> str:
    """Return a caption without surrounding whitespace and without the pair of quotes that some files add."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Candidate spans of a phrase."""

    spans: tuple[Span, ...] = ()
    """Best first; empty if the phrase is not in the caption."""
    is_reworded: bool = False
    """The caption has other words there (a rephrasing)."""

    def rank(self) -> tuple[int, bool, int]:
        """Return the sort key for placing phrases: longest first."""
        start, end = self.spans[0]
        return start - end, self.is_reworded, start


def _options(caption: str, phrase: Phrase) -> _Options:
    words = phrase.text.strip().strip('"').removesuffix(".").split()
    stated = _trimmed(caption, phrase.span)
    for span in (stated, *_in_other_units(caption, phrase.span)):
        if span is not None and caption[slice(*span)].lower().split() == " ".join(words).lower().split():
            return _Options(spans=(span,))
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    found = [match.span() for match in re.finditer(pattern, caption, re.IGNORECASE)] if words else []
    if phrase.span is None:
        return _Options(spans=tuple(found))
    if found:
        start = phrase.span[0]
        return _Options(spans=(min(found, key=lambda span: (abs(span[0] - start), span)),))
    if stated is None or not _is_whole_words(caption, stated):
        return _Options()
    if words and not _is_rephrasing(" ".join(words), caption[slice(*stated)]):
        return _Options()
    return _Options(spans=(stated,), is_reworded=bool(words))


def _in_other_units(caption: str, span: Span | None) -> list[Span | None]:
    """Return the character spans meant if a span counts bytes of UTF-8 or units of UTF-16, where they differ."""
    if span is None or caption.isascii():
        return []
    spans = []
    for encoding, size in (("utf-8", 1), ("utf-16-le", 2)):
        data = caption.encode(encoding, "surrogatepass")
        if 0 <= span[0] < span[1] <= len(data) // size:
            before, within = (data[a * size : b * size].decode(encoding, "ignore") for a, b in ((0, span[0]), span))
            spans.append(_trimmed(caption, (len(before), len(before) + len(within))))
    return spans


def _is_rephrasing(phrase: str, other: str) -> bool:
    """Return whether the words of one text are among those of the other in order, articles and marks aside."""
    shorter, longer = sorted((_content_words(phrase), _content_words(other)), key=len)
    remaining = iter(longer)
    return bool(shorter) and all(word in remaining for word in shorter)


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES]


def _trimmed(caption: str, span: Span | None) -> Span | None:
    """Return a span without whitespace at its ends; None if it is outside the caption or blank."""
    if span is None or not 0 <= span[0] < span[1] <= len(caption):
        return None
    text = caption[slice(*span)]
    start = span[0] + len(text) - len(text.lstrip())
    return (start, start + len(text.strip())) if text.strip() else None


def _is_whole_words(caption: str, span: Span) -> bool:
    return not any(0 < cut < len(caption) and caption[cut - 1].isalnum() and caption[cut].isalnum() for cut in span)


def _is_free(span: Span, taken: dict[Span, list[int]]) -> bool:
    return all(span[1] <= start or span[0] >= end for start, end in taken)

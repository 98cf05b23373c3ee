"""Finding phrases in a caption and marking them, one [SEG] each, without breaking the text.

The grounded-caption sources name phrases with masks; this module says where in the caption each stands, and
`mark_caption` writes the answer a model is trained on:

    "A man in a red hat." with the phrases "a man in a red hat" and "Red hat"
    -> "<p> A man in a red hat </p> [SEG]."     ("Red hat" lies inside the longer phrase and is dropped)

Rules, in this order:
1. A stated span counts if it holds the phrase, whether it counts characters, bytes of UTF-8 or units of UTF-16.
   Otherwise the phrase is looked for as whole words, upper or lower case alike, and the occurrence nearest to the
   stated span is taken. Where there is none, a span that begins and ends with whole words is believed if it words the
   phrase otherwise: articles and marks aside, the words of one are among those of the other, in order ("two men" for
   "two young men", "the man" for "A man"). What is left is "not found", and "misplaced" if its span holds other words.
2. Longer phrases are placed first, of equal ones those that are in the caption word for word. Phrases on the very same
   characters share one place (their masks are united), but for those whose span is only believed: two phrasings need
   not be one thing. A phrase without a stated span may move to another occurrence that is free. What still overlaps is
   "overlapped".
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
    """A piece of a caption, as an annotation names it."""

    text: str = ""
    """"" where only the span is known."""
    span: Span | None = None
    """As stated by the file, not checked."""


@dataclass(frozen=True, kw_only=True)
class MarkedSpan:
    """Where one or more phrases stand."""

    span: Span
    phrases: tuple[int, ...]
    """Indices of the phrases that share this place."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What became of every phrase of a caption."""

    spans: tuple[MarkedSpan, ...]
    """In reading order; no two overlap."""
    not_found: tuple[int, ...]
    misplaced: tuple[int, ...]
    """Those of `not_found` whose stated span holds other words."""
    overlapped: tuple[int, ...]


def place_phrases(caption: str, phrases: Sequence[Phrase]) -> Placement:
    """Return a place for as many phrases as can be marked side by side."""
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
    """Return the caption with every place marked, blanks and quotes around the whole of it removed.

    Raises: DataError if the caption itself holds a mark, as nobody could tell it from ours.
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
    """Return a caption without blanks around it, and without the pair of quotes some files put around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Where a phrase could stand."""

    spans: tuple[Span, ...] = ()
    """The best first; none when it is not in the caption."""
    is_reworded: bool = False
    """The caption has other words there."""

    def rank(self) -> tuple[int, bool, int]:
        """Return the key by which phrases are placed: longest first."""
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
    """Return the characters a span means if it counts bytes of UTF-8 or units of UTF-16, where that differs."""
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
    """Say whether the words of one text are among those of the other in order, articles and marks aside."""
    shorter, longer = sorted((_content_words(phrase), _content_words(other)), key=len)
    remaining = iter(longer)
    return bool(shorter) and all(word in remaining for word in shorter)


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES]


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

"""Removes mentions of the yellow outline from captions whose annotators saw the region outlined in yellow.

`data/sources/sam_captions.py` passes every caption through `remove_marker`. The outline is not in the image that the
model sees, so a caption must not mention it.

    "The object highlighted by a yellow edge is a red mug."  ->  "The object is a red mug."
    "A dog, outlined with a thin yellow contour, sleeps."    ->  "A dog sleeps."
    "The highlighted apple is ripe. It is highlighted."      ->  "The apple is ripe."
    "The lamp highlights the yellow edge of the book."       ->  ""

The release removes the words "highlighted", "highlight", "by a yellow edge" and the like one by one, which leaves "The
object  is a red mug" and "The lamp s the  of the book". Here whole phrases are removed. A sentence that would be broken
or still mention a yellow outline is removed completely, so a caption may become empty.
"""

import re

_SUSPECTS = ("yellow", "highlight")

_MARKED = r"(?:highlighted|outlined|marked|surrounded|enclosed|encircled|circled|bordered|indicated|framed|delineated)"
_KIND = r"(?:(?:bright|thin|thick|bold|vivid|distinct|clear|light|visible|prominent|solid|single)\s+)*"
_YELLOW = rf"(?:(?:a|an|the|its|this|that)\s+)?{_KIND}yellow(?:ish)?(?:[\s-]+colou?red)?\s+{_KIND}"
_OUTLINE = r"(?:edg(?:e|es|ing)|contours?|outlin(?:e|es|ing))"
"""Words that, after "yellow", always refer to the marker."""
_ANY_LINE = rf"(?:{_OUTLINE}|borders?|boundar(?:y|ies)|lines?|frames?|highlight(?:s|ing)?)"
"""Words that may also be an object in the image, so they need "marked by" before them."""
_IN_YELLOW = (
    r"(?:highlighted|outlined)\s+in\s+(?:bright\s+)?yellow"
    r"(?=\s*(?:[,.;:!?]|$)|\s+(?:is|are|was|were|has|have|shows?|appears?|seems?|looks?|features?|and)\b)"
)
_BY_MARKER = rf"(?:(?:yellow[\s-]+)?{_MARKED}\s+(?:by|with|in|using|within)\s+{_YELLOW}{_ANY_LINE}\b|{_IN_YELLOW})"
_BARE = r"highlighted(?:\s+in\s+(?:the\s+)?(?:image|picture|photo|scene))?(?=\s*(?:[,.;:!?]|and\b|$))"
_BE = r"(?:is|are|was|were|be|been|being)"
_PREDICATE = rf"(?:(?:has|have)\s+)?\b{_BE}\s+(?:{_BY_MARKER}|{_BARE})"
_PLACE = rf"(?:by|with|in|within|inside|under|along|at|of)\s+{_YELLOW}{_OUTLINE}\b"
_DETERMINER = r"(?:the|this|that|these|those|each|every|its|a|an|one)"
_NEW_SUBJECT = r"(?:the|this|that|a|an|its?|he|she|his|her|they|their|there|one)\b"

_STEPS = tuple(
    (re.compile(pattern, flags=re.IGNORECASE), replacement)
    for pattern, replacement in (
        # "a dog that is highlighted by a yellow edge and has" -> "a dog that has"
        (rf"\b((?:which|that|who)\s+){_PREDICATE}\s*,?\s+and\s+(?!{_NEW_SUBJECT})", r"\1"),
        (rf",\s*(?:which|that|who)\s+{_PREDICATE}\s*,", ""),
        (rf"\s*,?\s*\b(?:which|that|who)\s+{_PREDICATE}", ""),
        # "The dog is highlighted by a yellow edge and sleeps" -> "The dog sleeps"
        (rf"\b{_PREDICATE}\s*,?\s+and\s+(?!{_NEW_SUBJECT})", ""),
        # "The dog is highlighted by a yellow edge, showing its fur" -> "The dog is showing its fur"
        (rf"\b({_BE})\s+{_BY_MARKER}\s*,\s*(?=[a-z]+ing\b)", r"\1 "),
        # A phrase between commas is removed with both of them.
        (rf",\s*(?:being\s+)?(?:{_BY_MARKER}|{_PLACE})\s*,", ""),
    )
)
_REMARK = re.compile(rf"\s*,?\s*\b(?:being\s+)?(?:{_BY_MARKER}|{_PLACE})", flags=re.IGNORECASE)
_ENDS_WITH_BE = re.compile(rf"\b{_BE}$", flags=re.IGNORECASE)
_ATTRIBUTE = re.compile(
    rf"\b({_DETERMINER})\s+(?:yellow[\s-]+)?(?:highlighted|(?<=yellow-)outlined|(?<=yellow )outlined)"
    r"\s+(?!by\b|with\b|in\b|and\b|is\b|are\b|using\b)(?=(\w))",
    flags=re.IGNORECASE,
)
_OPENING = re.compile(r"^\s*Highlighted\s+(?!by\b|with\b|in\b|and\b)(?=\w)", flags=re.IGNORECASE)
_SPEAKS_OF_MARKER = re.compile(
    rf"\byellow(?:ish)?(?:[\s-]+colou?red)?[\s-]+{_KIND}{_OUTLINE}\b|\b{_PREDICATE}|\b{_BY_MARKER}"
    rf"|\byellow[\s-]+(?:highlighted|highlights?\b)",
    flags=re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def remove_marker(caption: str) -> str:
    """Return the caption without the yellow outline; "" if nothing else is left. Other captions are only stripped."""
    if not any(word in caption.lower() for word in _SUSPECTS):
        return caption.strip()
    sentences = (_clean(sentence) for sentence in _SENTENCE_END.split(caption.strip()))
    return " ".join(sentence for sentence in sentences if sentence)


def _clean(sentence: str) -> str:
    """Return one sentence without the marker, "" if that is impossible or leaves nothing."""
    before, cleaned = "", sentence
    while cleaned != before:  # Taking one phrase out may bring the parts of another together.
        before, cleaned = cleaned, _clean_once(cleaned)
    if cleaned == sentence and not _SPEAKS_OF_MARKER.search(sentence):
        return sentence
    if _SPEAKS_OF_MARKER.search(cleaned) or not re.search(r"\w+\W+\w+", cleaned):
        return ""
    return cleaned[0].upper() + cleaned[1:] if sentence[:1].isupper() else cleaned


def _clean_once(sentence: str) -> str:
    """Return the sentence after one round of removals, with spaces and commas repaired."""
    cleaned = _OPENING.sub("", _ATTRIBUTE.sub(_article, sentence))
    for pattern, replacement in _STEPS:
        cleaned = pattern.sub(replacement, cleaned)
    cleaned = _REMARK.sub(_without_remark, cleaned)
    if cleaned == sentence:
        return sentence
    cleaned = re.sub(r"\s+", " ", cleaned)
    cleaned = re.sub(r"\s+([,.;:!?])", r"\1", cleaned)
    return re.sub(r",(?=[,.;:!?])", "", cleaned).strip(" ,;:")


def _without_remark(match: re.Match[str]) -> str:
    """Return nothing for a remark, but keep it if it is the predicate of the sentence, which is then removed."""
    before = match.string[: match.start()]
    return match[0] if _ENDS_WITH_BE.search(before) else ""


def _article(match: re.Match[str]) -> str:
    """Return the determiner of the following noun, with the matching "a" or "an"."""
    word = match[1]
    if word.lower() in ("a", "an"):
        fitting = "an" if match[2].lower() in "aeiou" else "a"
        word = fitting.capitalize() if word[0].isupper() else fitting
    return f"{word} "

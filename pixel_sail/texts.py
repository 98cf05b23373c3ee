"""Values from files in messages, and characters that cannot be printed or tokenized.

A value of an annotation file may be of any size. A message shows its beginning, and the rest is never formatted:

    shown([1, 2, "a red hat"])           ->  "[1, 2, 'a red hat']"
    shown({"size": [480, 640], "counts": "XyZ..." (a megabyte)})  ->  "{'size': [480, 640], 'counts': 'XyZ..."
"""

import re
from collections.abc import Iterable
from itertools import chain

SHOWN_CHARS = 60
MAX_MESSAGE_CHARS = 4000
"""Maximum length of an error message; enough for the traceback of a data worker."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_MAX_DEPTH = 12
_MAX_INTEGER_BITS = 1024
_BRACKETS: dict[type, str] = {list: "[]", tuple: "()", set: "{}", frozenset: "{}", dict: "{}"}


def shown(value: object, limit: int = SHOWN_CHARS) -> str:
    """Return the `repr` of a value, cut to `limit` characters, in time independent of its size."""
    text = _written(value, limit, _MAX_DEPTH)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def limited(message: str) -> str:
    """Return a message without unpaired surrogates and of at most MAX_MESSAGE_CHARS; a longer one loses its middle."""
    if len(message) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2 - 20
        message = f"{message[:half]} [... omitted ...] {message[-half:]}"
    return message.encode("utf-8", "backslashreplace").decode("utf-8")


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text contains an unpaired UTF-16 surrogate, which cannot be tokenized or written to a file."""
    return _HALF_CHARACTER.search(text) is not None


def _written(value: object, limit: int, depth: int) -> str:
    """Return `repr(value)`, or a beginning of it that is longer than `limit` characters."""
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        return f"an integer of {value.bit_length()} bits"
    brackets = _BRACKETS.get(type(value))
    if brackets is None:
        return repr(value)
    if depth == 0:
        return "..."
    parts: list[str] = []
    length = 0
    assert isinstance(value, Iterable), "all of these are containers"
    items = chain.from_iterable(value.items()) if isinstance(value, dict) else value
    for item in items:
        if length > limit:
            break
        parts.append(_written(item, limit - length, depth - 1))
        length += len(parts[-1]) + 2
    if isinstance(value, dict):
        parts = [": ".join(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    end = "," if len(parts) == 1 and isinstance(value, tuple) else ""
    return brackets[0] + ", ".join(parts) + end + brackets[1]

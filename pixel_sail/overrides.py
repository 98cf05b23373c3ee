"""Quotes command-line overrides so that Hydra reads text settings as typed.

`config.load_config` and the sweep call this before Hydra parses a command line. Hydra infers the type of a value from
its form and does not know the setting. Values of text settings are therefore quoted if Hydra would change them:

    name=2024_11_05              ->  name='2024_11_05'                (20241105 otherwise)
    image=image (1).jpg          ->  image='image (1).jpg'            (a lexer error otherwise)
    experiment=007               ->  experiment='007'                 (the file 007.yaml, not 7.yaml)
    optim.lora.targets=[a(b|c)]  ->  optim.lora.targets=['a(b|c)']
    seed=007, name=abc, name="1.10", run_dir=${paths.runs}/a, output=null    are not changed

A quoted value follows Hydra's rules, and so does a text with Hydra's backslashes (`a\\,b`).
"""

import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

OPENING, CLOSING = "([{", ")]}"
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NAME = re.compile(r"[\w.+/-]+")
_NAMES = re.compile(r"[\w.+/\[\], -]+")
_FUNCTION = re.compile(r"(?:choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool|json_str)\(.*\)", re.DOTALL)
"""Hydra's functions, allowed instead of values in a sweep."""


def quoted(text: str) -> str:
    """Return a text in quotation marks, which Hydra reads as exactly this text."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def as_typed(overrides: Sequence[str], schema: type, text_before: Callable[[str], bool]) -> list[str]:
    """Return overrides with which every text setting gets the text that was typed.

    schema: dataclass of the whole configuration; text_before: returns whether a key that no dataclass declares holds a
    text now.
    """
    return [_as_typed(override, schema, text_before, _text) for override in overrides]


def sweep_as_typed(overrides: Sequence[str], schema: type) -> list[str]:
    """Return the overrides of a sweep, in which a comma separates values; each value is the text that was typed."""
    return [_as_typed(override, schema, lambda key: False, _texts) for override in overrides]


def needs_look(override: str, schema: type) -> bool:
    """Return whether an override sets an undeclared key to a value that Hydra does not read as text, list or dict."""
    key, _, value = override.partition("=")
    return kind_of(schema, key.lstrip("+")) is Any and not isinstance(_read(value), str | list | dict)


def kind_of(schema: type, key: str) -> Any:
    """Return the type of a setting: Any for undeclared keys of a dict, None if the schema has no such key."""
    kind: Any = schema
    for part in key.split("."):
        if isinstance(kind, type) and is_dataclass(kind):
            kind = _fields(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            return None
    return kind


@cache
def _fields(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _as_typed(override: str, schema: type, text_before: Callable[[str], bool], text: Callable[[str, bool], str]) -> str:
    key, separator, value = override.partition("=")
    # Deletions, groups with a package (@), and Hydra's own settings are not changed.
    if not separator or key.startswith("~") or "@" in key or key.startswith("hydra."):
        return override
    name = key.lstrip("+")
    kind = kind_of(schema, name)
    is_union = get_origin(kind) in (Union, types.UnionType)
    choices = get_args(kind) if is_union else (kind,)
    if str in choices:
        value = text(value, type(None) in choices)
    elif get_origin(kind) is list and get_args(kind) == (str,):
        value = _list(value)
    elif (kind is None or is_dataclass(kind) or get_origin(kind) is dict) and "." not in name:
        value = _words(value)
    elif needs_look(override, schema) and value.lower() != "null" and text_before(name):
        value = text(value, True)
    return f"{key}={value}"


def _read(value: str) -> Any:
    """Return a value as Hydra parses it, None if it cannot."""
    parser = OverridesParser.create()
    try:
        override: Override = parser.parse_override(f"key={value}")
        return override.value()
    except HydraException:
        return None


def _text(value: str, is_optional: bool) -> str:
    """Return the value of a text setting, quoted if needed."""
    if _QUOTED.fullmatch(value) or (is_optional and value.lower() == "null"):
        return value
    read = _read(value)
    # A backslash is the only way to type a text that differs from its value.
    return value if isinstance(read, str) and (read == value or "\\" in value) else quoted(value)


def _texts(value: str, is_optional: bool) -> str:
    """Return several values of a text setting."""
    if _FUNCTION.fullmatch(value):
        return value
    return ",".join(_text(part.strip(), is_optional) for part in _parts(value))


def _list(value: str) -> str:
    """Return a list of texts."""
    if not (value.startswith("[") and value.endswith("]")) or not value[1:-1].strip():
        return value
    return f"[{','.join(_text(part.strip(), False) for part in _parts(value[1:-1]))}]"


def _words(value: str) -> str:
    """Return the choice of a group: one or several file names."""
    if not _NAMES.fullmatch(value):
        return value
    return _NAME.sub(lambda name: name[0] if _is_plain(name[0]) else quoted(name[0]), value)


def _is_plain(name: str) -> bool:
    return name.lower() == "null" or isinstance(_read(name), str)


def _parts(value: str) -> Iterator[str]:
    """Split at commas, except within quotation marks or brackets."""
    start, depth, quote = 0, 0, ""
    for place, character in enumerate(value):
        if quote:
            quote = "" if character == quote and value[place - 1] != "\\" else quote
        elif character in "'\"" and not value[start:place].strip():
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and depth <= 0:
            yield value[start:place]
            start = place + 1
    yield value[start:]

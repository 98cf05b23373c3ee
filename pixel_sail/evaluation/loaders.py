"""Loaders of evaluation items, and safe calls with settings from untrusted files.

`engine.py` writes the loader of the items and its settings to `protocol.json`. `stored.py` reads it back, possibly from
an untrusted folder. Names are looked up in `LOADERS`; nothing is imported or called by a name from a file:

    {"loader": "refer_seg", "settings": {"root": "data/ref_seg", "dataset": "refcoco", "split": "val"}, "max_images": 0}

Older folders have {"_target_": "pixel_sail.evaluation.refer_seg.load", ...}, which is looked up as well. Other
functions are called only if the user names them on the command line (`--loader`).
"""

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_method

from pixel_sail.config import ConfigError, check_plain
from pixel_sail.data.sources import boxed_expressions, coco_semantic, reasonseg
from pixel_sail.evaluation import grounded_caption, refer_seg, region_caption, region_choice, visual_referring
from pixel_sail.renamed import current_config
from pixel_sail.types import DataError, MissingDataError

Loader = Callable[..., Any]

LOADERS: Mapping[str, Loader] = {
    "refer_seg": refer_seg.load,
    "refer_seg_with_boundaries": refer_seg.load_with_boundaries,
    "reasonseg": refer_seg.load_reasonseg,
    "reasonseg_expressions": reasonseg.expressions,
    "coco_semantic": coco_semantic.expressions,
    "boxed_expressions": boxed_expressions.load,
    "grounded_caption": grounded_caption.load,
    "perbench_caption": region_caption.load_perbench,
    "refcocog_caption": region_caption.load_refcocog,
    "region_choice": region_choice.load,
    "visual_referring": visual_referring.load,
}
"""Name in `protocol.json` -> function. All only read annotations and return items."""

LOADER_TARGETS = {f"{function.__module__}.{function.__qualname__}": name for name, function in LOADERS.items()}
"""Their names in configurations and in older `protocol.json` files."""

LOADER_HELP = "your own function, as package.module.function, that reads the items of an eval; may be repeated"

TARGET = "_target_"
LIMIT = "max_images"


def eval_entry(node: Mapping[str, Any], max_images: int) -> dict[str, Any]:
    """Return the `protocol.json` entry of an eval of a configuration."""
    settings = {key: value for key, value in node.items() if key != TARGET}
    return {"loader": LOADER_TARGETS.get(node[TARGET], node[TARGET]), "settings": settings, LIMIT: max_images}


def read_entry(entry: Any, where: str) -> dict[str, Any]:
    """Check that an entry holds a name and plain settings, and return it. Raises: DataError."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: found {type(entry).__name__}, expected an eval; evaluate again")
    if TARGET in entry:
        settings = {key: value for key, value in entry.items() if key not in (TARGET, LIMIT)}
        entry = {
            "loader": LOADER_TARGETS.get(str(entry[TARGET]), entry[TARGET]),
            "settings": settings,
            LIMIT: entry.get(LIMIT, 0),
        }
    if entry.keys() != {"loader", "settings", LIMIT} or not isinstance(entry["settings"], dict):
        raise DataError(
            f"{where}: found fields {sorted(entry)}, expected a loader, its settings and {LIMIT}; evaluate again"
        )
    limit = entry[LIMIT]
    if type(limit) is not int or limit < 0 or not isinstance(entry["loader"], str):
        raise DataError(
            f"{where}: found {LIMIT} {limit!r} and loader {entry['loader']!r:.80}, expected 0 or more, a name"
        )
    check_plain(entry["settings"], where)
    settings = current_config({"evals": {"this": entry["settings"]}})["evals"]["this"]
    return entry | {"settings": settings}


def load_entry(entry: Mapping[str, Any], where: str, own: Collection[str] = ()) -> Any:
    """Call the function of a checked entry and return its result.

    own: functions besides `LOADERS` that the user allows, as `package.module.function`.
    Raises: DataError for another function, for wrong settings, and for unreadable annotations, whose content is not
    shown since they may belong to others. ConfigError for a user function that does not exist.
    """
    loader = _loader(entry["loader"], where, own)
    _check_settings(loader, entry["settings"], where)
    try:
        return loader(**entry["settings"])
    except MissingDataError as error:
        raise MissingDataError(f"{where}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: the items of {entry['loader']} {entry['settings']!r:.300} cannot be read "
            f"({type(error).__name__}), expected readable annotations; use tools/check_data.py, or scripts/evaluate.py "
            "with your own eval, to see the error (hidden here, since the folder may be someone else's)"
        ) from None


def _loader(name: str, where: str, own: Collection[str]) -> Loader:
    """Return a function by its name in a file. Raises: DataError, ConfigError."""
    if name in LOADERS:
        return LOADERS[name]
    if name not in own:
        raise DataError(
            f"{where}: found the loader {name!r:.120}, expected one of {sorted(LOADERS)}; if it is your own function, "
            "allow it with --loader"
        )
    try:
        return get_method(name)
    except (HydraException, ImportError, ValueError) as error:
        raise ConfigError(f"--loader {name}: {error}") from error


def _check_settings(loader: Loader, settings: Mapping[str, Any], where: str) -> None:
    """Raise DataError unless a function accepts settings of these names and types."""
    signature = inspect.signature(loader)
    try:
        bound = signature.bind(**settings)
    except TypeError as error:
        raise DataError(
            f"{where}: the settings do not fit ({error}), expected those of {', '.join(signature.parameters)}; the "
            "evaluation was written by another version, evaluate again"
        ) from None
    hints = typing.get_type_hints(loader)
    for name, value in bound.arguments.items():
        if not _fits(value, hints.get(name, Any)):
            raise DataError(f"{where}: found {name} = {value!r:.80}, expected {signature.parameters[name].annotation}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a parameter. Unknown types accept anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint in (str, Path):
        return isinstance(value, str)
    if hint in (bool, int, type(None)):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if origin in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if origin in (Mapping, dict):
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    return True

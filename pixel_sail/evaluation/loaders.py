"""The functions that an evaluation folder may name, and calling one with settings that somebody else wrote.

`engine.py` writes into `protocol.json` which function read the items and with what settings; `stored.py` reads it back,
from anybody's folder. A name is looked up in `LOADERS`, nothing is imported or called by its name from a file:

    {"loader": "refer_seg", "settings": {"root": "data/ref_seg", "dataset": "refcoco", "split": "val"}, "max_images": 0}

Folders written before have {"_target_": "pixel_sail.evaluation.refer_seg.load", ...}, which is looked up as well. A
function of one's own outside this list is called only where its user names it on the command line (`--loader`).
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
"""Name in `protocol.json` -> function. All only read annotations and return what is asked."""

LOADER_TARGETS = {f"{function.__module__}.{function.__qualname__}": name for name, function in LOADERS.items()}
"""What configurations call them, and what `protocol.json` called them before."""

LOADER_HELP = "a function of your own, as package.module.function, that may read the items of an eval; may be repeated"

TARGET = "_target_"
LIMIT = "max_images"


def eval_entry(node: Mapping[str, Any], max_images: int) -> dict[str, Any]:
    """Return what `protocol.json` says about an eval of a configuration."""
    settings = {key: value for key, value in node.items() if key != TARGET}
    return {"loader": LOADER_TARGETS.get(node[TARGET], node[TARGET]), "settings": settings, LIMIT: max_images}


def read_entry(entry: Any, where: str) -> dict[str, Any]:
    """Return such an entry after checking that it holds a name and plain settings. Raises: DataError."""
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
    """Return what the function of a checked entry returns.

    own: functions beside `LOADERS` that the user of this process allows, as `package.module.function`.
    Raises: DataError for another function, for settings it does not take, and for annotations that cannot be read;
    these are anybody's files, so their content is not shown. ConfigError for a function of the user's that is none.
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
            f"({type(error).__name__}). What is in these files is not shown, as the folder may be somebody else's; "
            "tools/check_data.py, or scripts/evaluate.py with an eval of your own, says what is wrong with them"
        ) from None


def _loader(name: str, where: str, own: Collection[str]) -> Loader:
    """Return a function by its name in a file. Raises: DataError, ConfigError."""
    if name in LOADERS:
        return LOADERS[name]
    if name not in own:
        raise DataError(
            f"{where}: found the loader {name!r:.120}, expected one of {sorted(LOADERS)}; a file of others does not "
            "say what is called. Where it is a function of yours, allow it with --loader"
        )
    try:
        return get_method(name)
    except (HydraException, ImportError, ValueError) as error:
        raise ConfigError(f"--loader {name}: {error}") from error


def _check_settings(loader: Loader, settings: Mapping[str, Any], where: str) -> None:
    """Raise DataError unless a function takes settings of these names and types."""
    signature = inspect.signature(loader)
    try:
        bound = signature.bind(**settings)
    except TypeError as error:
        raise DataError(
            f"{where}: the settings do not fit ({error}), expected those of {', '.join(signature.parameters)}; the "
            "evaluation is of another version, evaluate again"
        ) from None
    hints = typing.get_type_hints(loader)
    for name, value in bound.arguments.items():
        if not _fits(value, hints.get(name, Any)):
            raise DataError(f"{where}: found {name} = {value!r:.80}, expected {signature.parameters[name].annotation}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value of a JSON file is of the type that a parameter has; unknown types take anything."""
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

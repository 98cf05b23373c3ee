"""Command line of the data check.

`tools/check_data.py` passes its arguments, `data_check.py` gets a `CheckPlan`. Accepted:

    (nothing)                                 all of configs/source, except missing data that is not downloaded
    source=refcoco,refcocog                   these sources
    experiment=quickstart  data=refcoco ...   the sources of a run, with any override of scripts/train.py
    evals=perbench  evals=[refcoco_val,...]   the evals of scripts/evaluate.py: readability and images
    root=DIR dataset=NAME split=val           one REFER folder; split_by= and image_dir= as for the source

and in each case sample=200 (or all), sheet=6, strict=true, progress=false, out=FOLDER.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pixel_sail.config import CONFIG_FOLDER, ConfigError, EvalConfig, TrainConfig, load_config
from pixel_sail.data.checking.downloads import downloads_of

REFER_KEYS = ("root", "dataset", "split", "split_by", "image_dir")
REFER_LOAD = "pixel_sail.data.sources.refer.load"
NO_NAME = "name=data_check"
"""Placeholder run name, since a training config requires one."""

Node = dict[str, Any]


@dataclass(kw_only=True)
class CheckSettings:
    """Options of the check."""

    sample: int | None = 200
    """Number of items, masks and images decoded per source, None for all."""
    sheet: int = 6
    """Number of samples per source rendered in the HTML report."""
    strict: bool = False
    """Whether notes also fail the check."""
    progress: bool = True
    out: Path = Path("runs/data_check")

    def __post_init__(self) -> None:
        """Check the numbers. Raises: ConfigError."""
        if (self.sample is not None and self.sample < 1) or self.sheet < 0:
            raise ConfigError(f"found sample={self.sample} sheet={self.sheet}, expected at least 1 (or all) and 0")


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """The sources to check and the evals to compare them with."""

    sources: dict[str, Node]
    evals: dict[str, Node] = field(default_factory=dict)
    data_folder: Path
    checked_evals: dict[str, Node] = field(default_factory=dict)
    """Evals that are checked themselves. `evals` are only compared with the sources."""
    are_trained_on: bool = True
    """False: the sources are plain folders, whose evaluation splits are allowed."""
    left_out: tuple[str, ...] = ()
    """Sources of synthetic data that was not rendered."""


def parse_arguments(arguments: Sequence[str]) -> tuple[CheckPlan, CheckSettings]:
    """Parse the command line. Raises: ConfigError."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"found {argument!r}, expected key=value, for example source=refcoco or sample=all")
        if key in (*REFER_KEYS, "source", "sample", "sheet", "strict", "progress", "out"):
            own[key] = value
        else:
            overrides.append(argument)
    refer = {key: own.pop(key) for key in REFER_KEYS if key in own}
    source = own.pop("source", None)
    settings = _settings(own)
    if refer:
        if source is not None:
            raise ConfigError("found root= and source=, expected one of them")
        return _refer_plan(refer, overrides), settings
    names_run = any(o.startswith(("data=", "experiment=")) for o in overrides)
    if source is None and not names_run and any(o.startswith("evals=") for o in overrides):
        config = load_config("evaluate", EvalConfig, ["checkpoint=data_check", *overrides])
        if not config.evals:
            raise ConfigError("evals is empty; name some, for example evals=perbench")
        return CheckPlan(sources={}, checked_evals=config.evals, data_folder=Path(config.paths.data)), settings
    if source is not None or not names_run:
        return _source_plan(source, overrides), settings
    run = load_config("train", TrainConfig, _named(overrides))
    return CheckPlan(sources=run.data.sources, evals=run.evals, data_folder=Path(run.paths.data)), settings


def _settings(own: dict[str, str]) -> CheckSettings:
    truth = {"true": True, "false": False}
    values: dict[str, Any] = {}
    for key, value in own.items():
        if key in ("strict", "progress"):
            if value not in truth:
                raise ConfigError(f"found {key}={value}, expected true or false")
            values[key] = truth[value]
        elif key in ("sample", "sheet"):
            is_all = key == "sample" and value == "all"
            if not is_all and not value.isdecimal():
                raise ConfigError(f"found {key}={value}, expected a number{' or all' if key == 'sample' else ''}")
            values[key] = None if is_all else int(value)
        else:
            values[key] = Path(value)
    return CheckSettings(**values)


def _named(overrides: Sequence[str]) -> list[str]:
    has_name = any(override.startswith(("name=", "experiment=")) for override in overrides)
    return [*overrides] if has_name else [NO_NAME, *overrides]


def _refer_plan(refer: dict[str, str], overrides: Sequence[str]) -> CheckPlan:
    if overrides or "root" not in refer or "dataset" not in refer:
        raise ConfigError(
            f"found {sorted(refer)} and {list(overrides)}, expected root=DIR dataset=NAME and no other key"
        )
    node = {"_target_": REFER_LOAD, **refer}
    return CheckPlan(sources={refer["dataset"]: node}, data_folder=Path(refer["root"]), are_trained_on=False)


def _source_plan(source: str | None, overrides: Sequence[str]) -> CheckPlan:
    """Return the sources of these files of configs/source, or of all."""
    available = sorted(path.stem for path in (CONFIG_FOLDER / "source").glob("*.yaml"))
    wanted = available if source in (None, "all") else [name for name in str(source).strip("[]").split(",") if name]
    unknown = sorted(set(wanted) - set(available))
    if unknown or not wanted:
        raise ConfigError(f"source={source}: found {unknown}, expected names of configs/source: {available}")
    composed = load_config("train", TrainConfig, [*_named(overrides), f"+source@data.sources=[{','.join(wanted)}]"])
    keys = {str(key) for name in wanted for key in OmegaConf.load(CONFIG_FOLDER / "source" / f"{name}.yaml")}
    sources = {key: node for key, node in composed.data.sources.items() if key in keys}
    left_out: tuple[str, ...] = ()
    data_folder = Path(composed.paths.data)
    if source in (None, "all"):
        left_out = tuple(sorted(name for name, node in sources.items() if _is_optional_and_absent(node, data_folder)))
    return CheckPlan(
        sources={name: node for name, node in sources.items() if name not in left_out},
        data_folder=data_folder,
        left_out=left_out,
    )


def node_paths(node: Node) -> list[Path]:
    """Return every path among the arguments of a source, and the dataset folder for its root."""
    texts = [value for key, value in node.items() if key != "_target_" and isinstance(value, str) and "/" in value]
    if "root" in node and "dataset" in node:
        names = [node["dataset"]] if isinstance(node["dataset"], str) else node["dataset"]
        texts = [f"{node['root']}/{name}" for name in names]
    return [Path(text) for text in texts]


def _is_optional_and_absent(node: Node, data_folder: Path) -> bool:
    """Return whether a source without a download is missing: synthetic data, or data outside the data folder."""
    paths = node_paths(node)
    if not paths or any(path.exists() for path in paths):
        return False
    entries = [entry for path in paths for entry in downloads_of(str(path))]
    is_synthetic = bool(entries) and all(entry.is_synthetic for entry in entries)
    return is_synthetic or not any(path.is_relative_to(data_folder) for path in paths)

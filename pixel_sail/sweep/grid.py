"""Expands overrides with several values into one job per combination.

`run.py` expands the command line, `jobs.py` runs the jobs. Values have the syntax of Hydra's multirun: `a,b,c`,
`range(1,4)`, `choice(a,b)`; texts are kept as typed. An example of the data:

    expand(["experiment=refshapes_ladder", "ablation=stride_4,stride_8", "seed=1,2"])[1] == Job(
        name="ablation-stride_4__seed-2",
        overrides=("experiment=refshapes_ladder", "ablation=stride_4", "seed=2"),
        swept={"ablation": "stride_4", "seed": "2"},
    )
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from pixel_sail.config import ConfigError, TrainConfig
from pixel_sail.overrides import sweep_as_typed

OWN_KEYS = ("run_dir", "name")
"""Settings that the sweep sets for every job."""

_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of a sweep."""

    name: str
    """Name of its folder, from the swept overrides."""
    overrides: tuple[str, ...]
    swept: dict[str, str]
    """The overrides that differ between jobs, key -> value."""


def expand(overrides: Sequence[str]) -> list[Job]:
    """Return the jobs; the last swept override changes fastest.

    Raises: ConfigError for an override that cannot be parsed or that the sweep sets itself, or two jobs with one name.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(sweep_as_typed(overrides, TrainConfig))
    except HydraException as error:
        raise ConfigError(f"sweep: {error}") from error
    axes: list[tuple[str, list[str], bool]] = []
    for override in parsed:
        key = override.get_key_element()
        if key.lstrip("+~") in OWN_KEYS:
            raise ConfigError(f"sweep: found {override.input_line!r}; the sweep sets folder and name of every job")
        values = [override.input_line or ""]
        if override.is_sweep_override():
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        axes.append((key, values, override.is_sweep_override()))
    jobs = []
    for combination in itertools.product(*(values for _, values, _ in axes)):
        swept = {
            key: value.partition("=")[2]
            for (key, _, is_swept), value in zip(axes, combination, strict=True)
            if is_swept
        }
        jobs.append(Job(name=job_name(swept), overrides=combination, swept=swept))
    equal = sorted(name for name, count in Counter(job.name for job in jobs).items() if count > 1)
    if equal:
        raise ConfigError(f"sweep: several jobs would have the folder {equal[0]!r}; give every value once")
    return jobs


def job_name(swept: dict[str, str]) -> str:
    """Return the name of a job's folder."""
    parts = (f"{key}-{value}" for key, value in swept.items())
    return "__".join(_NOT_IN_NAMES.sub("_", part).strip("_") for part in parts) or "only"

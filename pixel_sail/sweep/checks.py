"""What can be known to be wrong with a job before it runs: without data, weights, or the processes it will have.

`run.py` checks every job, and the evaluation they share, before the first one starts. The checks are those that
training makes too, made early. An example, the end of what is said about `experiment=quickstart
ablation=stride_4,marks_box`:

    job 'ablation-marks_box' (experiment=quickstart ablation=marks_box): data.sources.osprey_short_form: found no
    _target_ in {'prompt_fractions': {'box': 1.0}}, expected a function and its arguments; ...
"""

import inspect
from collections.abc import Sequence
from typing import Any

from pixel_sail.config import ConfigError, EvalConfig, TrainConfig, build, load_config
from pixel_sail.data.loader import StreamAssignment
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.sweep.grid import Job


def checked_config(job: Job) -> TrainConfig:
    """Return the configuration of a job. Raises: ConfigError, which names the job and its overrides."""
    try:
        config = load_config("train", TrainConfig, [*job.overrides, f"name='{job.name}'"])
        PixelSailConfig.from_architecture(config.model.architecture)
        if config.data.global_batch_size is not None:
            # What one process cannot share out evenly, several cannot either.
            StreamAssignment(
                global_batch_size=config.data.global_batch_size,
                rank=0,
                world_size=1,
                micro_batch_size=config.data.micro_batch_size,
            )
        for name, node in config.data.sources.items():
            _check_node(node, f"data.sources.{name}")
        for name, node in config.evals.items():
            _check_node(node, f"evals.{name}")
        for name, teacher in config.distillation.items():
            _check_node(teacher.model, f"distillation.{name}.model")
    except ValueError as error:
        raise ConfigError(f"sweep: job {job.name!r} ({' '.join(job.overrides)}): {error}") from error
    return config


def check_evaluation(overrides: Sequence[str]) -> None:
    """Raise ConfigError for overrides that scripts/evaluate.py would refuse with any checkpoint."""
    try:
        config = load_config("evaluate", EvalConfig, ["checkpoint=of_each_job", *overrides])
        for name, node in config.evals.items():
            _check_node(node, f"evals.{name}")
    except ValueError as error:
        raise ConfigError(f"sweep: --evaluate {' '.join(overrides)!r}: {error}") from error


def _check_node(node: Any, where: str) -> None:
    """Raise ConfigError where `build` could not call what an open-set entry names; nothing is called."""
    if isinstance(node, dict) and "_target_" in node:
        node = {**node, "_partial_": True, "_recursive_": False}
    function = build(node, where)
    try:
        inspect.signature(function.func).bind(*function.args, **function.keywords)
    except TypeError as error:
        raise ConfigError(f"{where}: {node['_target_']} cannot be called: {error}; look at its arguments") from error

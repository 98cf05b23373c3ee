"""Checks the configuration of every job before a sweep starts, without data, weights or processes.

`run.py` checks all jobs, and the evaluation they share, before the first one starts. Training makes the same checks
later. An example, the end of the message for `experiment=quickstart ablation=stride_4,marks_box`:

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
            # A batch that one process cannot split evenly, several cannot split either.
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
    """Raise ConfigError for overrides that scripts/evaluate.py would reject with any checkpoint."""
    try:
        config = load_config("evaluate", EvalConfig, ["checkpoint=of_each_job", *overrides])
        for name, node in config.evals.items():
            _check_node(node, f"evals.{name}")
    except ValueError as error:
        raise ConfigError(f"sweep: --evaluate {' '.join(overrides)!r}: {error}") from error


def _check_node(node: Any, where: str) -> None:
    """Raise ConfigError if `build` could not call the function that an entry names; nothing is called."""
    if isinstance(node, dict) and "_target_" in node:
        node = {**node, "_partial_": True, "_recursive_": False}
    function = build(node, where)
    try:
        inspect.signature(function.func).bind(*function.args, **function.keywords)
    except TypeError as error:
        raise ConfigError(f"{where}: {node['_target_']} cannot be called: {error}; correct its arguments") from error

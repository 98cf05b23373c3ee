"""Builds model, data and optimizer of a run and restores its last checkpoint.

`training/loop.py` makes steps with the `Run` that `prepare` returns, `training/dry_run.py` a single step. For example

    Run(state=TrainState(step=500, ...), found=Path("runs/mine/checkpoints/step_00000500"), num_trained=1_214_464, ...)
"""

import inspect
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from hydra.utils import get_object
from torch import Tensor

from pixel_sail import dist
from pixel_sail.config import ConfigError, DataConfig, OptimConfig, TrainConfig, build
from pixel_sail.data.decontamination import evaluation_image_ids, without_images
from pixel_sail.data.fingerprint import data_fingerprint
from pixel_sail.data.loader import StepData, StreamAssignment, training_batches
from pixel_sail.data.mixture import Mixture
from pixel_sail.distillation.teachers import load_teachers
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.balance import SampleCost
from pixel_sail.planning.length import Length, length_lines, measured_length, needs_measured_length, with_length
from pixel_sail.training import checkpoint
from pixel_sail.training.accelerator import build_accelerator, collective_timeout, give_timeout
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import TrainState
from pixel_sail.training.finite import GradientCheck
from pixel_sail.training.muon import find_layouts
from pixel_sail.training.optim import build_optimizer
from pixel_sail.training.rollback import behind_rollbacks
from pixel_sail.training.run_lock import RunLock
from pixel_sail.training.schedule import is_stable
from pixel_sail.training.step import Distillation, source_columns
from pixel_sail.types import Example

logger = logging.getLogger(__name__)

FREE_KEYS = (
    *("log", "checkpoint", "validation", "predict", "evals", "paths", "run_dir", "name", "deepspeed"),
    *("allow_random_teachers", "watchdog", "metric_bounds", "kernels"),
)
"""Groups that may change between the sessions of a run, as they do not affect its results."""

FREE_DATA_KEYS = ("num_workers", "micro_batch_size", "planned_samples")
"""The same within `data`: they only affect how work is distributed and planned."""

FREE_OPTIM_KEYS = ("activation_checkpointing",)
"""The same within `optim`, so that a run that ran out of memory can resume with checkpointing."""

SCHEDULE_KEYS = ("steps", "warmup_fraction", "decay_fraction", "final_lr")
"""The same within `optim` during the stable phase of `schedule=wsd`: earlier steps do not depend on them."""

SINGLE_VALUES = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the training steps of a run need on one rank."""

    config: TrainConfig
    """Configuration, with steps and sequences per step resolved from epochs or samples per step."""
    length: Length | None
    """Measured length; None if the configuration or a checkpoint states it."""
    run_dir: Path
    lock: RunLock | None
    accelerator: Accelerator
    model: Any
    """Model as wrapped by the accelerator."""
    optimizer: Any
    gradients: GradientCheck
    processor: PixelSailProcessor
    mixture: Mixture
    assignment: StreamAssignment
    distillation: Distillation | None
    identity: dict[str, Any]
    """Configuration and data fingerprint that must not change when a run resumes."""
    state: TrainState
    """State before the next step."""
    found: Path | None
    """Checkpoint from which the run resumes."""
    num_parameters: int
    num_trained: int

    @property
    def checkpoints(self) -> Path:
        """Return the folder of all checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def distill_terms(self) -> tuple[DistillTerm, ...]:
        """Return the losses of the teachers."""
        return self.distillation.terms if self.distillation is not None else ()


def prepare(config: TrainConfig, *, lock: bool) -> Run:
    """Build a run. `lock`: lock its folder for this process, see training/run_lock.py.

    Raises: ConfigError, DataError and CheckpointError.
    """
    dist.ensure_launch_environment()
    run_dir = Path(config.run_dir)
    found = checkpoint.latest(run_dir / "checkpoints")
    if found is not None:
        config = with_saved_length(config, found)
    if config.data.global_batch_size is not None:
        # Raise for an uneven distribution before loading anything.
        stream_assignment(config.data)
    # Teachers and model come before the accelerator: with ZeRO-3 it shards every model that Hugging Face loads.
    distillation = build_distillation(config)
    distill_terms = distillation.terms if distillation is not None else ()
    model, processor = build_model(config.model, seed=config.seed, teachers=config.distillation)
    with data_fingerprint() as files:
        mixture = build_mixture(config.data, seed=config.seed)
    length = None
    if needs_measured_length(config):
        length = measure_length(config, mixture, processor)
        config = with_length(config, global_batch_size=length.global_batch_size, steps=length.steps)
    assignment = stream_assignment(config.data)
    accelerator = build_accelerator(config, assignment.accumulation)
    check_agreement(config)
    run_lock = RunLock(run_dir) if lock else None
    identity = run_identity(asdict(config)) | {checkpoint.DATA_FILES: data_identity(mixture, files)}
    num_columns = len(source_columns(distill_terms))
    state = start = TrainState.start(
        num_streams=assignment.num_streams, num_sources=len(mixture.names), num_columns=num_columns
    )
    saved = None
    if found is not None:
        if config.checkpoint.resume == "never":
            raise ConfigError(f"run_dir {run_dir} holds {found.name}, but checkpoint.resume=never; use another run_dir")
        allowed = config.checkpoint.allow_changed_data
        defaults, free = identity_defaults(config), free_schedule_keys(config.optim, found)
        state, *saved = checkpoint.read(found, identity, defaults=defaults, free=free, allow_changed_data=allowed)
        checkpoint.check_fits(found, state, start)
        checkpoint.load_parameters(model, saved[0])
        logger.info("continuing from %s", found)
        if (before := name_of_run(run_dir)) not in (None, config.name):
            logger.warning("%s is the run %r, now called %r", run_dir, before, config.name)
    state = behind_rollbacks(run_dir, state)
    model.use(config.kernels, config.optim.activation_checkpointing)
    own_optimizer = build_optimizer(model, config.optim)
    if saved is not None:
        checkpoint.check_moments(model, saved[1], is_averaged=config.optim.ema_decay > 0)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.deepspeed.enabled and config.optim.precision != "fp32":
        checkpoint.keep_given_values(model)
    wrapped, optimizer = accelerator.prepare(model, own_optimizer)
    find_layouts(optimizer)
    give_timeout(collective_timeout(config.watchdog))
    if saved is not None:
        checkpoint.restore_optimizer(
            wrapped, optimizer, accelerator, state=state, parameters=saved[0], moments=saved[1]
        )
    return Run(
        config=config,
        length=length,
        run_dir=run_dir,
        lock=run_lock,
        accelerator=accelerator,
        model=wrapped,
        optimizer=optimizer,
        gradients=GradientCheck(wrapped, accelerator),
        processor=processor,
        mixture=mixture,
        assignment=assignment,
        distillation=distillation,
        identity=identity,
        state=state,
        found=found,
        num_parameters=num_parameters,
        num_trained=num_trained,
    )


def with_saved_length(config: TrainConfig, found: Path) -> TrainConfig:
    """Return the configuration with steps and sequences per step of the checkpoint, if they were measured. They stay
    fixed, even with other data or another number of processes. Raises: CheckpointError."""
    if not needs_measured_length(config):
        return config
    saved = checkpoint.saved_config(found)
    global_batch_size, steps = config.data.global_batch_size, config.optim.steps
    if global_batch_size is None:
        global_batch_size = saved["data"]["global_batch_size"]
        group = dist.launched_world_size() * config.data.micro_batch_size
        if global_batch_size % group:
            raise ConfigError(
                f"{found}: a step of this run has {global_batch_size} sequences, computed at its start for "
                f"data.samples_per_step={config.data.samples_per_step}; they cannot be distributed evenly over "
                f"{group} (processes x data.micro_batch_size). Use a number of processes that divides them"
            )
    return with_length(
        config, global_batch_size=global_batch_size, steps=saved["optim"]["steps"] if steps is None else steps
    )


def measure_length(config: TrainConfig, mixture: Mixture, processor: PixelSailProcessor, **limits: int) -> Length:
    """Return the length of a run over its data. Raises: ConfigError and DataError.

    Every process measures the same length by itself: DeepSpeed needs the sequences per step before there is a process
    group to broadcast them.
    """
    # Texts are tokenized one at a time; with threads the tokenizer would warn when data workers fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if dist.rank() == 0:
        logger.info("measuring the length of the run on samples of the mixture")
    group = dist.launched_world_size() * config.data.micro_batch_size
    length = measured_length(config, mixture, processor, group=group, cost=sample_cost(config), **limits)
    if dist.rank() == 0:
        for line in length_lines(length):
            logger.log(logging.WARNING if length.is_far_off or length.misses_passes else logging.INFO, "%s", line)
    return length


def check_agreement(config: TrainConfig) -> None:
    """Raise ConfigError unless all processes measured the same length; every rank must call it."""
    found = dist.gather_objects((config.optim.num_steps, config.data.resolved_batch_size))
    if len(set(found)) > 1:
        raise ConfigError(
            f"the processes measured different lengths of this run, (steps, sequences per step) by rank: {found}, "
            "expected the same; their nodes have different data. Copy the same files to all nodes"
        )


def name_of_run(run_dir: Path) -> str | None:
    """Return the name of a run at its last start, None if its configuration cannot be read."""
    try:
        return str(json.loads((run_dir / "config.json").read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sample_cost(config: TrainConfig) -> Callable[[Example], float]:
    """Return the function that computes how much of `data.packing.seq_len` a sample uses."""
    return SampleCost(architecture=config.model.architecture) if config.data.packing.balance == "flops" else len


def step_data(run: Run, reading_L: Tensor | None = None) -> Iterator[StepData]:
    """Yield the data of the steps of a run; `reading_L` as in `data/loader.py`."""
    data = run.config.data
    return training_batches(
        run.mixture,
        run.processor,
        data.packing,
        run.assignment,
        start=run.state.streams,
        step=run.state.step,
        num_workers=data.num_workers,
        max_skipped_fraction=data.max_skipped_fraction,
        teachers=run.distillation.teachers.choices if run.distillation is not None else (),
        reading_L=reading_L,
        cost=sample_cost(run.config),
    )


def run_identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that must not change when a run resumes."""
    identity = {key: value for key, value in resolved.items() if key not in FREE_KEYS}
    identity["data"] = {key: value for key, value in resolved["data"].items() if key not in FREE_DATA_KEYS}
    identity["optim"] = {key: value for key, value in resolved["optim"].items() if key not in FREE_OPTIM_KEYS}
    # A cache may be moved. Cached features are rounded, so whether there is a cache belongs to the identity.
    teachers = {name: {**own, "cache": own["cache"] is not None} for name, own in identity.pop("distillation").items()}
    return identity | {"distillation": teachers} if teachers else identity


def free_schedule_keys(optim: OptimConfig, found: Path) -> tuple[str, ...]:
    """Return the schedule keys that may differ from a checkpoint's: with `schedule=wsd` those of its end, if the rates
    of all steps so far are the same in both."""
    saved = checkpoint.saved_config(found)["optim"]
    if optim.epochs is not None or saved.get("schedule") != "wsd":
        return ()
    then = replace(optim, **{key: saved[key] for key in ("schedule", *SCHEDULE_KEYS)})
    step = checkpoint.step_of(found.name)
    is_free = is_stable(step, then) and is_stable(step, optim)
    return tuple(f"optim.{key}" for key in SCHEDULE_KEYS) if is_free else ()


def identity_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return the defaults of keys that an older identity lacks, so that a run older than a key can resume.

    These are the defaults of the configuration and of the functions that this run's sources name; defaults that are not
    single values are omitted.
    """
    defaults = run_identity(asdict(TrainConfig()))
    sources = {}
    for name, node in config.data.sources.items():
        arguments = inspect.signature(get_object(node["_target_"])).parameters.values()
        values = {argument.name: argument.default for argument in arguments}
        sources[name] = {key: value for key, value in values.items() if value is None or type(value) in SINGLE_VALUES}
    return defaults | {"data": defaults["data"] | {"sources": sources}}


def data_identity(mixture: Mixture, files: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Return the identity of the data of a run: number of items and annotation files of each source."""
    sizes = {name: len(source) for name, source in zip(mixture.names, mixture.sources, strict=True)}
    return {"items": sizes, **{name: sorted(digests) for name, digests in sorted(files.items())}}


def build_distillation(config: TrainConfig) -> Distillation | None:
    """Return the teachers of the run with their losses, None if none are configured."""
    if not config.distillation:
        return None
    teachers = load_teachers(
        config.distillation,
        config.model.architecture,
        build,
        sources=sorted(config.data.sources),
        allow_random=config.allow_random_teachers,
        device=dist.local_device(),
    )
    terms = tuple(
        DistillTerm(name=name, weight=config.distillation[name].weight, loss=config.distillation[name].loss)
        for name in sorted(config.distillation)
    )
    return Distillation(teachers=teachers, terms=terms)


def stream_assignment(config: DataConfig) -> StreamAssignment:
    """Return this process's share of every optimizer step."""
    return StreamAssignment(
        global_batch_size=config.resolved_batch_size,
        rounds=config.stream_rounds,
        rank=dist.rank(),
        world_size=dist.launched_world_size(),
        micro_batch_size=config.micro_batch_size,
    )


def build_mixture(config: DataConfig, *, seed: int) -> Mixture:
    """Return the mixture of the configured sources."""
    if not config.sources:
        raise ConfigError("data.sources is empty; choose a data group, for example data=refshapes")
    excluded = evaluation_image_ids(config.decontamination.held_out) if config.decontamination.enabled else frozenset()
    sources = {
        name: without_images(build(node, f"data.sources.{name}"), excluded) for name, node in config.sources.items()
    }
    return Mixture(sources, config.repeats, seed=seed, weights=config.weights, epoch_samples=config.epoch_samples)

"""Everything a run has before its next step.

`prepare` builds what the configuration names and brings it to where the last checkpoint stands; `training/loop.py`
makes steps with the `Run` it returns, `training/dry_run.py` a single one. For example

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
"""Groups that may change between the sessions of one run without changing its numbers."""

FREE_DATA_KEYS = ("num_workers", "micro_batch_size", "planned_samples")
"""The same within `data`: how the work is shared out and planned, not what it is."""

FREE_OPTIM_KEYS = ("activation_checkpointing",)
"""The same within `optim`: a run that ran out of memory may go on with it."""

SCHEDULE_KEYS = ("steps", "warmup_fraction", "decay_fraction", "final_lr")
"""The same within `optim` while `schedule=wsd` is stable: what came before does not depend on them."""

SINGLE_VALUES = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the steps of a run are made with, on one rank."""

    config: TrainConfig
    """With the steps of the run and the sequences of a step, where it was asked for passes or samples."""
    length: Length | None
    """As it was measured; None where the configuration or a checkpoint states it."""
    run_dir: Path
    lock: RunLock | None
    accelerator: Accelerator
    model: Any
    """As the accelerator wrapped it."""
    optimizer: Any
    gradients: GradientCheck
    processor: PixelSailProcessor
    mixture: Mixture
    assignment: StreamAssignment
    distillation: Distillation | None
    identity: dict[str, Any]
    """What a continued run must not change."""
    state: TrainState
    """Where the run stands before its next step."""
    found: Path | None
    """The checkpoint it goes on from."""
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
    """Build a run. `lock`: keep its folder for this process, see training/run_lock.py.

    Raises: ConfigError, DataError and CheckpointError.
    """
    dist.ensure_launch_environment()
    run_dir = Path(config.run_dir)
    found = checkpoint.latest(run_dir / "checkpoints")
    if found is not None:
        config = with_saved_length(config, found)
    if config.data.global_batch_size is not None:
        # What cannot be shared out evenly is said before anything is loaded.
        stream_assignment(config.data)
    # Teachers and model before the accelerator: once it knows of ZeRO-3, whatever Hugging Face loads is sharded.
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
            raise ConfigError(
                f"run_dir {run_dir} holds {found.name}, but checkpoint.resume=never; choose another run_dir"
            )
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
    """Return the configuration with the numbers of a run that was asked for passes, or for samples of a step, as its
    checkpoint has them: they stay, on other processes and with other data too. Raises: CheckpointError."""
    if not needs_measured_length(config):
        return config
    saved = checkpoint.saved_config(found)
    global_batch_size, steps = config.data.global_batch_size, config.optim.steps
    if global_batch_size is None:
        global_batch_size = saved["data"]["global_batch_size"]
        group = dist.launched_world_size() * config.data.micro_batch_size
        if global_batch_size % group:
            raise ConfigError(
                f"{found}: a step of this run has {global_batch_size} sequences, found when it began for "
                f"data.samples_per_step={config.data.samples_per_step}; they cannot be shared out evenly over "
                f"{group} (processes x data.micro_batch_size). Go on with a number of processes that divides them"
            )
    return with_length(
        config, global_batch_size=global_batch_size, steps=saved["optim"]["steps"] if steps is None else steps
    )


def measure_length(config: TrainConfig, mixture: Mixture, processor: PixelSailProcessor, **limits: int) -> Length:
    """Return the length of a run over its data. Raises: ConfigError and DataError.

    Every process measures for itself, and all find the same: DeepSpeed wants to know the sequences of a step before
    there is a group in which one process could tell the others.
    """
    # Texts come one at a time. Threads would only make the tokenizer warn of the data workers' fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if dist.rank() == 0:
        logger.info("length of the run: looking at samples of the mixture")
    group = dist.launched_world_size() * config.data.micro_batch_size
    length = measured_length(config, mixture, processor, group=group, cost=sample_cost(config), **limits)
    if dist.rank() == 0:
        for line in length_lines(length):
            logger.log(logging.WARNING if length.is_far_off or length.misses_passes else logging.INFO, "%s", line)
    return length


def check_agreement(config: TrainConfig) -> None:
    """Raise ConfigError unless all processes came to the same length; every rank must call it."""
    found = dist.gather_objects((config.optim.num_steps, config.data.resolved_batch_size))
    if len(set(found)) > 1:
        raise ConfigError(
            f"the processes found other lengths for this run, (steps, sequences of a step) by rank: {found}; their "
            "nodes hold other data. Give all of them the same files"
        )


def name_of_run(run_dir: Path) -> str | None:
    """Return the name that the last start of a run had, None where its configuration cannot be read."""
    try:
        return str(json.loads((run_dir / "config.json").read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sample_cost(config: TrainConfig) -> Callable[[Example], float]:
    """Return what a sample takes of `data.packing.seq_len`."""
    return SampleCost(architecture=config.model.architecture) if config.data.packing.balance == "flops" else len


def step_data(run: Run, reading_L: Tensor | None = None) -> Iterator[StepData]:
    """Yield the data of one step of a run after another; `reading_L` as in `data/loader.py`."""
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
    """Return the part of a configuration that a continued run must not change."""
    identity = {key: value for key, value in resolved.items() if key not in FREE_KEYS}
    identity["data"] = {key: value for key, value in resolved["data"].items() if key not in FREE_DATA_KEYS}
    identity["optim"] = {key: value for key, value in resolved["optim"].items() if key not in FREE_OPTIM_KEYS}
    # A cache may move, but stored features are rounded: whether there is one belongs to the run.
    teachers = {name: {**own, "cache": own["cache"] is not None} for name, own in identity.pop("distillation").items()}
    return identity | {"distillation": teachers} if teachers else identity


def free_schedule_keys(optim: OptimConfig, found: Path) -> tuple[str, ...]:
    """Return the keys of the schedule that may differ from a checkpoint's: with `schedule=wsd` its end, while the steps
    so far are the same under both."""
    saved = checkpoint.saved_config(found)["optim"]
    if optim.epochs is not None or saved.get("schedule") != "wsd":
        return ()
    then = replace(optim, **{key: saved[key] for key in ("schedule", *SCHEDULE_KEYS)})
    step = checkpoint.step_of(found.name)
    is_free = is_stable(step, then) and is_stable(step, optim)
    return tuple(f"optim.{key}" for key in SCHEDULE_KEYS) if is_free else ()


def identity_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return what a key counts as that an identity lacks, so that a run goes on which is older than the key.

    These are the defaults of the configuration and, for the sources of this run, of the functions they name; a default
    that is no single value is left out.
    """
    defaults = run_identity(asdict(TrainConfig()))
    sources = {}
    for name, node in config.data.sources.items():
        arguments = inspect.signature(get_object(node["_target_"])).parameters.values()
        values = {argument.name: argument.default for argument in arguments}
        sources[name] = {key: value for key, value in values.items() if value is None or type(value) in SINGLE_VALUES}
    return defaults | {"data": defaults["data"] | {"sources": sources}}


def data_identity(mixture: Mixture, files: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Return what a continued run compares its data by: items of each source, and the annotation files it read."""
    sizes = {name: len(source) for name, source in zip(mixture.names, mixture.sources, strict=True)}
    return {"items": sizes, **{name: sorted(digests) for name, digests in sorted(files.items())}}


def build_distillation(config: TrainConfig) -> Distillation | None:
    """Return the teachers of the run with their losses, None where none are configured."""
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
    """Return this process's part of every optimizer step."""
    return StreamAssignment(
        global_batch_size=config.resolved_batch_size,
        rounds=config.stream_rounds,
        rank=dist.rank(),
        world_size=dist.launched_world_size(),
        micro_batch_size=config.micro_batch_size,
    )


def build_mixture(config: DataConfig, *, seed: int) -> Mixture:
    """Return the configured sources as one stream."""
    if not config.sources:
        raise ConfigError("data.sources is empty; choose a data group, for example data=refshapes")
    excluded = evaluation_image_ids(config.decontamination.held_out) if config.decontamination.enabled else frozenset()
    sources = {
        name: without_images(build(node, f"data.sources.{name}"), excluded) for name, node in config.sources.items()
    }
    return Mixture(sources, config.repeats, seed=seed, weights=config.weights, epoch_samples=config.epoch_samples)

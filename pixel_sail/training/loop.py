"""The run, top to bottom.

Place in the flow: `scripts/train.py` calls `train` with a checked config and a function that scores the model;
everything it does with them is on this page, the verbs are the other files of this folder.

    scripts/train.py experiment=quickstart  ->  runs/quickstart/{config.yaml, log.jsonl, checkpoints/, export/}
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pixel_sail import dist
from pixel_sail.config import ConfigError, DataConfig, TrainConfig, build
from pixel_sail.data.leakage import held_out_images, without_images
from pixel_sail.data.loader import LaneShare, being_read, reading_table, training_batches
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.noted_files import noted_files
from pixel_sail.experts.teachers import load_teachers
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.training import checkpoint
from pixel_sail.training.accelerator import build_accelerator
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import TrainState
from pixel_sail.training.checkpoint_writer import CheckpointWriter
from pixel_sail.training.corridor import Corridor, LeftCorridorError
from pixel_sail.training.finite import GradientCheck, NonFiniteLossError
from pixel_sail.training.interruption import InterruptedRun, StopSignals
from pixel_sail.training.log import LOG_FILE, RunLog
from pixel_sail.training.meter import Meter
from pixel_sail.training.optim import build_optimizer, set_learning_rate
from pixel_sail.training.rewind import behind_rewinds, rewind
from pixel_sail.training.run_lock import RunLock
from pixel_sail.training.schedule import learning_rate
from pixel_sail.training.step import Distillation, optimizer_step, source_columns
from pixel_sail.training.tally import record_skipped, source_scalars
from pixel_sail.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

Evaluate = Callable[[PixelSailForSegmentation, PixelSailProcessor, int, RunLog], None]
"""Scores the model after a step and logs the result; called on every rank."""

FREE_KEYS = (
    *("log", "checkpoint", "validation", "predict", "evals", "paths", "run_dir", "name", "deepspeed"),
    *("allow_random_experts", "watchdog", "corridor", "speed"),
)
"""Groups that may change between the sessions of one run without changing its numbers."""

FREE_DATA_KEYS = ("num_workers", "packs_per_micro_batch")
"""The same within `data`: how the work is shared out, not what it is."""

FREE_OPTIM_KEYS = ("activation_checkpointing",)
"""The same within `optim`: a run that ran out of memory may go on with it."""


def train(config: TrainConfig, evaluate: Evaluate | None = None) -> Path:
    """Run training, continuing from the last complete checkpoint if the run folder has one; return the exported folder.

    Raises: ConfigError, DataError and CheckpointError before the first step; NonFiniteLossError in mid-run;
    InterruptedRun and LeftCorridorError after a checkpoint, where a signal or a band of the corridor asked for it.
    """
    dist.ensure_launch_environment()
    share = lane_share(config.data)
    # Experts and model before the accelerator: once it knows of ZeRO-3, whatever Hugging Face loads is sharded.
    distillation = build_distillation(config)
    experts = distillation.terms if distillation is not None else ()
    model, processor = build_model(config.model, seed=config.seed, experts=config.experts)
    accelerator = build_accelerator(config, share.accumulation)
    run_dir, checkpoints = Path(config.run_dir), Path(config.run_dir) / "checkpoints"
    lock = RunLock(run_dir)
    with noted_files() as files:
        mixture = build_mixture(config.data, seed=config.seed)
    resolved = asdict(config)
    identity = run_identity(resolved) | {checkpoint.DATA_FILES: data_identity(mixture, files)}
    num_columns = len(source_columns(experts))
    state = TrainState.start(num_lanes=share.num_lanes, num_sources=len(mixture.names), num_columns=num_columns)
    saved = None
    found = checkpoint.latest(checkpoints)
    if found is not None:
        if config.checkpoint.resume == "never":
            raise ConfigError(
                f"run_dir {run_dir} holds {found.name}, but checkpoint.resume=never; choose another run_dir"
            )
        state, *saved = checkpoint.read(found, identity, allow_changed_data=config.checkpoint.allow_changed_data)
        checkpoint.load_parameters(model, saved[0])
        logger.info("continuing from %s", found)
    state = behind_rewinds(run_dir, state)
    model.decoder.gradient_checkpointing = config.optim.activation_checkpointing
    model.use(config.speed)
    meter = Meter(model.config, config.experts, peak_tflops=config.log.peak_tflops, device=accelerator.device)
    own_optimizer = build_optimizer(model, config.optim)
    if config.deepspeed.enabled and config.optim.precision != "fp32":
        checkpoint.keep_given_values(model)
    model, optimizer = accelerator.prepare(model, own_optimizer)
    if saved is not None:
        checkpoint.restore_optimizer(model, optimizer, accelerator, state=state, parameters=saved[0], moments=saved[1])
    gradients = GradientCheck(model, accelerator)
    corridor = Corridor(config.corridor, run_dir / LOG_FILE, start=state.step)
    if dist.rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(resolved, indent=1) + "\n")
    stop = StopSignals()
    reading_L = reading_table(share.num_lanes)
    data = training_batches(
        mixture,
        processor,
        config.data.packing,
        share,
        start=state.lanes,
        step=state.step,
        num_workers=config.data.num_workers,
        max_skipped_share=config.data.max_skipped_share,
        experts=distillation.teachers.choices if distillation is not None else (),
        reading_L=reading_L,
    )
    writer = CheckpointWriter(
        checkpoints,
        config=identity,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        device=accelerator.device,
    )
    watchdog = Watchdog(run_dir, config.watchdog, lambda: being_read(mixture, reading_L))

    def save() -> None:
        watchdog.begin_other("saving")
        writer.save(state, model, optimizer, accelerator)

    session = config.checkpoint.stop_after or config.optim.steps
    last = min(config.optim.steps, state.step + session)
    run_log = RunLog(run_dir, config.log, steps=config.optim.steps, start=state.step, resolved=resolved)
    with writer, run_log as log, watchdog:
        while state.step < last:
            meter.step_begins()
            watchdog.begin_step(state.step + 1)
            step_data = next(data)
            meter.data_is_here()
            watchdog.data_is_here([name for batch in step_data.batches for name in batch.sample_ids])
            stop.listen()
            rates = set_learning_rate(optimizer, learning_rate(state.step, config.optim))
            lanes = checkpoint.merge_lanes(
                state.lanes, step_data.after, config.data.packing.lookahead, accelerator.device
            )
            try:
                report = optimizer_step(
                    model,
                    optimizer,
                    step_data.batches,
                    config.loss,
                    accelerator,
                    gradients,
                    max_grad_norm=config.optim.max_grad_norm,
                    sources=mixture.names,
                    distillation=distillation,
                )
            except NonFiniteLossError as error:
                writer.wait()
                raise rewind(
                    run_dir,
                    error,
                    from_step=checkpoint.latest_step(checkpoints),
                    failed_step=state.step + 1,
                    lanes=lanes,
                    limit=config.checkpoint.rewinds,
                ) from error
            if config.optim.ema_decay:
                checkpoint.average_weights(optimizer, decay=config.optim.ema_decay, step=state.step)
            num_skipped = record_skipped(
                run_dir,
                step_data.skipped,
                before=state.num_skipped,
                mixture=mixture,
                position=sum(lane.next for lane in lanes),
                max_share=config.data.max_skipped_share,
                device=accelerator.device,
            )
            sums = torch.tensor(state.source_sums, dtype=torch.float64) + report.by_source
            is_logged = due(state.step + 1, config.log.every) or state.step + 1 == last
            state = TrainState(
                step=state.step + 1,
                lanes=lanes,
                num_skipped=num_skipped,
                source_sums=tuple(map(tuple, (torch.zeros_like(sums) if is_logged else sums).tolist())),
            )
            meter.step_done(step_data.batches, tokens=report.tokens, samples=report.samples)
            log.step_done()
            if is_logged:
                epoch = sum(lane.consumed for lane in lanes) / mixture.epoch_length
                numbers = {**rates, **report.scalars(), "epoch": round(epoch, 4), "skipped": num_skipped}
                numbers |= meter.read()
                log.scalars(state.step, {**numbers, **source_scalars(mixture.names, sums, experts)})
            writer.check()
            is_stopped = stop.anywhere(accelerator.device) and state.step < last
            is_saved = due(state.step, config.checkpoint.every) or state.step == last or is_stopped
            if is_saved:
                save()
            if is_stopped:
                writer.wait()
                raise InterruptedRun(f"interrupted after step {state.step}, which is saved; the same command goes on")
            if evaluate is not None and due(state.step, config.validation.every):
                watchdog.begin_other("validating")
                validate(model, optimizer, processor, evaluate, state.step, log, accelerator)
            finding = corridor.judge(state.step, log)
            if finding is not None:
                if not is_saved:
                    save()
                writer.wait()
                raise LeftCorridorError(f"{finding}; step {state.step} is saved")
        corridor.finish(state.step)
    stop.restore()
    checkpoint.export(run_dir / "export", model, optimizer, accelerator, processor)
    lock.release()
    return run_dir / "export"


def due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def run_identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that a continued run must not change."""
    identity = {key: value for key, value in resolved.items() if key not in FREE_KEYS}
    identity["data"] = {key: value for key, value in resolved["data"].items() if key not in FREE_DATA_KEYS}
    identity["optim"] = {key: value for key, value in resolved["optim"].items() if key not in FREE_OPTIM_KEYS}
    # A cache may move, but stored features are rounded: whether there is one belongs to the run.
    experts = {name: {**own, "cache": own["cache"] is not None} for name, own in identity.pop("experts").items()}
    return identity | {"experts": experts} if experts else identity


def data_identity(mixture: Mixture, files: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Return what a continued run compares its data by: items of each source, and the annotation files it read."""
    sizes = {name: len(source) for name, source in zip(mixture.names, mixture.sources, strict=True)}
    return {"items": sizes, **{name: sorted(digests) for name, digests in sorted(files.items())}}


def build_distillation(config: TrainConfig) -> Distillation | None:
    """Return the experts of the run with their losses, None where none are configured."""
    if not config.experts:
        return None
    teachers = load_teachers(
        config.experts,
        config.model.architecture,
        build,
        sources=sorted(config.data.sources),
        allow_random=config.allow_random_experts,
        device=dist.local_device(),
    )
    terms = tuple(
        DistillTerm(name=name, weight=config.experts[name].weight, loss=config.experts[name].loss)
        for name in sorted(config.experts)
    )
    return Distillation(teachers=teachers, terms=terms)


def lane_share(config: DataConfig) -> LaneShare:
    """Return this process's part of every optimizer step."""
    return LaneShare(
        packs_per_step=config.packs_per_step,
        rounds=config.lane_rounds,
        rank=dist.rank(),
        world_size=dist.launched_world_size(),
        packs_per_micro_batch=config.packs_per_micro_batch,
    )


def build_mixture(config: DataConfig, *, seed: int) -> Mixture:
    """Return the configured sources as one stream."""
    if not config.sources:
        raise ConfigError("data.sources is empty; choose a data group, for example data=refshapes")
    excluded = held_out_images(config.leakage.held_out) if config.leakage.enabled else frozenset()
    sources = {
        name: without_images(build(node, f"data.sources.{name}"), excluded) for name, node in config.sources.items()
    }
    return Mixture(sources, config.repeats, seed=seed, weights=config.weights, epoch_samples=config.epoch_samples)


def validate(
    model: Any,
    optimizer: Any,
    processor: PixelSailProcessor,
    evaluate: Evaluate,
    step: int,
    log: RunLog,
    accelerator: Any,
) -> None:
    """Score the model as it is and go back to training."""
    plain = checkpoint.plain_copy(model, optimizer, accelerator).eval()
    with torch.no_grad():
        evaluate(plain, processor, step, log)
    plain.train()

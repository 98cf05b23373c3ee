"""The first step of a run for trial: everything is built as the run would build it, and nothing is written.

Place in the flow: `scripts/train.py --dry-run` prints what `dry_run` returns, on rank 0 of as many processes as were
launched:

    step 1: total 3.43, text 0.61, bce 0.54, dice 0.87, grad_norm 18.5
            16 samples, 878 tokens (1.8 % padding), 40 masks
"""

import resource
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pixel_sail import dist
from pixel_sail.config import TrainConfig
from pixel_sail.data.loader import StepData, training_batches
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.noted_files import noted_files
from pixel_sail.planning.disk import checkpoint_bytes
from pixel_sail.training import checkpoint
from pixel_sail.training.accelerator import build_accelerator
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import TrainState
from pixel_sail.training.finite import GradientCheck
from pixel_sail.training.loop import build_distillation, build_mixture, data_identity, lane_share, run_identity
from pixel_sail.training.optim import build_optimizer, set_learning_rate
from pixel_sail.training.rewind import behind_rewinds
from pixel_sail.training.schedule import learning_rate
from pixel_sail.training.step import StepReport, optimizer_step, source_columns


def dry_run(config: TrainConfig) -> list[str]:
    """Make the next step of a run and forget it; return what is to be said about it, on every rank.

    Raises: what `training.loop.train` raises before and in its first step.
    """
    dist.ensure_launch_environment()
    share = lane_share(config.data)
    distillation = build_distillation(config)
    experts = distillation.terms if distillation is not None else ()
    model, processor = build_model(config.model, seed=config.seed, experts=config.experts)
    accelerator = build_accelerator(config, share.accumulation)
    with noted_files() as files:
        mixture = build_mixture(config.data, seed=config.seed)
    identity = run_identity(asdict(config)) | {checkpoint.DATA_FILES: data_identity(mixture, files)}
    num_columns = len(source_columns(experts))
    state = TrainState.start(num_lanes=share.num_lanes, num_sources=len(mixture.names), num_columns=num_columns)
    saved = None
    found = checkpoint.latest(Path(config.run_dir) / "checkpoints")
    if found is not None:
        state, *saved = checkpoint.read(found, identity, allow_changed_data=config.checkpoint.allow_changed_data)
        checkpoint.load_parameters(model, saved[0])
    state = behind_rewinds(Path(config.run_dir), state)
    model.decoder.gradient_checkpointing = config.optim.activation_checkpointing
    model.use(config.speed)
    own_optimizer = build_optimizer(model, config.optim)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model, optimizer = accelerator.prepare(model, own_optimizer)
    if saved is not None:
        checkpoint.restore_optimizer(model, optimizer, accelerator, state=state, parameters=saved[0], moments=saved[1])
    gradients = GradientCheck(model, accelerator)
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
    )
    started = time.monotonic()
    step_data = next(data)
    has_data = time.monotonic()
    set_learning_rate(optimizer, learning_rate(state.step, config.optim))
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
    done = time.monotonic()
    return [
        f"dry run of {config.name!r} on {dist.world_size()} process(es), {accelerator.device}: nothing was written to "
        f"{config.run_dir}",
        *_start_lines(config, found, num_parameters, num_trained),
        *_data_lines(mixture, step_data),
        *_step_lines(report, state.step + 1),
        f"time of this first step, later ones are faster: {has_data - started:.1f} s waiting for data, "
        f"{done - has_data:.1f} s computing",
        *_memory_lines(accelerator.device),
        *_output_lines(config, num_parameters, num_trained),
    ]


def _start_lines(config: TrainConfig, found: Path | None, num_parameters: int, num_trained: int) -> list[str]:
    sharding = f"ZeRO-{config.deepspeed.stage}" if config.deepspeed.enabled else "without DeepSpeed"
    origin = config.model.init_from or "random weights"
    return [
        f"the run would continue from {found}" if found is not None else f"the run would start from {origin}",
        f"model: {num_parameters:,} parameters, {num_trained:,} trained, {config.optim.precision}, {sharding}",
    ]


def _data_lines(mixture: Mixture, step_data: StepData) -> list[str]:
    sizes = ", ".join(f"{name} {len(source)}" for name, source in zip(mixture.names, mixture.sources, strict=True))
    skipped = [f"  left out: {skip.source}, position {skip.position}: {skip.reason}" for skip in step_data.skipped]
    return [f"data: items of each source: {sizes}; {mixture.epoch_length} samples in an epoch", *skipped]


def _step_lines(report: StepReport, step: int) -> list[str]:
    numbers = report.scalars()
    sizes = ("tokens", "padding_frac", "supervised_tokens", "masks", "samples")
    losses = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name not in sizes)
    return [
        f"step {step}: {losses}",
        f"  {report.samples} samples, {report.tokens} tokens ({report.padding_frac:.1%} padding), "
        f"{report.supervised_tokens} of them supervised, {report.masks} masks",
    ]


def _memory_lines(device: torch.device) -> list[str]:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    host_gb, gpu_gb = (
        max(values) for values in zip(*dist.gather_objects((peak_kib / 2**20, gpu / 2**30)), strict=True)
    )
    lines = [f"memory: at most {host_gb:.2f} GiB in a process, its data workers not counted"]
    return lines + ([f"  at most {gpu_gb:.2f} GiB on a GPU"] if device.type == "cuda" else [])


def _output_lines(config: TrainConfig, num_parameters: int, num_trained: int) -> list[str]:
    size = checkpoint_bytes(num_parameters, trained=num_trained, is_averaged=config.optim.ema_decay > 0) / 1e6
    every = config.checkpoint.every
    lines = [
        f"the run would write to {Path(config.run_dir).resolve()}:",
        f"  log.jsonl, a line every {config.log.every} steps; config.json",
        f"  checkpoints/, {size:,.1f} MB each, every {every} steps and after step {config.optim.steps}; "
        f"{config.checkpoint.keep} stay",
        f"  export/, {4 * num_parameters / 1e6:,.1f} MB, after step {config.optim.steps}",
    ]
    if config.log.tensorboard:
        lines.append("  tensorboard/")
    if config.log.wandb != "disabled":
        lines.append(f"  wandb/ ({config.log.wandb})")
    if config.validation.every and config.evals:
        lines.append(f"  validation of {', '.join(config.evals)} every {config.validation.every} steps")
    return lines

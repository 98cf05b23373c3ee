"""Dry run: builds everything as the run would, makes one step and writes nothing.

`scripts/train.py --dry-run` prints the result of `dry_run` on rank 0:

    an epoch: 2,910 samples; 1.00 of them in a sequence (standard error 0.0 %, from 1,024 samples)
    a step: 16 sequences, 16.0 samples expected
    the run: 1,650 steps, 9.072 passes
    step 1: total 3.43, text 0.61, bce 0.54, dice 0.87, grad_norm 18.5
            16 samples, 878 tokens (1.8 % padding), 40 masks
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pixel_sail import dist
from pixel_sail.config import TrainConfig
from pixel_sail.data.loader import StepData
from pixel_sail.data.mixture import Mixture
from pixel_sail.planning.disk import checkpoint_bytes
from pixel_sail.planning.length import length_lines
from pixel_sail.training.log import check_boards
from pixel_sail.training.metrics import peak_memory_bytes
from pixel_sail.training.optim import set_learning_rate
from pixel_sail.training.prepare import measure_length, prepare, step_data
from pixel_sail.training.schedule import learning_rate
from pixel_sail.training.step import LOGGED, SOURCE_COLUMNS, StepReport, optimizer_step

SHOWN_POSITIONS = 1024
"""Positions of the mixture that are read if the length of the run need not be measured."""


def dry_run(config: TrainConfig) -> list[str]:
    """Make the next step of a run, discard it and return the report, on every rank.

    Raises: the errors of `training.loop.train` in its first step, and those of samples it would read soon after.
    """
    check_boards(config.log)
    run = prepare(config, lock=False)
    config = run.config
    length = run.length or measure_length(config, run.mixture, run.processor, max_positions=SHOWN_POSITIONS)
    data = step_data(run)
    started = time.monotonic()
    now = next(data)
    has_data = time.monotonic()
    set_learning_rate(run.optimizer, learning_rate(run.state.step, config.optim))
    report = optimizer_step(
        run.model,
        run.optimizer,
        now.batches,
        config.loss,
        run.accelerator,
        run.gradients,
        max_grad_norm=config.optim.max_grad_norm,
        sources=run.mixture.names,
        distillation=run.distillation,
    )
    done = time.monotonic()
    device = run.accelerator.device
    return [
        f"dry run of {config.name!r} on {dist.world_size()} process(es), {device}: nothing was written to "
        f"{config.run_dir}",
        *_start_lines(config, run.found, run.num_parameters, run.num_trained),
        *_data_lines(run.mixture, now),
        *length_lines(length),
        *_step_lines(report, run.state.step + 1, run.mixture.names),
        f"time of this first step, later ones are faster: {has_data - started:.1f} s waiting for data, "
        f"{done - has_data:.1f} s computing",
        *_memory_lines(device),
        *_output_lines(config, run.num_parameters, run.num_trained),
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
    everywhere = [skip for own in dist.gather_objects(step_data.skipped) for skip in own]
    skipped = [f"  skipped: {skip.source}, position {skip.position}: {skip.reason}" for skip in everywhere]
    return [f"data: items of each source: {sizes}; {mixture.epoch_length} samples in an epoch", *skipped]


def _step_lines(report: StepReport, step: int, sources: Sequence[str]) -> list[str]:
    sizes = {f"data/{name}" for name in LOGGED["data"]}
    numbers = {key.partition("/")[2]: value for key, value in report.scalars().items() if key not in sizes}
    losses = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    of_sources = report.by_source[:, SOURCE_COLUMNS.index("samples")].tolist()
    counts = ", ".join(f"{name} {int(number)}" for name, number in zip(sources, of_sources, strict=True))
    return [
        f"step {step}: {losses}",
        f"  {report.samples} samples, {report.tokens} tokens ({report.padding_fraction:.1%} padding), "
        f"{report.supervised_tokens} of them supervised, {report.masks} masks",
        f"  samples of each source: {counts}",
    ]


def _memory_lines(device: torch.device) -> list[str]:
    host = peak_memory_bytes(torch.device("cpu"))
    gpu = peak_memory_bytes(device) if device.type == "cuda" else 0
    host_gb, gpu_gb = (max(values) / 2**30 for values in zip(*dist.gather_objects((host, gpu)), strict=True))
    lines = [f"memory: at most {host_gb:.2f} GiB in a process, its data workers not counted"]
    return lines + ([f"  at most {gpu_gb:.2f} GiB on a GPU"] if device.type == "cuda" else [])


def _output_lines(config: TrainConfig, num_parameters: int, num_trained: int) -> list[str]:
    size = checkpoint_bytes(num_parameters, trained=num_trained, is_averaged=config.optim.ema_decay > 0) / 1e6
    every = config.checkpoint.every
    lines = [
        f"the run would write to {Path(config.run_dir).resolve()}:",
        f"  log.jsonl, a line every {config.log.every} steps; config.json",
        f"  checkpoints/, {size:,.1f} MB each, every {every} steps and after step {config.optim.num_steps}; "
        f"the last {config.checkpoint.keep} are kept",
        f"  export/, {4 * num_parameters / 1e6:,.1f} MB, after step {config.optim.num_steps}",
    ]
    if config.log.tensorboard:
        lines.append("  tensorboard/")
    if config.log.wandb != "disabled":
        lines.append(f"  wandb/ ({config.log.wandb})")
    if config.validation.every and config.evals:
        lines.append(f"  validation of {', '.join(config.evals)} every {config.validation.every} steps")
    return lines

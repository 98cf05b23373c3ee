"""The training loop.

`scripts/train.py` calls `train` with a validated config and a function that evaluates the model.

    scripts/train.py experiment=quickstart  ->  runs/quickstart/{config.json, log.jsonl, checkpoints/, export/}
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from pixel_sail import dist
from pixel_sail.config import TrainConfig
from pixel_sail.data.loader import StepData, being_read, reading_table
from pixel_sail.data.packing import StreamState
from pixel_sail.files import append_line, replace_text
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.provenance import STARTS, machine, packages
from pixel_sail.training import checkpoint
from pixel_sail.training.checkpoint import TrainState
from pixel_sail.training.checkpoint_writer import CheckpointWriter
from pixel_sail.training.finite import NonFiniteLossError
from pixel_sail.training.log import LOG_FILE, RunLog, check_boards
from pixel_sail.training.metric_bounds import MetricBounds, MetricOutOfBoundsError
from pixel_sail.training.metrics import PerfMetrics, record_skipped, source_scalars
from pixel_sail.training.optim import set_learning_rate
from pixel_sail.training.preemption import PreemptionSignals, RequeueRun
from pixel_sail.training.prepare import Run, prepare, step_data
from pixel_sail.training.rollback import rollback
from pixel_sail.training.schedule import learning_rate
from pixel_sail.training.step import StepReport, optimizer_step
from pixel_sail.training.watchdog import Watchdog

Evaluate = Callable[[PixelSailForSegmentation, PixelSailProcessor, int, RunLog], None]
"""Scores the model after a step and logs the result; called on every rank."""


def train(config: TrainConfig, evaluate: Evaluate | None = None) -> Path:
    """Train a model, resuming from the last complete checkpoint if the run folder has one; return the exported folder.

    Raises: ConfigError, DataError and CheckpointError before the first step; NonFiniteLossError during the run;
    RequeueRun and MetricOutOfBoundsError after a checkpoint, for a signal or a violated bound.
    """
    check_boards(config.log)
    run = prepare(config, lock=True)
    config = run.config
    write_config(run)
    device = run.accelerator.device
    preemption = PreemptionSignals()
    reading_L = reading_table(run.assignment.num_streams)
    data = step_data(run, reading_L)
    architecture = run.accelerator.unwrap_model(run.model).config
    perf = PerfMetrics(architecture, config.distillation, peak_tflops=config.log.peak_tflops, device=device)
    metric_bounds = MetricBounds(config.metric_bounds, run.run_dir / LOG_FILE, start=run.state.step)
    writer = CheckpointWriter(
        run.checkpoints,
        config=run.identity,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        device=device,
    )
    watchdog = Watchdog(run.run_dir, config.watchdog, lambda: being_read(run.mixture, reading_L))
    state, steps = run.state, config.optim.num_steps
    last = min(steps, state.step + (config.checkpoint.stop_after or steps))
    run_log = RunLog(run.run_dir, config.log, steps=steps, start=state.step, resolved=asdict(config))
    with writer, run_log as log, watchdog:
        while state.step < last:
            perf.step_started()
            watchdog.begin_step(state.step + 1)
            now = next(data)
            perf.data_loaded()
            watchdog.data_loaded([name for batch in now.batches for name in batch.sample_ids])
            preemption.listen()
            rates = set_learning_rate(run.optimizer, learning_rate(state.step, config.optim))
            streams = checkpoint.gather_data_state(state.streams, now.after, config.data.packing.packing_buffer, device)
            report = update(run, state.step, now, streams, writer)
            state = next_state(run, state, now, streams, report)
            perf.step_done(now.batches, tokens=report.tokens, samples=report.samples)
            log.step_done()
            if due(state.step, config.log.every) or state.step == last:
                log.scalars(state.step, {**rates, **log_line(run, state, report, perf)})
                state = replace(state, source_sums=tuple((0.0,) * len(row) for row in state.source_sums))
            writer.check()
            is_preempted = preemption.on_any_rank(device) and state.step < last
            is_saved = due(state.step, config.checkpoint.every) or state.step == last or is_preempted
            if is_saved:
                watchdog.begin_other("saving")
                writer.save(state, run.model, run.optimizer, run.accelerator)
            if is_preempted:
                writer.wait()
                raise RequeueRun(f"preempted after step {state.step}, which is saved; run the same command to resume")
            if evaluate is not None and due(state.step, config.validation.every):
                watchdog.begin_other("validating")
                validate(run, evaluate, state.step, log)
            finding = metric_bounds.check(state.step, log)
            if finding is not None:
                if not is_saved:
                    writer.save(state, run.model, run.optimizer, run.accelerator)
                writer.wait()
                raise MetricOutOfBoundsError(f"{finding}; step {state.step} is saved")
        metric_bounds.finish(state.step)
    preemption.restore()
    checkpoint.export(run.run_dir / "export", run.model, run.optimizer, run.accelerator, run.processor)
    if run.lock is not None:
        run.lock.release()
    return run.run_dir / "export"


def write_config(run: Run) -> None:
    """Write the resolved configuration into the run folder, and record code, machine and packages of this start."""
    if dist.rank() == 0:
        replace_text(run.run_dir / "config.json", json.dumps(asdict(run.config), indent=1) + "\n")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"time": now, "step": run.state.step, "command": sys.argv, **machine(), "packages": packages()}
        append_line(run.run_dir / STARTS, json.dumps(start))


def update(run: Run, done: int, now: StepData, streams: Sequence[StreamState], writer: CheckpointWriter) -> StepReport:
    """Run the optimizer step after `done` steps; `streams` are the data positions after it.

    Raises: NonFiniteLossError, or RequeueRun if the run may roll back and skip this data.
    """
    config = run.config
    try:
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
    except NonFiniteLossError as error:
        writer.wait()
        reported = error
        if dist.rank() == 0:
            reported = NonFiniteLossError(f"{error}; {checkpoint.condition(checkpoint.latest(run.checkpoints))}")
        raise rollback(
            run.run_dir,
            reported,
            from_step=checkpoint.latest_step(run.checkpoints),
            failed_step=done + 1,
            streams=streams,
            limit=config.checkpoint.max_rollbacks,
        ) from error
    if config.optim.ema_decay:
        checkpoint.average_weights(run.optimizer, decay=config.optim.ema_decay, step=done)
    return report


def next_state(
    run: Run, state: TrainState, now: StepData, streams: tuple[StreamState, ...], report: StepReport
) -> TrainState:
    """Return the state after a step; skipped samples are counted and recorded."""
    num_skipped = record_skipped(
        run.run_dir,
        now.skipped,
        before=state.num_skipped,
        mixture=run.mixture,
        position=sum(stream.next for stream in streams),
        max_fraction=run.config.data.max_skipped_fraction,
        device=run.accelerator.device,
    )
    sums = torch.tensor(state.source_sums, dtype=torch.float64) + report.by_source
    return TrainState(
        step=state.step + 1, streams=streams, num_skipped=num_skipped, source_sums=tuple(map(tuple, sums.tolist()))
    )


def log_line(run: Run, state: TrainState, report: StepReport, perf: PerfMetrics) -> dict[str, float]:
    """Return the numbers of a logged step; every rank must call it."""
    epoch = sum(stream.consumed for stream in state.streams) / run.mixture.epoch_length
    numbers = {**report.scalars(), "data/epoch": round(epoch, 4), "data/skipped": state.num_skipped, **perf.read()}
    sums = torch.tensor(state.source_sums, dtype=torch.float64)
    return numbers | source_scalars(run.mixture.names, sums, run.distill_terms)


def due(step: int, every: int) -> bool:
    """Return whether an action with period `every` (0: never) is due after this step."""
    return every > 0 and step % every == 0


def validate(run: Run, evaluate: Evaluate, step: int, log: RunLog) -> None:
    """Evaluate the current model, then switch it back to training mode."""
    plain = checkpoint.plain_copy(run.model, run.optimizer, run.accelerator).eval()
    with torch.no_grad():
        evaluate(plain, run.processor, step, log)
    plain.train()

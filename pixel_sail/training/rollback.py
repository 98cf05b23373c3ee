"""Rollback: resumes from the last checkpoint and skips the data of a step that failed.

If a loss or gradient is not finite and `checkpoint.max_rollbacks` permits, `training/loop.py` records the data position
after the failed step and exits with the status that requests a restart. The next session loads the checkpoint and
continues at that data position:

    step 57 fails, the last checkpoint is step 50  ->  rollbacks.jsonl: {"from_step": 50, "failed_step": 57, ...}
    next session: weights, moments and step 50, data after that of step 57

A session depends only on the checkpoint and these records, so a run that is interrupted after a rollback resumes with
the same results.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pixel_sail import dist
from pixel_sail.config import ConfigError
from pixel_sail.data.packing import StreamState
from pixel_sail.files import append_line, check_fields, read_json_lines
from pixel_sail.renamed import current_state
from pixel_sail.training.checkpoint import CheckpointError, TrainState, read_stream_states
from pixel_sail.training.finite import NonFiniteLossError
from pixel_sail.training.preemption import RequeueRun

logger = logging.getLogger(__name__)

ROLLBACKS_FILE = "rollbacks.jsonl"
_EARLIER_FILE = "rewinds.jsonl"
"""Its name in earlier versions. A run that they began keeps both files."""

_REMEDY = "delete that line; the run then resumes without this rollback"


def rollback(
    run_dir: Path,
    error: NonFiniteLossError,
    *,
    from_step: int,
    failed_step: int,
    streams: Sequence[StreamState],
    limit: int,
) -> RequeueRun:
    """Record a rollback to `from_step` with the data after `streams`; return the exception that ends this session.

    Every rank must call it. Raises: the error itself, after `limit` rollbacks.
    """
    earlier = len(_notes(run_dir))
    dist.barrier()
    if earlier >= limit:
        if limit:
            raise NonFiniteLossError(
                f"{error}; the run had its {limit} rollbacks (checkpoint.max_rollbacks)"
            ) from error
        raise error
    if dist.rank() == 0:
        note = {
            "from_step": from_step,
            "failed_step": failed_step,
            "streams": [asdict(stream) for stream in streams],
            "reason": str(error),
        }
        append_line(run_dir / ROLLBACKS_FILE, json.dumps(note))
    return RequeueRun(
        f"step {failed_step} failed: {error}. Rollback {earlier + 1} of {limit}: the same command resumes from step "
        f"{from_step} with the data after that of step {failed_step}"
    )


def behind_rollbacks(run_dir: Path, state: TrainState) -> TrainState:
    """Return the state of a checkpoint, or the initial state, with the data position of the last rollback to it.

    Raises: ConfigError if a run without a checkpoint was started with another number of sequences per step.
    """
    notes = [note for note in _notes(run_dir) if note["from_step"] == state.step]
    if not notes:
        return state
    note, file = notes[-1], run_dir / ROLLBACKS_FILE
    if dist.rank() == 0:
        failed = note["failed_step"]
        logger.warning("rollback to step %d: resuming with the data after that of step %d", state.step, failed)
    streams = read_stream_states(note["streams"], str(file), fail=CheckpointError, remedy=_REMEDY)
    if state.streams and len(streams) != len(state.streams):
        raise ConfigError(
            f"{file} is of a run with {len(streams)} streams of data, this start would have {len(state.streams)}; "
            "start it on as many processes as before, or choose another run_dir"
        )
    return replace(state, streams=streams)


def _notes(run_dir: Path) -> list[dict[str, Any]]:
    kinds = {"from_step": int, "failed_step": int}
    notes = []
    for file in (run_dir / _EARLIER_FILE, run_dir / ROLLBACKS_FILE):
        lines = read_json_lines(file, kinds, fail=CheckpointError, remedy=_REMEDY)
        for number, line in enumerate(lines, start=1):
            where, own = f"{file}, line {number}", current_state(line)
            notes.append(check_fields(own, where, {"streams": list}, fail=CheckpointError, remedy=_REMEDY))
    return notes

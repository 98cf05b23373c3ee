"""Asynchronous, atomic writing of checkpoints.

`training/loop.py` opens one `CheckpointWriter` and calls `save` after a step. The state is copied to host memory
immediately; a thread of rank 0 writes the files while the next steps run. Folders in order of appearance:

    .writing_step_00000500/   files, hashes, COMPLETE, all flushed to disk
    step_00000500/            the same folder, renamed
    .deleting_step_00000300/  more than `keep` are complete: the oldest is renamed, then deleted

A process that dies leaves at most one of the two hidden folders, which are never read; the next start removes them.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.files import WRITING, flush, remove, sha256, writing
from pixel_sail.training.checkpoint import (
    MANIFEST,
    MARKER,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    TrainState,
    checkpoint_name,
    collect,
    complete_checkpoints,
    is_complete,
    latest,
    not_finite,
    step_of,
)

logger = logging.getLogger(__name__)

DELETING = ".deleting_"

PENDING, WRITTEN, FAILED = 0, 1, 2


class CheckpointWriter:
    """Saves the state of a run. The bytes on disk do not depend on `asynchronous`.

    An asynchronous save needs host memory on rank 0 for one copy of the state, 12 bytes per parameter; the next save
    waits for the previous one. An error of the thread is raised on every rank by the next `check`, `save` or `wait`.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], keep: int, asynchronous: bool, device: torch.device
    ) -> None:
        """Remove unfinished folders of a process that died while writing."""
        self.folder, self.config, self.keep = folder, config, keep
        self.asynchronous, self.device = asynchronous, device
        self._is_pending = False
        self._writing: Future[Path] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        if dist.rank() == 0:
            remove_unfinished(folder)

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the thread. If the run ends with an error, other ranks may be gone, so there is no communication."""
        if error is None:
            self.wait()
        elif self._writing is not None and (second := self._writing.exception()) is not None:
            logger.error("the last checkpoint was not written either: %s", second)

    def save(self, state: TrainState, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> None:
        """Copy the state and start writing it. Every rank must call it. Raises: CheckpointError, on every rank."""
        self.wait()
        parameters, moments = collect(model, optimizer, accelerator)
        if dist.rank() == 0:
            self._writing = self._thread.submit(
                write_checkpoint, self.folder, state, parameters, moments, config=self.config, keep=self.keep
            )
        self._is_pending = True
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on disk. Every rank must call it. Raises: CheckpointError, on every rank."""
        if self._writing is not None:
            self._writing.exception()
        self.check()

    def check(self) -> None:
        """Raise CheckpointError on every rank if writing failed. Every rank must call it, after each step."""
        # All ranks know when a save begins, only rank 0 when it ends, so they communicate only while one is pending.
        if not self._is_pending:
            return
        report = PENDING
        if self._writing is not None and self._writing.done():
            report = FAILED if self._writing.exception() else WRITTEN
        report = int(dist.sum_over_ranks(torch.tensor(report, device=self.device)))
        if report == PENDING:
            return
        self._is_pending = False
        if self._writing is not None:
            done, self._writing = self._writing, None
            done.result()
        if report == FAILED:
            raise CheckpointError(f"{self.folder}: rank 0 could not write a checkpoint; see its message")


def write_checkpoint(
    folder: Path,
    state: TrainState,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step` under `folder`, then delete all but the newest `keep` complete ones.

    Raises: CheckpointError if the disk fails or a value is not finite; partial files are removed.
    """
    final = folder / checkpoint_name(state.step)
    if not is_complete(final):
        _write(final, state, parameters, moments, config)
    try:
        for old in superseded(folder, final, keep):
            _delete(old)
    except OSError as error:
        raise CheckpointError(f"{final} is complete, but an older one could not be deleted: {error}") from error
    return final


def _write(
    final: Path,
    state: TrainState,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write one checkpoint. Raises: CheckpointError as `write_checkpoint`."""
    folder = final.parent
    if broken := not_finite({**parameters, **moments}):
        found = latest(folder)
        raise CheckpointError(
            f"{final}: not written: {len(broken)} tensors are not finite, among them {broken[:5]}; "
            + (f"{found.name} is the last that is. " if found else "there is no checkpoint yet. ")
            + "If the same command fails here again, begin a new run with a lower optim.lr, or delete that one to "
            "continue from the one before"
        )
    working = folder / f"{WRITING}{final.name}"
    try:
        _delete(final)
        remove(working)
        working.mkdir(parents=True)
        save_file(dict(parameters), working / MODEL)
        save_file(dict(moments), working / OPTIMIZER)
        (working / STATE).write_text(json.dumps({"train_state": asdict(state), "config": config}, indent=1))
        hashes = {name: sha256(working / name) for name in (MODEL, OPTIMIZER, STATE)}
        (working / MANIFEST).write_text(json.dumps(hashes, indent=1))
        (working / MARKER).touch()
        for path in (*sorted(working.iterdir()), working):
            flush(path)
        os.replace(working, final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(working, ignore_errors=True)
        found = latest(folder)
        raise CheckpointError(
            f"{final}: not written: {error}; "
            + (f"{found.name} is complete" if found else "no checkpoint is complete yet")
            + ". Free disk space or repair the disk, then start the same command again"
        ) from error


def superseded(folder: Path, newest: Path, keep: int) -> list[Path]:
    """Return the complete checkpoints to delete: all up to and including `newest` but the last `keep`."""
    return [path for path in complete_checkpoints(folder) if step_of(path.name) <= step_of(newest.name)][:-keep]


def remove_unfinished(folder: Path) -> None:
    """Delete folders that a process was writing or deleting when it died."""
    for prefix in (WRITING, DELETING):
        for path in folder.glob(f"{prefix}step_*"):
            if step_of(path.name.removeprefix(prefix)) >= 0:
                logger.info("removing %s, left by a run that died while writing or deleting it", path)
                with writing(path):
                    shutil.rmtree(path)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so a partly deleted one is never mistaken for a complete one."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
        remove(doomed)
        os.replace(checkpoint, doomed)
        remove(doomed)

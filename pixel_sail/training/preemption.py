"""Preemption: a signal of the scheduler leads to a checkpoint and an exit status that requests a restart.

`training/loop.py` checks after every step whether any rank received a signal; `scripts/train.py` exits with
`REQUEUE_STATUS`. Slurm sends SIGUSR1 before the time limit, to every process of a job step:

    09:58:00 SIGUSR1 to rank 3 -> step 4,711 ends -> all ranks save -> "preempted after step 4711" -> status 85

SIGUSR2, which submitit lets Slurm send to every process of a job, has the same effect; data workers only write their
stacks. SIGTERM has the same effect if only the training processes receive it. PyTorch's data workers exit on SIGTERM,
which ends the run; it then resumes from the last complete checkpoint.
"""

import signal
from types import FrameType

import torch
from torch import distributed

from pixel_sail.errors import ExpectedError

REQUEUE_STATUS = 85
"""Exit status of a saved run that requests a restart; used by `scripts/slurm/train.sbatch`."""

STALLED_STATUS = 86
"""Exit status after a process stalled or was lost; a restart resumes from the last checkpoint."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class RequeueRun(ExpectedError, RuntimeError):
    """The run exits to be restarted: after a signal, with its last step saved, or for a rollback that skips the data of
    a failed step."""

    status = REQUEUE_STATUS


class LostPeer(ExpectedError, RuntimeError):
    """Another process of the run was lost or does not respond."""

    status = STALLED_STATUS


class LostWorker(LostPeer):
    """A data worker of this process was killed."""


class PreemptionSignals:
    """Records SIGTERM, SIGUSR1 and SIGUSR2 instead of dying. Construct before starting data workers.

    Signals are ignored until `listen()`, so that data workers inherit ignoring signals meant for the training process.
    """

    def __init__(self) -> None:
        self.is_noted = False
        self._before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}

    def listen(self) -> None:
        """Record signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def on_any_rank(self, device: torch.device) -> bool:
        """Return on every rank whether any rank recorded a signal; every rank must call it."""
        if not (distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.is_noted
        noted = torch.tensor([int(self.is_noted)], device=device)
        distributed.all_reduce(noted, distributed.ReduceOp.MAX)
        return bool(noted.item())

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_noted = True

"""Preemption, the end of a run from outside: a scheduler's signal becomes a checkpoint and an exit status.

`training/loop.py` asks after every step whether any rank was told to stop; `scripts/train.py` ends with
`REQUEUE_STATUS`. Slurm sends SIGUSR1 before the time limit, to every process of a job step:

    09:58:00 SIGUSR1 to rank 3 -> step 4,711 ends -> all ranks save -> "preempted after step 4711" -> status 85

SIGUSR2, which submitit has Slurm send to every process of a job, does the same; data workers only write their stacks.
SIGTERM does the same where it is sent to the training processes alone. PyTorch's data workers end at a SIGTERM of their
own and take the run with them; it then goes on from the last complete checkpoint.
"""

import signal
from types import FrameType

import torch
from torch import distributed

from pixel_sail.errors import ExpectedError

REQUEUE_STATUS = 85
"""Exit status that means: saved, start me again. `scripts/slurm/train.sbatch` goes by it."""

STALLED_STATUS = 86
"""Exit status that means: a process stood still or was lost; the run goes on from its last checkpoint."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class RequeueRun(ExpectedError, RuntimeError):
    """The run ended to be started again: a signal asked for it and its last step is saved, or it goes back and past the
    data it broke down on."""

    status = REQUEUE_STATUS


class LostPeer(ExpectedError, RuntimeError):
    """Another process of the run was lost, or says nothing any more."""

    status = STALLED_STATUS


class LostWorker(LostPeer):
    """A data worker of this process was killed."""


class PreemptionSignals:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 instead of dying of them. Must be made before any data worker is started.

    Signals are ignored at first and noted from `listen` on: processes that start in between, the data workers and what
    starts them, inherit that they ignore signals, which are meant for the training process alone.
    """

    def __init__(self) -> None:
        self.is_noted = False
        self._before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}

    def listen(self) -> None:
        """Note signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def anywhere(self, device: torch.device) -> bool:
        """Return on every rank whether any rank noted a signal; every rank must call it."""
        if not (distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.is_noted
        noted = torch.tensor([int(self.is_noted)], device=device)
        distributed.all_reduce(noted, distributed.ReduceOp.MAX)
        return bool(noted.item())

    def restore(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_noted = True

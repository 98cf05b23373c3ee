"""Distributed processes: the launcher's environment variables, and collectives.

Works the same under plain `python` (one process), `torchrun`, `accelerate launch` and the `deepspeed` launcher, which
set for the second of two processes

    RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
"""

import os
import random
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pixel_sail.errors import ExpectedError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHER_LAUNCHERS = {
    "srun": ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    "mpirun": ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    "mpiexec": ("PMI_RANK", ("PMI_SIZE",)),
    "mpirun_rsh": ("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    "flux run": ("FLUX_TASK_RANK", ("FLUX_JOB_SIZE",)),
    "jsrun": ("JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",)),
}
"""Programs that start tasks without setting `VARIABLES` -> variable with the number of a task, and variables with the
number of tasks, of which the first that is set counts."""


PORTS = (15_000, 32_000)
"""Range of ports to choose from: below 32768, where Linux's ports of outgoing connections begin."""


class LaunchError(ExpectedError):
    """The launcher's variables do not describe a group of processes."""


def free_port() -> int:
    """Return a free port of this machine.

    Ports of outgoing connections are excluded, as one might be taken between this call and its use.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"found no free port among a hundred of {PORTS[0]} .. {PORTS[1]}, expected one; set MASTER_PORT")


def ensure_launch_environment() -> None:
    """Check the launcher's variables, and set the defaults of a single process, so that DeepSpeed need not guess. An
    empty variable counts as unset.

    Raises: LaunchError for missing or inconsistent variables, and for one of several tasks of a program that does not
    set them: every task would repeat the whole work.
    """
    given = {name: value for name in VARIABLES if (value := os.environ.get(name, "").strip())}
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(given)
    number, local, size, _, port = (_number(given, name) for name in VARIABLES if name != "MASTER_ADDR")
    if number is None:
        _refuse_unnumbered_tasks()
    if number is None and (size or 1) > 1:
        raise LaunchError(f"RANK is not set, expected 0 .. {(size or 1) - 1} as WORLD_SIZE is {size}; {_HOW}")
    if size is None and (number or 0) > 0:
        raise LaunchError(f"WORLD_SIZE is not set, expected the number of all processes as RANK is {number}; {_HOW}")
    number, size = number or 0, 1 if size is None else size
    if size < 1 or number >= size:
        raise LaunchError(f"RANK is {number} and WORLD_SIZE {size}, expected RANK from 0 to WORLD_SIZE - 1; {_HOW}")
    if port is not None and not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT is {port}, expected 1 .. 65535; {_HOW}")
    num_gpus = torch.cuda.device_count()
    if local is None and size > 1 and num_gpus > 1:
        raise LaunchError(f"LOCAL_RANK is not set, expected which of the {num_gpus} GPUs this process uses; {_HOW}")
    if num_gpus and (local or 0) >= num_gpus:
        raise LaunchError(
            f"LOCAL_RANK is {local}, but torch sees {num_gpus} GPUs, counted from 0; start at most {num_gpus} "
            "processes on this node"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]
    if size > 1 and missing:
        raise LaunchError(
            f"{' and '.join(missing)} not set, expected where rank 0 listens as WORLD_SIZE is {size}; {_HOW}"
        )
    filled = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "MASTER_PORT" in missing:
        filled["MASTER_PORT"] = str(free_port())
    os.environ.update(filled | given)


_HOW = (
    "start with torchrun, accelerate launch or deepspeed, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT for every process; a single process needs none of them"
)


def _number(given: Mapping[str, str], name: str) -> int | None:
    """Return a variable as a number, None if it is not set. Raises: LaunchError."""
    if name not in given:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", given[name]):
        raise LaunchError(f"{name} is {given[name]!r}, expected a number, 0 or more; {_HOW}")
    return int(given[name])


def _refuse_unnumbered_tasks() -> None:
    """Raise LaunchError if this is one of several tasks that another program started."""
    for program, (number, sizes) in OTHER_LAUNCHERS.items():
        name = next((size for size in sizes if os.environ.get(size)), sizes[-1])
        count = os.environ.get(name, "")
        # The script of a Slurm job is numbered like a task, but runs once.
        is_script = os.environ.get("ENVIRONMENT") == "BATCH" and not os.environ.get("SLURM_STEP_ID")
        if not os.environ.get(number) or not count.isdecimal() or int(count) < 2 or (program == "srun" and is_script):
            continue
        raise LaunchError(
            f"found task {os.environ[number]} of {count} that {program} started ({number}, {name}), but no RANK and "
            "WORLD_SIZE: every task would do the whole work alone. Use scripts/slurm/train.sbatch or evaluate.sbatch, "
            f"or let {program} start one torchrun --nproc-per-node=GPUS per node, or set RANK=${number}, "
            f"WORLD_SIZE=${name}, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for every task. For an independent process "
            "set RANK=0 and WORLD_SIZE=1"
        )


def start_group() -> None:
    """Join the launcher's process group, if there is more than one process.

    The timeout is long, as ranks synchronize only at the end of an evaluation and one may be slower by hours.
    """
    if launched_world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        dist.init_process_group(timeout=timedelta(hours=12))


def rank() -> int:
    """Return this process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_world_size() -> int:
    """Return the number of launched processes, also before the group exists."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; use int64 or float64 for counts."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank, in rank order; every rank must call it. For small plain objects."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether an error means that another process was lost or unresponsive; gloo has no error class for it."""
    if "EADDRINUSE" in str(error):
        # The group's address is in use, so there was no other process yet.
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def shutdown() -> None:
    """Destroy the process group: gloo sometimes aborts when a process exits with the group alive."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def local_device() -> torch.device:
    """Return the device of this process: its own GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    return torch.device("cpu")

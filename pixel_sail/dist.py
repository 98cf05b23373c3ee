"""Processes: the environment a launcher leaves behind, and sums over ranks.

Place in the flow: the lowest layer beside `types`; training and evaluation ask it who they are. Works the same under
plain `python` (one process), `torchrun`, `accelerate launch` and the `deepspeed` launcher.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ensure_launch_environment() -> None:
    """Give a process that no launcher started the variables of a group of one, so that DeepSpeed need not guess."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(single, MASTER_PORT=str(free_port()))


def start_group() -> None:
    """Join the process group the launcher described, if there is more than one process.

    The time-out is long: ranks meet only at the end of an evaluation, and one may be slower by hours.
    """
    if launched_world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        dist.init_process_group(timeout=timedelta(hours=12))


def rank() -> int:
    """Return this process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_world_size() -> int:
    """Return the number of processes the launcher started, also before the group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; use int64 or float64 for anything that is counted."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank, in rank order; every rank must call it. For small plain things."""
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
    """Return whether an error means that another process was lost or silent; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def shutdown() -> None:
    """Leave the process group in order: gloo aborts now and then when a process exits with the group alive."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def local_device() -> torch.device:
    """Return the device of this process: its own GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")

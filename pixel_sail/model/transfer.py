"""Asynchronous copies of small tensors from the host to a device.

Used for tensors of Python numbers within a training step. A plain copy to a GPU waits until the GPU is idle. A copy
from pinned memory is only queued:

    to_device(torch.tensor([1.0, 0.1]), device)
"""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)

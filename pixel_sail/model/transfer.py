"""Small tables from the host to the device of a model, without waiting for it.

Whoever needs a tensor made of Python numbers within a training step. A plain copy to a GPU waits until the GPU has
nothing left to do; one from pinned memory is only put into its queue:

    to_device(torch.tensor([1.0, 0.1]), device)
"""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)

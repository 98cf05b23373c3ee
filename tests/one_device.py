"""Run a training step on the meta device, which reveals device mismatches and synchronization points of a GPU.

Values of meta tensors cannot be read, and mixing them with host tensors raises an error or is recorded here:

    assert step_on_one_device(model, batch, torch.bfloat16) == []
"""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixel_sail.distillation.teachers import Teachers
from pixel_sail.losses.total import combine, count, loss_sums


class MixedDevices(TorchDispatchMode):
    """Record every operation on tensors of two devices, except the copies of `to_device`."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            frame, callers = sys._getframe(), []
            while frame is not None:
                callers.append(frame.f_code.co_name)
                frame = frame.f_back
            if "to_device" not in callers:
                self.found.append(function.name())
        return result


class TensorsOfNumbers(TorchFunctionMode):
    """Record tensors created from Python numbers on a device: copies from the host, for which a GPU waits."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device.type != "cpu":
            self.found.append(function.__name__)
        return result


def step_on_one_device(model, batch, dtype, config, terms=()):
    """Run forward pass, losses and backward pass; return the recorded host accesses. The model is moved."""
    model.train().to("meta").to(dtype)
    moved, teachers, found = batch.to("meta"), Teachers(networks={}), []
    with MixedDevices(found), TensorsOfNumbers(found):
        output = model(**moved.training_inputs())
        sums = loss_sums(output, moved, config, terms, teachers.maps(moved))
        loss = combine(sums, count(batch, terms), config, terms) + output.zero_loss
        loss.backward()
    gradients = {(p.grad.device.type, p.grad.dtype) for p in model.parameters() if p.grad is not None}
    assert gradients == {("meta", dtype)}
    return found

"""Raises an error instead of updating weights with gradients that are not finite.

`training/prepare.py` creates one `GradientCheck` for the wrapped model; `training/step.py` runs every backward pass
through it. Without it, AdamW and DeepSpeed in fp32 would write NaN into every weight, and DeepSpeed in bf16 would skip
the update silently:

    step 57, loss 1.93, a gradient of rank 1 is inf  ->  NonFiniteLossError on all ranks, rank 1 names its samples
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from pixel_sail import dist
from pixel_sail.errors import ExpectedError


class NonFiniteLossError(ExpectedError, RuntimeError):
    """A loss or a gradient became NaN or infinite; the update was not made."""


class GradientCheck:
    """Checks every gradient of this rank before it is summed over ranks and micro-batches."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sum = torch.zeros((), device=accelerator.device)
        for parameter in accelerator.unwrap_model(model).parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note)

    def backward(self, loss: Tensor, sample_ids: Sequence[str]) -> None:
        """Run the backward pass of a micro-batch; after the last one of a step, check the gradients of all ranks.

        Accelerate combines DeepSpeed's backward pass and update; here they are separate calls.

        Raises: NonFiniteLossError on every rank, before the update, naming this rank's samples where it is the cause.
        """
        accelerator = self._accelerator
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                self._compare(sample_ids)
            return
        engine = accelerator.deepspeed_engine_wrapped.engine
        engine.set_gradient_accumulation_boundary(is_boundary=accelerator.sync_gradients)
        engine.backward(loss)
        if accelerator.sync_gradients:
            self._compare(sample_ids)
            engine.step()

    def _note(self, gradient: Tensor) -> None:
        # The sum is finite if all elements are, at a twentieth of the cost of checking each.
        self._sum = self._sum + gradient.detach().sum(dtype=torch.float32)

    def _compare(self, sample_ids: Sequence[str]) -> None:
        is_bad = (~torch.isfinite(self._sum)).to(torch.int64)
        self._sum = torch.zeros_like(self._sum)
        num_bad = int(dist.sum_over_ranks(is_bad))
        if num_bad:
            raise NonFiniteLossError(
                f"a gradient is not finite though the losses are, on {num_bad} of {dist.world_size()} ranks; "
                f"{which_rank(sample_ids if bool(is_bad) else ())}"
            )


def which_rank(sample_ids: Sequence[str]) -> str:
    """Return the end of the message: whether this rank is the cause, and its samples."""
    cause = f"holds it, among its samples {list(sample_ids)}" if sample_ids else "is not the cause"
    return f"rank {dist.rank()} {cause}; no update was made"

"""No update from gradients that are not finite.

`training/loop.py` makes one `GradientCheck` for the wrapped model, `training/step.py` runs every backward pass through
it. Left alone, plain AdamW and DeepSpeed in fp32 would write NaN into every weight, and DeepSpeed in bf16 would leave
the update out without a word:

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
    """Sees every gradient of this rank before ranks and micro-batches are summed, whatever DeepSpeed does with it."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sum = torch.zeros((), device=accelerator.device)
        for parameter in accelerator.unwrap_model(model).parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note)

    def backward(self, loss: Tensor, sample_ids: Sequence[str]) -> None:
        """Run the backward pass of a micro-batch; after the last one of a step, compare notes with the other ranks.

        DeepSpeed makes its update at once; accelerate joins the two, so they are taken apart here.

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
        # A sum is finite exactly where all of it is, and costs a twentieth of asking each element.
        self._sum = self._sum + gradient.detach().sum(dtype=torch.float32)

    def _compare(self, sample_ids: Sequence[str]) -> None:
        is_bad = (~torch.isfinite(self._sum)).to(torch.int64)
        self._sum = torch.zeros_like(self._sum)
        num_bad = int(dist.sum_over_ranks(is_bad))
        if num_bad:
            raise NonFiniteLossError(
                f"a gradient is not finite though the losses are, on {num_bad} of {dist.world_size()} ranks; "
                f"{blame(sample_ids if bool(is_bad) else ())}"
            )


def blame(sample_ids: Sequence[str]) -> str:
    """Return the end of the message: whether it was this rank, by what samples."""
    cause = f"holds it, among its samples {list(sample_ids)}" if sample_ids else "is not the cause"
    return f"rank {dist.rank()} {cause}; no update was made"

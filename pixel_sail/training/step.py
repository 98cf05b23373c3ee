"""One optimizer step.

Place in the flow: `training/loop.py` calls `optimizer_step` with the micro-batches of one step. The counts of the
whole global batch are known before the first forward pass, so every micro-batch's loss is its exact share of one
global mean: the result does not depend on how samples were dealt to ranks and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.losses.total import Counts, LossConfig, combine, count, loss_sums
from pixel_sail.types import Batch


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the update was not made."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, summed over all ranks."""

    total: float
    text: float
    """Mean over supervised tokens, factors of samples included."""
    bce: float
    dice: float
    """Means over masks, unweighted."""
    grad_norm: float
    tokens: int
    """Tokens without padding."""
    padding_frac: float
    supervised_tokens: int
    masks: int
    samples: int


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    config: LossConfig,
    accelerator: Accelerator,
    *,
    max_grad_norm: float,
) -> StepReport:
    """Make one update from this rank's micro-batches and return the global losses.

    Raises: NonFiniteLossError on every rank, before the update, naming this rank's samples.
    """
    totals = _global_totals(batches, accelerator.device)
    counts = Counts(tokens=int(totals[0]), masks=int(totals[1]))
    # DeepSpeed and DDP average gradients over ranks and micro-batches; the losses are already shares of a global mean.
    unaverage = dist.world_size() * len(batches)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        with accelerator.accumulate(model):
            output = model(**batch.model_inputs())
            terms = loss_sums(output, batch, config)
            loss = combine(terms, counts, config) + output.anchor
            sums += terms.detached()
            if index + 1 == len(batches):
                report = _finish_losses(sums, batches, counts, config)
            accelerator.backward(loss * unaverage)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    norm = float(grad_norm) if grad_norm is not None else float("nan")
    return StepReport(
        **report,
        grad_norm=norm,
        tokens=int(totals[2]),
        padding_frac=1.0 - float(totals[2] / totals[3]),
        supervised_tokens=counts.tokens,
        masks=counts.masks,
        samples=int(totals[4]),
    )


def _global_totals(batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """Return supervised tokens, masks, tokens, cells with padding and samples over all ranks, int64 [5]."""
    local = torch.zeros(5, dtype=torch.int64)
    for batch in batches:
        counts = count(batch)
        real = int((batch.sample_index_BT >= 0).sum())
        local += torch.tensor([counts.tokens, counts.masks, real, batch.input_ids_BT.numel(), len(batch.sample_ids)])
    return dist.sum_over_ranks(local.to(device)).cpu()


def _finish_losses(
    sums: torch.Tensor, batches: Sequence[Batch], counts: Counts, config: LossConfig
) -> dict[str, float]:
    """Return the global losses; raise on every rank when one of them is not finite."""
    bad_here = not bool(torch.isfinite(sums).all())
    text, bce, dice = dist.sum_over_ranks(sums).tolist()
    tokens, masks = max(counts.tokens, 1), max(counts.masks, 1)
    means = {"text": text / tokens, "bce": bce / masks, "dice": dice / masks}
    total = config.text * means["text"] + config.bce * means["bce"] + config.dice * means["dice"]
    if total - total != 0.0:  # NaN and infinity alike
        names = [name for batch in batches for name in batch.sample_ids] if bad_here else []
        raise NonFiniteLossError(
            f"losses {means} are not finite; rank {dist.rank()} "
            + (f"holds them, among its samples {names}" if bad_here else "is not the cause")
            + "; no update was made, the last checkpoint is intact"
        )
    return {"total": total, **means}

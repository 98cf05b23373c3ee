"""One optimizer step.

Place in the flow: `training/loop.py` calls `optimizer_step` with the micro-batches of one step. The counts of the
whole global batch are known before the first forward pass, so every micro-batch's loss is its exact share of one
global mean: the result does not depend on how samples were dealt to ranks and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.losses.total import Counts, LossConfig, LossSums, combine, count, loss_sums
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
    grad_norm: float | None
    """None where DeepSpeed clips without telling the norm (ZeRO-0)."""
    tokens: int
    """Tokens without padding."""
    padding_frac: float
    supervised_tokens: int
    masks: int
    samples: int
    by_source: Tensor
    """float64 [sources, 6]: sums over this step's samples of SOURCE_COLUMNS, sources in the order they were given."""

    def scalars(self) -> dict[str, float]:
        """Return the numbers that are known, for the log."""
        return {name: value for name, value in vars(self).items() if name != "by_source" and value is not None}


SOURCE_COLUMNS = ("samples", "tokens", "masks", "text", "bce", "dice")
"""Supervised tokens; text, bce and dice are sums, to be divided by tokens and masks."""


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    config: LossConfig,
    accelerator: Accelerator,
    *,
    max_grad_norm: float,
    sources: Sequence[str],
) -> StepReport:
    """Make one update from this rank's micro-batches and return the global losses.

    Raises: NonFiniteLossError on every rank, before the update, naming this rank's samples.
    """
    totals = _global_totals(batches, accelerator.device)
    counts = Counts(tokens=int(totals[0]), masks=int(totals[1]))
    # DeepSpeed and DDP average gradients over ranks and micro-batches; the losses are already shares of a global mean.
    unaverage = dist.world_size() * len(batches)
    by_source = torch.zeros(len(sources), len(SOURCE_COLUMNS), dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(batches):
        batch = batch.to(accelerator.device)
        with accelerator.accumulate(model):
            output = model(**batch.model_inputs())
            terms = loss_sums(output, batch, config)
            loss = combine(terms, counts, config) + output.anchor
            by_source.index_add_(0, _source_of_samples(batch, sources), source_columns(batch, terms))
            if index + 1 == len(batches):
                is_bad_here = not bool(torch.isfinite(by_source).all())
                by_source = dist.sum_over_ranks(by_source)
                losses = _finish_losses(by_source, batches if is_bad_here else (), counts, config)
            accelerator.backward(loss * unaverage)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    norm = None if grad_norm is None else float(grad_norm)
    return StepReport(
        **losses,
        grad_norm=norm,
        tokens=int(totals[2]),
        padding_frac=1.0 - float(totals[2] / totals[3]),
        supervised_tokens=counts.tokens,
        masks=counts.masks,
        samples=int(totals[4]),
        by_source=by_source.cpu(),
    )


def source_columns(batch: Batch, terms: LossSums) -> Tensor:
    """Return SOURCE_COLUMNS of every sample of a micro-batch: float64 [S, 6]."""
    num_samples, device = len(batch.sample_ids), batch.targets_M.device
    counts = torch.zeros(num_samples, 3, dtype=torch.float64)
    counts[:, 0] = 1.0
    counts[:, 1] = torch.bincount(batch.target_samples_M.cpu(), minlength=num_samples)
    for sample, num_masks in zip(batch.image_samples, batch.masks_per_image, strict=True):
        counts[sample, 2] = num_masks
    return torch.cat((counts.to(device), terms.detached()), dim=1)


def _source_of_samples(batch: Batch, sources: Sequence[str]) -> Tensor:
    return torch.tensor([sources.index(name) for name in batch.sources], device=batch.targets_M.device)


def _global_totals(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Return supervised tokens, masks, tokens, cells with padding and samples over all ranks, int64 [5]."""
    local = torch.zeros(5, dtype=torch.int64)
    for batch in batches:
        counts = count(batch)
        real = int((batch.sample_index_BT >= 0).sum())
        local += torch.tensor([counts.tokens, counts.masks, real, batch.input_ids_BT.numel(), len(batch.sample_ids)])
    return dist.sum_over_ranks(local.to(device)).cpu()


def _finish_losses(
    by_source: Tensor, suspects: Sequence[Batch], counts: Counts, config: LossConfig
) -> dict[str, float]:
    """Return the global losses; raise on every rank when one of them is not finite, naming this rank's suspects."""
    text, bce, dice = by_source[:, 3:].sum(0).tolist()
    tokens, masks = max(counts.tokens, 1), max(counts.masks, 1)
    means = {"text": text / tokens, "bce": bce / masks, "dice": dice / masks}
    total = config.text * means["text"] + config.bce * means["bce"] + config.dice * means["dice"]
    if total - total != 0.0:  # NaN and infinity alike
        names = [name for batch in suspects for name in batch.sample_ids]
        raise NonFiniteLossError(
            f"losses {means} are not finite; rank {dist.rank()} "
            + (f"holds them, among its samples {names}" if names else "is not the cause")
            + "; no update was made, the last checkpoint is intact"
        )
    return {"total": total, **means}

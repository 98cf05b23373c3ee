"""One optimizer step.

`training/loop.py` calls `optimizer_step` with the micro-batches of one step. Token and mask counts are summed over the
global batch before the first forward pass, so each micro-batch contributes its exact part of one global mean. The
result does not depend on the distribution of samples over ranks and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from pixel_sail import dist
from pixel_sail.distillation.teachers import Teachers
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.losses.total import (
    Counts,
    LossConfig,
    LossSums,
    combine,
    count,
    loss_sums,
    masks_per_sample,
    weighted_sum,
)
from pixel_sail.model.transfer import to_device
from pixel_sail.training.finite import GradientCheck, NonFiniteLossError, which_rank
from pixel_sail.types import Batch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Losses and counts of one step over all ranks."""

    total: float
    """The minimized loss."""
    text: float
    """Mean over supervised tokens, including the samples' factors, for any `loss.mean`."""
    bce: float
    dice: float
    """Unweighted means over masks, for any `loss.mean`."""
    grad_norm: float | None
    """None if DeepSpeed clips without reporting the norm (ZeRO-0)."""
    tokens: int
    """Tokens without padding."""
    padding_fraction: float
    supervised_tokens: int
    masks: int
    samples: int
    by_source: Tensor
    """float64 [sources, columns]: sums of `source_columns` over this step's samples, in the given order of sources."""
    distill: dict[str, float] = field(default_factory=dict)
    """Log key -> unweighted mean loss over each teacher's images, and their number."""

    def scalars(self) -> dict[str, float]:
        """Return the known values by log key."""
        values = {f"{group}/{name}": getattr(self, name) for group, names in LOGGED.items() for name in names}
        return {key: value for key, value in values.items() if value is not None} | self.distill


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Teachers and distillation losses of a run."""

    teachers: Teachers
    terms: tuple[DistillTerm, ...]


LOGGED = {
    "loss": ("total", "text", "bce", "dice"),
    "optim": ("grad_norm",),
    "data": ("tokens", "padding_fraction", "supervised_tokens", "masks", "samples"),
}
"""Group of log keys -> logged fields of `StepReport`."""

SOURCE_COLUMNS = ("samples", "tokens", "masks", "text", "bce", "dice")
"""`tokens` are the supervised ones; text, bce and dice are sums, to be divided by tokens and masks."""


def source_columns(distill_terms: Sequence[DistillTerm]) -> tuple[str, ...]:
    """Return SOURCE_COLUMNS, then the summed losses of all teachers, then the numbers of their images."""
    losses = tuple(f"distill/{term.name}" for term in distill_terms)
    return (*SOURCE_COLUMNS, *losses, *(f"{loss}_images" for loss in losses))


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    config: LossConfig,
    accelerator: Accelerator,
    gradients: GradientCheck,
    *,
    max_grad_norm: float,
    sources: Sequence[str],
    distillation: Distillation | None = None,
) -> StepReport:
    """Run one update from this rank's micro-batches and return the global losses.

    Raises: NonFiniteLossError on every rank, before the update, naming this rank's samples.
    """
    distill_terms = distillation.terms if distillation is not None else ()
    totals = _global_totals(batches, accelerator.device, distill_terms)
    counts = Counts(
        tokens=int(totals[0]), masks=int(totals[1]), samples=int(totals[4]), distilled=tuple(totals[5:].tolist())
    )
    # DeepSpeed and DDP average gradients over ranks and micro-batches; the losses are already parts of a global mean.
    unaverage = dist.world_size() * len(batches)
    sample_ids = tuple(name for batch in batches for name in batch.sample_ids)
    # One row per source, and one for the sums of per-sample means.
    sums = torch.zeros(
        len(sources) + 1, len(source_columns(distill_terms)), dtype=torch.float64, device=accelerator.device
    )
    for index, batch in enumerate(batches):
        on_host, batch = batch, batch.to(accelerator.device)
        teacher_maps = distillation.teachers.maps(batch) if distillation is not None else {}
        with accelerator.accumulate(model):
            output = model(**batch.training_inputs())
            terms = loss_sums(output, batch, config, distill_terms, teacher_maps)
            loss = combine(terms, counts, config, distill_terms) + output.zero_loss
            sums.index_add_(0, _source_of_samples(batch, sources), sample_rows(on_host, terms, distill_terms))
            sums[-1, _losses(distill_terms)] += terms.means_SC().detach().double().sum(0)
            if index + 1 == len(batches):
                is_bad_here = not bool(torch.isfinite(sums).all())
                sums = dist.sum_over_ranks(sums)
                losses = _finish_losses(sums, sample_ids if is_bad_here else (), counts, config, distill_terms)
            gradients.backward(loss * unaverage, sample_ids)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    norm = None if grad_norm is None else float(grad_norm)
    return StepReport(
        **{name: losses[name] for name in ("total", "text", "bce", "dice")},
        distill={
            **{f"loss/{name}": value for name, value in losses.items() if name.startswith("distill/")},
            **{f"data/distill/{term.name}_images": n for term, n in zip(distill_terms, counts.distilled, strict=True)},
        },
        grad_norm=norm,
        tokens=int(totals[2]),
        padding_fraction=1.0 - float(totals[2] / totals[3]),
        supervised_tokens=counts.tokens,
        masks=counts.masks,
        samples=counts.samples,
        by_source=sums[:-1].cpu(),
    )


def sample_rows(batch: Batch, terms: LossSums, distill_terms: Sequence[DistillTerm] = ()) -> Tensor:
    """Return `source_columns` of every sample of a micro-batch on the host: float64 [S, columns]."""
    num_samples, device = len(batch.sample_ids), terms.text_S.device
    counts = torch.ones(num_samples, 3, dtype=torch.float64)
    counts[:, 1] = torch.bincount(batch.target_samples_M.cpu(), minlength=num_samples)
    counts[:, 2] = torch.tensor(masks_per_sample(batch))
    images = torch.zeros(num_samples, len(distill_terms), dtype=torch.float64)
    own = batch.distilled_images()
    for column, term in enumerate(distill_terms):
        images[[batch.image_samples[image] for image in own.get(term.name, ())], column] = 1.0
    return torch.cat((to_device(counts, device), terms.detached(), to_device(images, device)), dim=1)


def _source_of_samples(batch: Batch, sources: Sequence[str]) -> Tensor:
    indices = torch.tensor([sources.index(name) for name in batch.sources])
    return to_device(indices, batch.targets_M.device)


def _global_totals(batches: Sequence[Batch], device: torch.device, distill_terms: Sequence[DistillTerm]) -> Tensor:
    """Return supervised tokens, masks, tokens, cells with padding, samples and each teacher's images over all ranks,
    int64 [5 + teachers]."""
    local = torch.zeros(5 + len(distill_terms), dtype=torch.int64)
    for batch in batches:
        counts = count(batch, distill_terms)
        real = int((batch.sample_index_BT >= 0).sum())
        sizes = [counts.tokens, counts.masks, real, batch.input_ids_BT.numel(), counts.samples]
        local += torch.tensor([*sizes, *counts.distilled])
    return dist.sum_over_ranks(local.to(device)).cpu()


def _losses(distill_terms: Sequence[DistillTerm]) -> slice:
    """Return the columns of `source_columns` that hold losses."""
    return slice(3, 6 + len(distill_terms))


def _finish_losses(
    sums: Tensor, suspects: Sequence[str], counts: Counts, config: LossConfig, distill_terms: Sequence[DistillTerm]
) -> dict[str, float]:
    """Return the global losses. Raises: NonFiniteLossError on every rank, with this rank's suspects."""
    text, bce, dice, *distilled = sums[:-1, _losses(distill_terms)].sum(0).tolist()
    tokens, masks = max(counts.tokens, 1), max(counts.masks, 1)
    means = {"text": text / tokens, "bce": bce / masks, "dice": dice / masks}
    for term, loss, num_images in zip(distill_terms, distilled, counts.distilled, strict=True):
        means[f"distill/{term.name}"] = loss / max(num_images, 1)
    minimised = list(means.values())
    if config.mean == "sample":
        minimised = (sums[-1, _losses(distill_terms)] / max(counts.samples, 1)).tolist()
    total = weighted_sum(minimised, config, distill_terms)
    if total - total != 0.0:  # NaN and infinity alike
        raise NonFiniteLossError(f"losses {means} are not finite; {which_rank(suspects)}")
    return {"total": total, **means}

"""Loss sums of a micro-batch, and their combination into the total loss.

`training/step.py` calls `loss_sums` after the forward pass, then `combine` with the counts of the global batch (all
ranks, all micro-batches), so that every token and every mask has the same weight:

    total = text_weight * sum(w * CE) / tokens + bce_weight * sum(BCE) / masks + dice_weight * sum(Dice) / masks
            + for each teacher: teacher_weight * sum(distillation) / its distilled images

With `loss.mean=sample` losses are averaged within each sample first, then over the samples of the global batch. A
sample without masks, or without features of a teacher, counts with 0:

    total = sum over samples (text_weight * w * mean(CE) + bce_weight * mean(BCE) + dice_weight * mean(Dice)
            + for each teacher: teacher_weight * distillation) / samples

The released training computes the second, with one sample per process (bytedance/Sa2VA at 9832e1a,
sa2va_eval/projects/ST/models/sa2va_ST.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from pixel_sail.losses.distill import DistillTerm, distill_losses
from pixel_sail.losses.mask import ImageMasks, PointSampling, losses_at_points
from pixel_sail.losses.text import text_losses
from pixel_sail.model.modeling_pixel_sail import PixelSailOutput
from pixel_sail.model.transfer import to_device
from pixel_sail.types import Batch, DataError

MEANS = ("global", "sample")


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the losses (defaults: the release)."""

    text: float = 1.0
    text_factor_with_masks: float = 0.1
    """Additional factor on the text loss of samples with masks."""
    bce: float = 2.0
    dice: float = 0.5
    mean: str = "global"
    """global: average over all tokens and all masks of the global batch. sample (release): average within each sample,
    then over the samples of the global batch; a sample without masks counts with 0."""
    points: PointSampling = field(default_factory=PointSampling)

    def __post_init__(self) -> None:
        """Check the choice. Raises: DataError."""
        if self.mean not in MEANS:
            raise DataError(f"loss.mean is {self.mean!r}, expected one of {MEANS}")


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Unweighted sums of one micro-batch for each of its S samples. Text sums include the factor of each sample."""

    text_S: Tensor
    bce_S: Tensor
    dice_S: Tensor
    distill_SX: Tensor
    """One column per teacher. A sample has at most one image."""
    tokens_S: Tensor
    masks_S: Tensor
    """Numbers of supervised tokens and masks in the sums, in float32."""

    def means_SC(self) -> Tensor:
        """Return (text, bce, dice, teachers) of each sample as means over its own tokens and masks."""
        text_S = self.text_S / self.tokens_S.clamp(min=1)
        masks_S = self.masks_S.clamp(min=1)
        means = torch.stack((text_S, self.bce_S / masks_S, self.dice_S / masks_S), dim=1)
        return torch.cat((means, self.distill_SX), dim=1)

    def detached(self) -> Tensor:
        """Return (text, bce, dice, teachers) of each sample as one detached float64 tensor."""
        masks = torch.stack((self.text_S, self.bce_S, self.dice_S), dim=1)
        return torch.cat((masks, self.distill_SX), dim=1).detach().double()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Denominators of the means, over the global batch."""

    tokens: int
    masks: int
    samples: int
    distilled: tuple[int, ...] = ()
    """Images of each teacher."""


def count(batch: Batch, distill_terms: Sequence[DistillTerm] = ()) -> Counts:
    """Return the contribution of this micro-batch to the global counts."""
    distilled = tuple(batch.teacher_names.count(term.name) for term in distill_terms)
    return Counts(
        tokens=len(batch.targets_M), masks=len(batch.masks), samples=len(batch.sample_ids), distilled=distilled
    )


def masks_per_sample(batch: Batch) -> list[int]:
    """Return the number of masks of each sample."""
    found = [0] * len(batch.sample_ids)
    for sample, num_masks in zip(batch.image_samples, batch.masks_per_image, strict=True):
        found[sample] = num_masks
    return found


def text_weights(batch: Batch, config: LossConfig) -> Tensor:
    """Return the factor [M] of every supervised token."""
    per_sample = [config.text_factor_with_masks if masks else 1.0 for masks in masks_per_sample(batch)]
    return to_device(torch.tensor(per_sample), batch.targets_M.device)[batch.target_samples_M]


def loss_sums(
    output: PixelSailOutput,
    batch: Batch,
    config: LossConfig,
    distill_terms: Sequence[DistillTerm] = (),
    teacher_maps: Mapping[str, Sequence[Tensor]] | None = None,
) -> LossSums:
    """Return the loss sums of one micro-batch. `teacher_maps`: output of `Teachers.maps`, by teacher."""
    assert output.mask_logits is not None
    zeros = torch.zeros(len(batch.sample_ids), device=batch.targets_M.device)
    images, samples, first = [], [], 0
    for image, logits in enumerate(output.mask_logits):
        if logits is None:
            continue
        own = slice(first, first + len(logits))
        first += len(logits)
        masks, ignored, seed = batch.masks[own], batch.ignored[own], batch.point_seeds[image]
        images.append(ImageMasks(logits=logits, masks=masks, ignored=ignored, seed=seed))
        samples.append(batch.image_samples[image])
    assert first == len(batch.masks), f"{first} of {len(batch.masks)} masks were used"
    bce_S = dice_S = zeros
    if images:
        losses_2N, owners = losses_at_points(images, config.points)
        samples_N = to_device(torch.tensor([samples[owner] for owner in owners]), zeros.device)
        bce_S, dice_S = zeros.new_zeros(2, len(zeros)).index_add(1, samples_N, losses_2N).unbind()
    text_M = output.text_losses_M
    if text_M is None:
        assert output.logits is not None
        text_M = text_losses(output.logits, batch.targets_M)
    text_M = text_M * text_weights(batch, config)
    return LossSums(
        text_S=zeros.index_add(0, batch.target_samples_M, text_M),
        bce_S=bce_S,
        dice_S=dice_S,
        distill_SX=distill_sums(output, batch, distill_terms, teacher_maps or {}),
        tokens_S=zeros.index_add(0, batch.target_samples_M, torch.ones_like(text_M)),
        masks_S=to_device(torch.tensor(masks_per_sample(batch), dtype=torch.float32), zeros.device),
    )


def distill_sums(
    output: PixelSailOutput,
    batch: Batch,
    distill_terms: Sequence[DistillTerm],
    teacher_maps: Mapping[str, Sequence[Tensor]],
) -> Tensor:
    """Return the distillation loss of each sample from each teacher [S, X]; 0 if it is not distilled."""
    num_samples = len(batch.sample_ids)
    if not distill_terms:
        return batch.targets_M.new_zeros(num_samples, 0, dtype=torch.float32)
    images = batch.distilled_images()
    unknown = set(images) - {term.name for term in distill_terms}
    assert not unknown, f"the batch comes with features of {sorted(unknown)}, which have no loss"
    columns = []
    for term in distill_terms:
        own = [batch.image_samples[image] for image in images.get(term.name, ())]
        predicted = (output.distilled or {}).get(term.name, ())
        # Images of one size together: the time for small maps depends on the number of operations.
        by_shape: dict[tuple[object, ...], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for sample, student, features in zip(own, predicted, teacher_maps.get(term.name, ()), strict=True):
            by_shape[(student.shape, features.shape)].append((sample, student, features))
        column_S = batch.targets_M.new_zeros(num_samples, dtype=torch.float32)
        for group in by_shape.values():
            samples, students, maps = zip(*group, strict=True)
            losses_N = distill_losses(torch.stack(students), torch.stack(maps), term.loss)
            # A sample has one image at most.
            column_S = column_S.index_add(0, to_device(torch.tensor(samples), column_S.device), losses_N)
        columns.append(column_S)
    return torch.stack(columns, dim=1)


def combine(sums: LossSums, counts: Counts, config: LossConfig, distill_terms: Sequence[DistillTerm] = ()) -> Tensor:
    """Return the contribution of one micro-batch to the global loss. A count of zero divides by one."""
    if config.mean == "sample":
        means_C = sums.means_SC().sum(0) / max(counts.samples, 1)
        return weighted_sum(list(means_C), config, distill_terms)
    tokens, masks = max(counts.tokens, 1), max(counts.masks, 1)
    text, bce, dice = sums.text_S.sum(), sums.bce_S.sum(), sums.dice_S.sum()
    total = config.text * text / tokens + (config.bce * bce + config.dice * dice) / masks
    for column, (term, num_images) in enumerate(zip(distill_terms, counts.distilled, strict=True)):
        total = total + term.weight * sums.distill_SX[:, column].sum() / max(num_images, 1)
    return total


Number = TypeVar("Number", float, Tensor)


def weighted_sum(means: Sequence[Number], config: LossConfig, distill_terms: Sequence[DistillTerm] = ()) -> Number:
    """Return the weighted sum of the means of (text, bce, dice, teachers)."""
    text, bce, dice, *distilled = means
    total = config.text * text + config.bce * bce + config.dice * dice
    for mean, term in zip(distilled, distill_terms, strict=True):
        total = total + term.weight * mean
    return total

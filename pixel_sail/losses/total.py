"""All losses of a micro-batch as sums, and the one place where they become a number to differentiate.

Place in the flow: `training/step.py` calls `loss_sums` after the forward pass and `combine` with the counts of the
whole global batch (all ranks, all micro-batches), so that a token or a mask weighs the same wherever it was computed:

    total = text_weight * sum(w * CE) / tokens + bce_weight * sum(BCE) / masks + dice_weight * sum(Dice) / masks
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixel_sail.losses.mask import MaskSums, PointSampling, point_losses
from pixel_sail.losses.text import text_sum
from pixel_sail.model.modeling_pixel_sail import PixelSailOutput
from pixel_sail.types import Batch


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the losses (defaults: the release)."""

    text: float = 1.0
    text_factor_with_masks: float = 0.1
    """Further factor on the text loss of a sample that has masks."""
    bce: float = 2.0
    dice: float = 0.5
    points: PointSampling = field(default_factory=PointSampling)


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Unweighted sums of one micro-batch; the text sum already holds the factor of each sample."""

    text: Tensor
    bce: Tensor
    dice: Tensor

    def detached(self) -> Tensor:
        """Return (text, bce, dice) as one float64 tensor without history."""
        return torch.stack((self.text, self.bce, self.dice)).detach().double()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the sums are divided by, over the whole global batch."""

    tokens: int
    masks: int


def count(batch: Batch) -> Counts:
    """Return what this micro-batch contributes to the global counts."""
    return Counts(tokens=len(batch.targets_M), masks=len(batch.masks))


def text_weights(batch: Batch, config: LossConfig) -> Tensor:
    """Return the factor [M] of every supervised token."""
    per_sample = [1.0] * len(batch.sample_ids)
    for sample, num_masks in zip(batch.image_samples, batch.masks_per_image, strict=True):
        if num_masks:
            per_sample[sample] = config.text_factor_with_masks
    return torch.tensor(per_sample, device=batch.targets_M.device)[batch.target_samples_M]


def loss_sums(output: PixelSailOutput, batch: Batch, config: LossConfig) -> LossSums:
    """Return the loss sums of one micro-batch."""
    assert output.logits is not None and output.mask_logits is not None
    zero = output.logits.new_zeros((), dtype=torch.float32)
    bce, dice, first = zero, zero, 0
    for image, logits_NYX in enumerate(output.mask_logits):
        if logits_NYX is None:
            continue
        masks = torch.stack(batch.masks[first : first + len(logits_NYX)])
        first += len(logits_NYX)
        generator = torch.Generator().manual_seed(batch.point_seeds[image])
        sums: MaskSums = point_losses(logits_NYX, masks, config.points, generator)
        bce, dice = bce + sums.bce, dice + sums.dice
    assert first == len(batch.masks), f"{first} of {len(batch.masks)} masks were used"
    return LossSums(
        text=text_sum(output.logits, batch.targets_M, text_weights(batch, config)),
        bce=bce,
        dice=dice,
    )


def combine(sums: LossSums, counts: Counts, config: LossConfig) -> Tensor:
    """Return the share of one micro-batch in the global loss; a count of zero divides by one."""
    tokens, masks = max(counts.tokens, 1), max(counts.masks, 1)
    return config.text * sums.text / tokens + (config.bce * sums.bce + config.dice * sums.dice) / masks

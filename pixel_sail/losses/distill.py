"""Distillation losses between the student's projected features and a teacher's features.

`losses/total.py` calls `distill_losses` for the sampled images with the maps of `model/distill_head.py` and of
`distillation/teachers.py`. A student map [120, 160, 256] is compared with Mask2Former's [256, 200, 272] resized to 120
x 160.

Axis letters: N images, Y X cells of the student's map, h w cells of the teacher's, E teacher channels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6
"""Lower limit of the sum by which fractions are divided."""


@dataclass(frozen=True, kw_only=True)
class DistillTerm:
    """Loss settings of one teacher."""

    name: str
    weight: float = 1.0
    loss: str = "mse"


def resized_features(features: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """Resize a teacher's map [E, h, w], or maps [N, E, h, w], to the student's size in float32: bilinear without
    antialiasing, as in the release."""
    features = features.float()
    if tuple(features.shape[-2:]) == tuple(map_hw):
        return features
    maps_NEhw = features if features.ndim == 4 else features[None]
    resized = F.interpolate(maps_NEhw, map_hw, mode="bilinear", align_corners=False)
    return resized if features.ndim == 4 else resized[0]


def distill_losses(student_NYXE: Tensor, features_NEhw: Tensor, kind: str = "mse") -> Tensor:
    """Return the loss [N] of images of one size in float32, averaged over the cells of the student's map.

    mse: mean squared difference of raw features, averaged over channels too (release). cosine: one minus the cosine
    similarity. normalized_mse: mse against features with mean 0 and variance 1 over the channels of a cell. kl: KL
    divergence of the student's softmax from the teacher's channels as fractions, for a teacher that outputs classes.
    Raises: ValueError if the numbers of channels differ or the kind is unknown.
    """
    if student_NYXE.shape[3] != features_NEhw.shape[1]:
        raise ValueError(
            f"distillation: student has {student_NYXE.shape[3]} channels, teacher {features_NEhw.shape[1]}"
        )
    student = student_NYXE.float()
    target = resized_features(features_NEhw, (student.shape[1], student.shape[2])).permute(0, 2, 3, 1)
    if kind == "mse":
        return F.mse_loss(student, target, reduction="none").mean((1, 2, 3))
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(student, target, dim=3).mean((1, 2))
    if kind == "normalized_mse":
        normalized = F.layer_norm(target, target.shape[3:])
        return F.mse_loss(student, normalized, reduction="none").mean((1, 2, 3))
    if kind == "kl":
        fractions = target.clamp(min=0.0)
        fractions = fractions / fractions.sum(3, keepdim=True).clamp(min=EPSILON)
        return F.kl_div(student.log_softmax(3), fractions, reduction="none").sum(3).mean((1, 2))
    raise ValueError(f"distillation: loss {kind!r}, expected mse, cosine, normalized_mse or kl")


def distill_loss(student_YXE: Tensor, features_Ehw: Tensor, kind: str = "mse") -> Tensor:
    """Return the loss of one image."""
    return distill_losses(student_YXE[None], features_Ehw[None], kind)[0]

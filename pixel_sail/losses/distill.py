"""Distillation losses: what the student's linear layer says against an expert's features, for one image.

Place in the flow: `losses/total.py` calls `distill_loss` for every chosen image with the map of `model/distill_head.py`
and that of `experts/teachers.py`. A student map [120, 160, 256] is compared with Mask2Former's [256, 200, 272] resized
to 120 x 160.

Axis letters: Y X cells of the student's map, h w cells of the expert's, E expert channels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

TINY = 1e-6
"""Smallest sum of shares that is divided by."""


@dataclass(frozen=True, kw_only=True)
class DistillTerm:
    """One expert's part of the total loss."""

    name: str
    weight: float = 1.0
    loss: str = "mse"


def resized_features(features_Ehw: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """Return an expert's map in float32 at the student's size, bilinear without antialiasing as in the release."""
    features = features_Ehw.float()
    if tuple(features.shape[1:]) == tuple(map_hw):
        return features
    return F.interpolate(features[None], map_hw, mode="bilinear", align_corners=False)[0]


def distill_loss(student_YXE: Tensor, features_Ehw: Tensor, kind: str = "mse") -> Tensor:
    """Return the loss of one image in float32, a mean over the cells of the student's map.

    mse: mean squared difference, over channels too, of raw features (release). cosine: one minus the cosine of the
    two feature vectors. normalized_mse: as mse, against features with mean 0 and variance 1 over the channels of a
    cell. kl: divergence of the student's softmax from the channels as shares, for an expert whose channels are classes.
    Raises: ValueError when the numbers of channels differ or the kind is unknown.
    """
    if student_YXE.shape[2] != features_Ehw.shape[0]:
        raise ValueError(f"distillation: student has {student_YXE.shape[2]} channels, expert {features_Ehw.shape[0]}")
    student = student_YXE.float()
    target_YXE = resized_features(features_Ehw, (student.shape[0], student.shape[1])).permute(1, 2, 0)
    if kind == "mse":
        return F.mse_loss(student, target_YXE)
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(student, target_YXE, dim=2).mean()
    if kind == "normalized_mse":
        return F.mse_loss(student, F.layer_norm(target_YXE, target_YXE.shape[2:]))
    if kind == "kl":
        shares = target_YXE.clamp(min=0.0)
        shares = shares / shares.sum(2, keepdim=True).clamp(min=TINY)
        return F.kl_div(student.log_softmax(2), shares, reduction="none").sum(2).mean()
    raise ValueError(f"distillation: loss {kind!r}, expected mse, cosine, normalized_mse or kl")

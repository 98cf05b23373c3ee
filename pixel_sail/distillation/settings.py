"""Settings of one teacher.

`config.TrainConfig.distillation` holds one `TeacherSettings` per teacher, by name; `choice`, `teachers`,
`losses/distill.py` and `model/distill_head.py` use them. For example, from `configs/distillation/sam2.yaml`:

    TeacherSettings(model={"_target_": "pixel_sail.distillation.sam2.sam2",
                           "weights": "data/experts/sam2.1-hiera-large"},
                    weight=1.0, site="patch_states", channels=256, precision="bf16")
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from pixel_sail.types import DataError

TEACHER_CHOICES = {
    "loss": ("mse", "cosine", "normalized_mse", "kl"),
    "site": ("pixel_map", "patch_states"),
    "precision": ("fp32", "bf16"),
    "on_miss": ("error", "online"),
}


@dataclass(kw_only=True)
class TeacherSettings:
    """One teacher and how the student learns from it."""

    model: Any = MISSING
    """`_target_` and arguments of a function that returns a `teacher.TeacherSpec`."""
    weight: float = 1.0
    """Weight of its loss in the total."""
    loss: str = "mse"
    """mse (release), cosine, normalized_mse (features with mean 0 and standard deviation 1 at every cell), or kl (the
    channels are classes, for which the student predicts a distribution)."""
    site: str = "pixel_map"
    """Features of the student: its pixel_map after the projector, or its patch_states after the decoder."""
    channels: int = 256
    """Feature channels of the teacher, and outputs of the student's linear layer."""
    fraction: float = 1.0
    """Fraction of the samples with images that is distilled, sampled again in every epoch."""
    sources: list[str] = field(default_factory=list)
    """Names in `data.sources` to distill. Empty: all."""
    masks_only: bool = False
    """True: only samples with masks are distilled."""
    precision: str = "fp32"
    """Precision of the teacher: fp32 or bf16."""
    max_batch: int = 8
    """Maximum images per forward pass of the teacher."""
    cache: str | None = None
    """Folder written by tools/cache_teacher_features.py. None: the teacher runs during training."""
    on_miss: str = "error"
    """For an image that is not in the cache: error ends the run, online computes its features."""

    def __post_init__(self) -> None:
        """Check the choices and numbers. Raises: DataError."""
        for name, allowed in TEACHER_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"distillation: {name} is {getattr(self, name)!r}, expected one of {allowed}")
        if not 0.0 <= self.fraction <= 1.0:
            raise DataError(f"distillation: fraction is {self.fraction}, expected 0 .. 1")
        if self.channels < 1 or self.max_batch < 1:
            raise DataError(
                f"distillation: channels {self.channels}, max_batch {self.max_batch} found; expected 1 or more of both"
            )

    @property
    def runs_online(self) -> bool:
        """Return whether the network is needed while training."""
        return self.cache is None or self.on_miss == "online"

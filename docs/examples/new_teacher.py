"""A custom teacher: a fixed edge filter whose response the model learns to predict from its pixel map.

Configuration -> `edges` -> `TeacherSpec` -> `Teacher` -> loss `loss/distill/edges`. A real teacher loads safetensors in
`build` and lists their hashes in `weights` (`pixel_sail/distillation/weights.py`).
"""

from pathlib import Path

import torch
from tiny import make_data, work_folder
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.config import build
from pixel_sail.distillation.preprocess import PatchMultiple, Preprocessing
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.distillation.teacher import Teacher, TeacherSpec
from pixel_sail.distillation.teachers import checked_spec


class Edges(nn.Module):
    """Horizontal and vertical differences of the grayscale image, at a quarter of its size."""

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3)
        self.register_buffer("filters_E1KK", torch.stack((across, across.T))[:, None])

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the features [B, E, Y, X]."""
        grey_B1HW = pixels_B3HW.mean(1, keepdim=True)
        edges_BEHW = F.conv2d(grey_B1HW, self.get_buffer("filters_E1KK").to(grey_B1HW.dtype), padding=1)
        return F.avg_pool2d(edges_BEHW, 4)


def edges(max_long_side: int) -> TeacherSpec:
    """Return the spec: the `_target_` of `distillation.NAME.model`."""
    resize = PatchMultiple(patch_size=16, max_long_side=max_long_side)
    return TeacherSpec(
        kind="edges",
        channels=2,
        preprocessing=Preprocessing(resize=resize),
        weights={"code": "edges 1"},
        build=Edges,
    )


def main(folder: Path) -> Tensor:
    """Configure the teacher and return its features of one image."""
    make_data(folder)
    settings = TeacherSettings(
        model={"_target_": "new_teacher.edges", "max_long_side": 256}, channels=2, site="pixel_map"
    )
    spec = checked_spec("edges", settings, build, allow_random=False)
    teacher = Teacher(spec, device="cpu", precision="fp32", max_batch=4)
    image_HW3 = torch.zeros(64, 96, 3, dtype=torch.uint8)
    image_HW3[:, 48:] = 255
    (features_EYX,) = teacher.features([image_HW3])
    print(f"an image of 64 x 96 gives features {tuple(features_EYX.shape)}")
    return features_EYX


if __name__ == "__main__":
    main(work_folder())

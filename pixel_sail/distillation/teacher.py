"""A teacher: its spec, and the network that computes feature maps of images.

A configuration's `_target_` returns a `TeacherSpec`, which is cheap; `teachers.py` and the cache tool build a `Teacher`
from it if the network is needed. Two images of 480 x 640 through Mask2Former give two maps [256, 200, 272].

Axis letters: E feature channels, h w cells of a feature map, H W pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixel_sail.distillation.preprocess import Preprocessing
from pixel_sail.types import DTYPES, DataError


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Everything about a teacher except its weights in memory."""

    kind: str
    channels: int
    preprocessing: Preprocessing
    weights: dict[str, str]
    """File name -> SHA-256; for a random network its architecture."""
    build: Callable[[], nn.Module]
    """Returns the float32 network on the CPU: pixels [B, 3, H, W] -> features [B, E, h, w]."""
    is_random: bool = False

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the features: another identity means other features."""
        return {"kind": self.kind, "weights": self.weights, "preprocessing": self.preprocessing.identity()}


class Teacher:
    """A frozen network on its device. It is not a module, so it cannot be registered as part of the student."""

    def __init__(self, spec: TeacherSpec, *, device: torch.device | str, precision: str, max_batch: int) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self.max_batch = max_batch
        self.network = spec.build().eval().requires_grad_(False).to(self.device, self.dtype)

    @torch.no_grad()
    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the feature map [E, h, w], float32, of every image [H, W, 3], uint8.

        Images that are resized to the same size are batched.
        Raises: DataError if the network's number of channels differs from its spec.
        """
        same_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            same_size[self.spec.preprocessing.size((image.shape[0], image.shape[1]))].append(index)
        maps: list[Tensor | None] = [None] * len(images)
        for indices in same_size.values():
            for start in range(0, len(indices), self.max_batch):
                group = indices[start : start + self.max_batch]
                pixels_B3HW = torch.stack([self.spec.preprocessing(images[i].to(self.device)) for i in group])
                features_BEhw = self.network(pixels_B3HW.to(self.dtype)).float()
                if features_BEhw.shape[1] != self.spec.channels:
                    raise DataError(
                        f"teacher {self.spec.kind}: {features_BEhw.shape[1]} channels found, {self.spec.channels} "
                        "expected from its configuration"
                    )
                for index, feature in zip(group, features_BEhw, strict=True):
                    maps[index] = feature
        return [feature for feature in maps if feature is not None]

"""RADIO as a teacher: the spatial features of its last layer.

`configs/distillation/radio.yaml` names `radio` below. The network is the port in transformers, which reads the
published safetensors without remote code. RADIO normalizes its input itself, so images are only scaled to 0 .. 1. An
image of 480 x 640 becomes 768 x 1024 and its map [1024, 48, 64] with RADIO-L.

Older repositories, including RADIO-L, do not have the port's size fields in their `config.json`; `architecture` sets
them. A size that does not fit the weights raises an error with the names of the tensors.
"""

from typing import Any

from torch import Tensor, nn
from transformers import RadioConfig, RadioModel

from pixel_sail.distillation.preprocess import Preprocessing, ShortestEdge
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.distillation.weights import WeightSource

UNUSED = (r"(^|\.)(adaptors?|feature_normalizer|head|video_embedder)\.",)
"""Tensors of published models for other outputs: summaries per teacher, video."""

ABSENT = (r"layer_scale\d+\.lambda1$",)
"""Parameters of the port that the published models do not have; they are one."""


class SpatialFeatures(nn.Module):
    """Patch tokens of the last layer as a map."""

    def __init__(self, radio: RadioModel) -> None:
        super().__init__()
        self.radio = radio

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the features [B, E, H / patch, W / patch]."""
        rows, columns = (side // self.radio.patch_size for side in pixels_B3HW.shape[2:])
        features_BPE = self.radio(pixels_B3HW).features
        return features_BPE.transpose(1, 2).unflatten(2, (rows, columns))


def radio(
    weights: str | None = None,
    revision: str | None = None,
    *,
    shortest_edge: int = 768,
    random: bool = False,
    architecture: dict[str, Any] | None = None,
) -> TeacherSpec:
    """Return the spec of RADIO.

    `random`, `architecture`: see `WeightSource.find`; the fields are those of transformers' RadioConfig.
    Raises: DataError.
    """
    source = WeightSource.find("radio", weights, revision, random=random, architecture=architecture)
    config = source.config(RadioConfig)
    return TeacherSpec(
        kind="radio",
        channels=config.hidden_size,
        preprocessing=Preprocessing(resize=ShortestEdge(short=shortest_edge), mode="bicubic", snap=config.patch_size),
        weights=source.identity(),
        build=lambda: SpatialFeatures(source.network(RadioModel, config, unused=UNUSED, absent=ABSENT)),
        is_random=random,
    )

"""RADIO as a teacher: the spatial features of its last layer.

`configs/distillation/radio.yaml` names `radio` below. The network is transformers' own port, which reads the published
safetensors without their code; RADIO normalises its input itself, so images only become numbers 0 .. 1. An image of 480
x 640 becomes 768 x 1024 and its map [1024, 48, 64] with RADIO-L.

The sizes of the older repositories (RADIO-L among them) do not stand in their `config.json` under the port's names:
`architecture` gives them, and a size that does not fit the weights is refused by the names of the tensors.
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
"""Parameters of the port that the published models do not have and that stay at one."""


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

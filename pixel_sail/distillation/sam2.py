"""SAM 2.1's image encoder as a teacher: Hiera, feature pyramid and the no-memory embedding.

`configs/distillation/sam2.yaml` names `sam2` below. The features are the `image_embed` of the released predictor: the
pyramid's coarsest level, stride 16, plus the no-memory embedding, which SAM 2 adds for single images. Every image
becomes 1024 x 1024 and its map [256, 64, 64].
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Sam2Config
from transformers.models.sam2.modeling_sam2 import Sam2PreTrainedModel

from pixel_sail.distillation.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Square
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.distillation.weights import WeightSource

UNUSED = (
    r"^(prompt_encoder|mask_decoder|shared_image_embedding|memory_attention|memory_encoder|mask_downsample)\.",
    r"^(object_pointer_proj|temporal_positional_encoding_projection_layer)\.",
    r"^(memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer)$",
    r"^occlusion_spatial_embedding_parameter$",
)
"""Tensors of the published video model that belong to prompts, masks and memory."""


def num_channels(config: Sam2Config) -> int:
    """Return the channels of the feature pyramid."""
    vision: Any = config.vision_config
    return int(vision.fpn_hidden_size)


class ImageEncoder(Sam2PreTrainedModel):
    """The image encoder of SAM 2, loadable from the weights of the full model."""

    _keys_to_ignore_on_load_unexpected = list(UNUSED)  # noqa: RUF012, declared so by the base class

    def __init__(self, config: Sam2Config) -> None:
        super().__init__(config)
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, 1, num_channels(config)))
        self.post_init()

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the image embedding [B, E, H / 16, W / 16]."""
        coarsest_BEhw = self.vision_encoder(pixels_B3HW).fpn_hidden_states[-1]
        return coarsest_BEhw + self.no_memory_embedding.view(1, -1, 1, 1)


def sam2(
    weights: str | None = None,
    revision: str | None = None,
    *,
    side: int = 1024,
    random: bool = False,
    architecture: dict[str, Any] | None = None,
) -> TeacherSpec:
    """Return the spec of SAM 2.1.

    `random`, `architecture`: see `WeightSource.find`; the fields are those of transformers' Sam2Config.
    Raises: DataError.
    """
    preprocessing = Preprocessing(resize=Square(side=side), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    source = WeightSource.find("sam2", weights, revision, random=random, architecture=architecture)
    config = source.config(Sam2Config)
    return TeacherSpec(
        kind="sam2",
        channels=num_channels(config),
        preprocessing=preprocessing,
        weights=source.identity(),
        build=lambda: source.network(ImageEncoder, config, unused=UNUSED),
        is_random=random,
    )

"""Mask2Former as a teacher: backbone and pixel decoder, without the transformer decoder and heads.

`configs/distillation/mask2former.yaml` names `mask2former` below. The features are the per-pixel embeddings
(`pixel_decoder_last_hidden_state`), 256 channels at stride 4 of the resized image. They need two thirds of the released
Swin-L model: 480 x 640 -> 800 x 1088 -> [256, 200, 272].
"""

from typing import Any

from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelLevelModule,
    Mask2FormerPreTrainedModel,
)

from pixel_sail.distillation.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, ShortestEdge
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.distillation.weights import WeightSource

UNUSED = (r"(^|\.)transformer_module\.", r"^class_predictor\.", r"^criterion\.")
"""Tensors of the published model that belong to the transformer decoder, the heads and the training criterion."""


class PixelDecoder(Mask2FormerPreTrainedModel):
    """Backbone and pixel decoder of Mask2Former, loadable from the weights of the full model."""

    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = list(UNUSED)  # noqa: RUF012, declared so by the base class

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = Mask2FormerPixelLevelModule(config)
        self.post_init()

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the mask features [B, E, H / 4, W / 4]."""
        return self.pixel_level_module(pixels_B3HW).decoder_last_hidden_state


def mask2former(
    weights: str | None = None,
    revision: str | None = None,
    *,
    shortest_edge: int = 800,
    longest_edge: int = 1333,
    size_divisor: int = 32,
    random: bool = False,
    architecture: dict[str, Any] | None = None,
) -> TeacherSpec:
    """Return the spec of Mask2Former.

    `random`, `architecture`: see `WeightSource.find`; the fields are those of transformers' Mask2FormerConfig.
    Raises: DataError.
    """
    preprocessing = Preprocessing(
        resize=ShortestEdge(short=shortest_edge, long=longest_edge, divisor=size_divisor),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    source = WeightSource.find("mask2former", weights, revision, random=random, architecture=architecture)
    config = source.config(Mask2FormerConfig)
    return TeacherSpec(
        kind="mask2former",
        channels=config.mask_feature_size,
        preprocessing=preprocessing,
        weights=source.identity(),
        build=lambda: source.network(PixelDecoder, config, unused=UNUSED),
        is_random=random,
    )

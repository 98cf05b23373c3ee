"""Tiny teacher configurations that run in milliseconds, and the full transformers models that contain them."""

from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RadioConfig,
    RadioModel,
    Sam2Config,
    Sam2Model,
)

MASK2FORMER = {
    "backbone_config": {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 5,
}

SAM2 = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [64, 64],
            "blocks_per_stage": [1, 2, 3, 2],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [4, 2, 4, 2],
            "global_attention_blocks": [4],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "iou_head_hidden_dim": 16},
}

RADIO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_img_size": 128, "patch_size": 8}


def whole_mask2former() -> Mask2FormerForUniversalSegmentation:
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**MASK2FORMER)).eval()


def whole_sam2() -> Sam2Model:
    model = Sam2Model(Sam2Config(**SAM2)).eval()
    # Zero-initialized, so that a part without it would go undetected.
    model.no_memory_embedding.data.normal_()
    return model


def whole_radio() -> RadioModel:
    return RadioModel(RadioConfig(**RADIO)).eval()

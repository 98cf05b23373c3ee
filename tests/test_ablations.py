"""Every ablation file is one change: it composes with the experiment it belongs to, differs from it in the leaves it
names and nowhere else, fits the functions it names, and makes a model that computes."""

from dataclasses import asdict

import pytest
import torch
from test_configs import bind_targets, names

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.planning.parameters import parameter_counts
from pixel_sail.training.checkpoint import differing_leaves

ARCHITECTURE = "model.architecture."
HIDDEN = {"data.sources.refshapes.hide", "data.sources.groupshapes.hide"}

CHANGES = {
    "stride_16": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "stride_8": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "stride_4": ("refer_mini", {ARCHITECTURE + "mask_stride"}),
    "stride_2": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "upsampler_off": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "upsampler_bilinear": ("quickstart", {ARCHITECTURE + "upsampler"}),
    "upsampler_pixel_shuffle": ("quickstart", {ARCHITECTURE + "upsampler"}),
    "mask_dim_256": ("quickstart", {ARCHITECTURE + "mask_dim"}),
    "mask_dim_512": ("quickstart", {ARCHITECTURE + "mask_dim"}),
    "prompts_pooled": ("quickstart", {ARCHITECTURE + "visual_prompts"}),
    "prompts_off": ("quickstart", {ARCHITECTURE + "visual_prompts"}),
    "prompts_unprojected": ("quickstart", {ARCHITECTURE + "prompt_projection"}),
    "attention_causal": ("quickstart", {ARCHITECTURE + "image_attention"}),
    "patch_14": ("quickstart", {ARCHITECTURE + "patch_size"}),
    "patch_32": ("quickstart", {ARCHITECTURE + "patch_size"}),
    "text_factor_1": ("quickstart", {"loss.text_factor_with_masks"}),
    "language_blind": ("quickstart", HIDDEN),
    "image_blind": ("quickstart", HIDDEN),
    "ladder_1_baseline": ("refshapes_ladder", {ARCHITECTURE + "mask_stride", ARCHITECTURE + "visual_prompts"}),
    "ladder_2_upsampler": ("refshapes_ladder", {ARCHITECTURE + "visual_prompts"}),
    "ladder_3_prompts": ("refshapes_ladder", set()),
    "ladder_4_distillation": ("refshapes_ladder", {"experts.ours"}),
}
"""Ablation -> the experiment it is meant for, and the leaves in which it differs from it."""


@pytest.mark.parametrize("ablation", names("ablation"))
def test_every_ablation_changes_exactly_the_leaves_it_names(ablation):
    experiment, leaves = CHANGES[ablation]
    base = load_config("train", TrainConfig, [f"experiment={experiment}"])
    changed = load_config("train", TrainConfig, [f"experiment={experiment}", f"ablation={ablation}"])
    assert {key for key, _ in differing_leaves(asdict(base), asdict(changed))} == leaves
    bind_targets(changed.data.sources)
    bind_targets({name: own.model for name, own in changed.experts.items()})
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(changed.model.architecture))
    assert sum(p.numel() for p in model.parameters()) == sum(parameter_counts(changed.model.architecture, {}).values())

"""Model and processor from the config.

Place in the flow: `training/loop.py` calls `build_model` before the accelerator wraps anything. Starting weights are
random, drawn from the run's seed, or come from an exported folder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from pixel_sail.config import ConfigError, LoraConfig, ModelConfig, matching
from pixel_sail.experts.settings import ExpertSettings
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.lora import LINEAR, add_lora
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import load_tokenizer, model_token_ids


def build_model(
    config: ModelConfig, *, seed: int, experts: Mapping[str, ExpertSettings]
) -> tuple[PixelSailForSegmentation, PixelSailProcessor]:
    """Return the model in training mode (float32), with a linear layer for each expert and low-rank adapters
    where they are configured, and the processor that fits it.

    Raises: ConfigError when `init_from` has other sizes than `architecture`, or an adapter has nothing to adapt.
    """
    architecture = config.architecture
    tokenizer = load_tokenizer(config.tokenizer, num_visual_prompts=architecture.num_visual_prompts)
    architecture.vocab_size = -(-len(tokenizer) // config.vocab_multiple) * config.vocab_multiple
    architecture.token_ids = model_token_ids(tokenizer, num_visual_prompts=architecture.num_visual_prompts)
    wanted = PixelSailConfig.from_architecture(architecture)
    processor = PixelSailProcessor.for_model(tokenizer, wanted)
    if config.init_from is None:
        set_seed(seed)
        model = PixelSailForSegmentation(wanted)
    else:
        model = _load_start(config.init_from, architecture)
    add_training_parts(model, config.lora, seed=seed, experts=experts)
    return model.train(), processor


def add_training_parts(
    model: PixelSailForSegmentation, lora: LoraConfig, *, seed: int, experts: Mapping[str, ExpertSettings]
) -> None:
    """Give a model what only training needs: a linear layer for each expert, and low-rank adapters."""
    if experts:
        sites = {name: DistillSite(site=own.site, channels=own.channels) for name, own in experts.items()}
        model.add_distill_head(sites, seed=seed)
    if lora.rank:
        add_lora(model, lora_targets(model, lora), rank=lora.rank, alpha=lora.alpha, seed=seed)


def lora_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the linear layers to be adapted. Raises: ConfigError when a pattern matches none."""
    # The text head is left out: its weight may be the token embedding's.
    linear = [name for name, module in model.named_modules() if type(module) in LINEAR and name != "lm_head"]
    chosen = {name for pattern in config.targets for name in matching("model.lora.targets", pattern, linear)}
    return [name for name in linear if name in chosen]


def _load_start(folder: str, architecture: Architecture) -> PixelSailForSegmentation:
    """Return the model of an exported folder; ConfigError when it has other sizes than are configured."""
    model = load_model(Path(folder), dtype=torch.float32)
    differing = {
        name: (getattr(model.config, name), value)
        for name, value in vars(architecture).items()
        if getattr(model.config, name) != value
    }
    if differing:
        raise ConfigError(f"model.init_from {folder}: (found, configured) differ in {differing}")
    return model

"""Builds model and processor from the config.

`training/prepare.py` calls `build_model` before the accelerator wraps anything. Initial weights are random (the run's
seed, `model.init`) or are loaded from an exported folder, whose decoder and vocabulary must match the configuration.
Settings without weights follow the configuration, and parts with other shapes are randomly initialized if
`model.init_fresh` lists them. For example an upsampler of one block on a base with two:

    build_model(ModelConfig(init_from="runs/base", init_fresh=["mask_head"],
                            architecture=Architecture(mask_stride=8, ...), ...), seed=0, teachers={})
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from pixel_sail.config import FRESH_PARTS, ConfigError, LoraConfig, ModelConfig, matching
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.lora import LINEAR, add_lora
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import load_tokenizer, model_token_ids
from pixel_sail.types import DataError

logger = logging.getLogger(__name__)

SETTINGS = ("attention", "visual_prompts", "max_long_side", "initializer_range")
"""Fields of an architecture that no loaded weight depends on; the configuration decides."""

DESIGN = ("mask_stride", "upsampler", "mask_dim", "prompt_projection", "patch_size", "patch_hidden_size")
"""Fields that only affect the weights of `FRESH_PARTS`. All others must match the loaded model."""

NAMES = {
    "mask_head": r"mask_head\.",
    "prompt_projection": r"patch_embedding\.prompt_projection\.",
    "patch_embedding": r"patch_embedding\.(?!prompt_projection\.)",
}
"""Part -> regular expression of its weights' names."""


def build_model(
    config: ModelConfig, *, seed: int, teachers: Mapping[str, TeacherSettings]
) -> tuple[PixelSailForSegmentation, PixelSailProcessor]:
    """Return the model in training mode (float32) and its processor. The model includes a linear layer for each
    teacher, and low-rank adapters if they are configured.

    Raises: ConfigError if `init_from` does not fit `architecture`, or an adapter pattern matches no layer.
    """
    architecture = config.architecture
    tokenizer = configured_tokenizer(config)
    architecture.vocab_size = -(-len(tokenizer) // config.vocab_multiple) * config.vocab_multiple
    architecture.token_ids = model_token_ids(tokenizer, num_visual_prompts=architecture.num_visual_prompts)
    wanted = PixelSailConfig.from_architecture(architecture)
    processor = PixelSailProcessor.for_model(tokenizer, wanted)
    if config.init_from is None:
        model = _initialized(wanted, init=config.init, seed=seed)
    else:
        model = _load_start(config, wanted, seed=seed)
    add_training_parts(model, config.lora, seed=seed, teachers=teachers, init=config.init)
    return model.train(), processor


def _initialized(wanted: PixelSailConfig, *, init: str, seed: int) -> PixelSailForSegmentation:
    """Return a model with random weights; weights that `init` does not affect are the same for all its values."""
    set_seed(seed)
    model = PixelSailForSegmentation(wanted)
    if init != "ours":
        model.mask_head.init_weights(init)
    return model


def configured_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the configured tokenizer. Raises: ConfigError if it is missing or cannot be read."""
    try:
        return load_tokenizer(config.tokenizer, num_visual_prompts=config.architecture.num_visual_prompts)
    except DataError as error:
        raise ConfigError(f"model.tokenizer={config.tokenizer}: {error}") from error


def add_training_parts(
    model: PixelSailForSegmentation,
    lora: LoraConfig,
    *,
    seed: int,
    teachers: Mapping[str, TeacherSettings],
    init: str = "ours",
) -> None:
    """Add what only training needs to a model: a linear layer for each teacher, and low-rank adapters."""
    if teachers:
        sites = {name: DistillSite(site=own.site, channels=own.channels) for name, own in teachers.items()}
        model.add_distill_head(sites, seed=seed, init=init)
    if lora.rank:
        add_lora(model, lora_targets(model, lora), rank=lora.rank, alpha=lora.alpha, seed=seed)


def lora_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the linear layers to adapt. Raises: ConfigError if a pattern matches none."""
    # The text head is excluded, as its weight may be the token embedding's.
    linear = [name for name, module in model.named_modules() if type(module) in LINEAR and name != "lm_head"]
    chosen = {name for pattern in config.targets for name in matching("model.lora.targets", pattern, linear)}
    return [name for name in linear if name in chosen]


def _load_start(config: ModelConfig, wanted: PixelSailConfig, *, seed: int) -> PixelSailForSegmentation:
    """Return a model as configured with the weights of an exported folder.

    Raises: ConfigError when its decoder or vocabulary is another one, or a part does not fit and `init_fresh` does not
    name it; ValueError when its weights are not those that its own config.json asks for.
    """
    assert config.init_from is not None
    where = f"model.init_from {config.init_from}"
    try:
        start = load_model(Path(config.init_from), dtype=torch.float32)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
    differing = {
        name: (getattr(start.config, name), value)
        for name, value in vars(config.architecture).items()
        if getattr(start.config, name) != value
    }
    if not differing:
        if config.init != "ours":
            logger.info("%s: all weights are taken, model.init=%s initializes none of them", where, config.init)
        return start
    fixed = {name: pair for name, pair in differing.items() if name not in (*SETTINGS, *DESIGN)}
    if fixed:
        raise ConfigError(
            f"{where}: (found, configured) differ in {fixed}, which no weights can be carried over to; set "
            "model.architecture and model.tokenizer to what was found, or start from another folder"
        )
    weights = start.state_dict()
    # Neither layers nor words have a part in what may be initialized.
    small = replace(config.architecture, num_hidden_layers=1, vocab_size=1)
    with torch.device("meta"):
        shaped = PixelSailForSegmentation(PixelSailConfig.from_architecture(small)).state_dict()
    unfit = [part for part in FRESH_PARTS if _shapes(weights, part) != _shapes(shaped, part)]
    if refused := [part for part in unfit if part not in config.init_fresh]:
        raise ConfigError(
            f"{where}: its weights do not fit in {refused}; (found, configured) differ in {differing}. Configure what "
            f"was found, start from a folder of this design, or set model.init_fresh=[{','.join(unfit)}] to initialize "
            "these parts randomly"
        )
    kept = {name: tensor for name, tensor in weights.items() if not any(_is_of(part, name) for part in unfit)}
    initialized = {}
    if unfit:
        fresh = _initialized(PixelSailConfig.from_architecture(small), init=config.init, seed=seed).state_dict()
        initialized = {name: tensor for name, tensor in fresh.items() if any(_is_of(part, name) for part in unfit)}
    logger.info("%s: (found, configured) differ in %s", where, differing)
    logger.info(
        "%s: not loaded %s, randomly initialized %s", where, sorted(weights.keys() - kept.keys()), sorted(initialized)
    )
    # Loading is strict: missing or unexpected weights raise with their names.
    model = PixelSailForSegmentation.from_pretrained(
        None, config=wanted, state_dict=kept | initialized, dtype=torch.float32
    )
    assert isinstance(model, PixelSailForSegmentation)
    return model


def _is_of(part: str, name: str) -> bool:
    """Return whether a weight belongs to a part."""
    return re.match(NAMES[part], name) is not None


def _shapes(weights: Mapping[str, Tensor], part: str) -> dict[str, torch.Size]:
    """Return the names and shapes of a part's weights."""
    return {name: tensor.shape for name, tensor in weights.items() if _is_of(part, name)}

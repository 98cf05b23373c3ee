"""The architecture of a converted model: decoder sizes from `config.json`, the rest from tensor shapes or options.

`convert` builds the target's configuration with it. Example, Qwen2.5-0.5B as a new base:

    {"hidden_size": 896, "num_attention_heads": 14, ...} + Chosen(mask_dim=256)  ->  Architecture(hidden_size=896, ...)
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_sail.conversion.sources import TensorInfo
from pixel_sail.model.configuration_pixel_sail import EXPERT_PARTS, Architecture
from pixel_sail.types import DataError

COPIED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)


DEFAULT_SIZES: dict[str, dict[str, Any]] = {
    "sail": {"patch_size": 16, "mask_stride": 4, "mask_dim": 512, "max_long_side": 1024, "attention": "prefix"},
    "eve": {"patch_size": 32, "mask_stride": 4, "mask_dim": 256, "max_long_side": 800, "attention": "causal"},
}
"""Defaults by base of the architecture for sizes that neither the checkpoint nor an option determines. Same values as
in `configs/model/`, so that training with one of those files needs no further options."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options that a base does not determine. None: as in the checkpoint's tensors, otherwise `DEFAULT_SIZES`."""

    patch_size: int | None = None
    """Pixels."""
    mask_stride: int | None = None
    mask_dim: int | None = None
    max_long_side: int | None = None
    attention: str | None = None
    """prefix: the patches of an image attend to each other. causal: to earlier ones only, as SOLO was trained. EVEv2
    is always causal."""
    num_visual_prompts: int = 15
    vocab_multiple: int = 64
    seed: int = 0
    """Seed of all initialized parameters."""
    init: str = "ours"
    """Initialization of a new mask head: ours or torch, as `model.init`."""


def read_base_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a language model. Raises: DataError if missing or an unsupported decoder."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        lacking = [name for name in COPIED_SIZES if name not in config and name != "tie_word_embeddings"]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: found no readable configuration ({error}), expected that of the language model; set --base to "
            "its folder"
        ) from error
    if lacking:
        raise DataError(f"{path}: {lacking} are missing, expected the sizes of a decoder; check --base")
    _check_kind(path, config)
    return config


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raise DataError for an unsupported decoder."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    expected = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope type": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "head_dim": (config.get("head_dim") or head_dim, head_dim),
        "use_sliding_window": (bool(config.get("use_sliding_window")), False),
    }
    differing = [f"{name} {found!r}, expected {ours!r}" for name, (found, ours) in expected.items() if found != ours]
    if scaling.get("rope_type", scaling.get("type")) == "mrope":
        differing = [text for text in differing if not text.startswith("rope type")]
    if differing:
        raise DataError(f"{path}: {'; '.join(differing)}; such a decoder cannot be converted")


def decoder_remarks(config: Mapping[str, Any]) -> list[str]:
    """Return remarks about the decoder for the report."""
    window = config.get("sliding_window")
    if window and not config.get("use_sliding_window", True):
        window = None
    return [f"sliding_window {window} is not applied: longer sequences see more than in training"] if window else []


def base_architecture(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], chosen: Chosen) -> Architecture:
    """Return the architecture of a base. Vocabulary and token ids are set later.

    `infos`: tensors under our names. Raises: DataError if they contradict an option.
    """
    fields = {name: config[name] for name in COPIED_SIZES if name in config}
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        raise DataError("config.json: rope_theta is missing, expected the base of the rotary frequencies; add it")
    fields |= {
        "rope_theta": float(theta),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "attention_bias": "decoder.layers.0.self_attn.q_proj.bias" in infos,
        "num_visual_prompts": chosen.num_visual_prompts,
    }
    shown = _shown(infos)
    defaults = DEFAULT_SIZES[shown.get("base", "sail")]
    given = {name: value for name in defaults if (value := getattr(chosen, name)) is not None}
    _check_given(given, shown)
    return Architecture(**(fields | defaults | given | shown))


def _check_given(given: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Raise DataError for options that contradict the checkpoint."""
    differing = [
        f"--{name.replace('_', '-')} {value} given, the checkpoint has {shown[name]}"
        for name, value in given.items()
        if shown.get(name, value) != value
    ]
    if differing:
        raise DataError(f"{'; '.join(differing)}: expected the value of its tensors; remove the option")


def _shown(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the fields of an architecture that the tensors determine, except the decoder's."""
    shown: dict[str, Any] = {}
    patches = infos.get("patch_embedding.patch_projection.weight")
    if patches is not None and len(patches.shape) == 2:
        shown["patch_size"] = math.isqrt(patches.shape[1] // 3)
    pieces = infos.get("patch_embedding.piece_projection.weight")
    if pieces is not None and len(pieces.shape) == 4:
        shown |= _eve_fields(pieces, infos)
    last = infos.get("mask_head.pixel_projector.2.weight")
    if last is not None:
        shown["mask_dim"] = last.shape[0]
        found = (re.match(r"mask_head\.upsampler\.blocks\.(\d+)\.", name) for name in infos)
        blocks = 1 + max((int(match[1]) for match in found if match), default=-1)
        if "patch_size" in shown:
            shown["mask_stride"] = max(1, math.ceil(shown["patch_size"] / 2**blocks))
    return shown


def _eve_fields(pieces: TensorInfo, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the fields that the tensors of an EVEv2 base determine: patch size and parts with separate image weights.

    Attention is always causal, because text precedes the image.
    """
    own = {name.removeprefix("decoder.layers.0.image.").split(".")[0] for name in infos if ".layers.0.image." in name}
    kinds = {"layernorm" if name.endswith("layernorm") else name for name in own}
    return {
        "base": "eve",
        "attention": "causal",
        "patch_size": 2 * pieces.shape[2],
        "patch_hidden_size": pieces.shape[0],
        "modality_experts": [part for part in EXPERT_PARTS if part in kinds],
    }

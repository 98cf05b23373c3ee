"""Limits of the released code: which of our models it can compute, and which settings it needs besides the weights.

`convert` checks them before a conversion to the release. The released code has its own configuration and loads weights
with strict=False, so a model that does not fit would be computed differently without an error:

    Architecture(attention="causal", ...)   ->  DataError: attention 'causal', expected 'prefix' (the tokens ..)
    Architecture(base="eve", ...)           ->  remark: build it with seg_pred_down_ratio=8 and moe_part=[..]

Source: bytedance/Sa2VA 9832e1a, sa2va_eval/projects/ST, models/sa2va_ST.py and models/sa2va_ST_eve.py.
"""

from pathlib import Path
from typing import Any

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.types import DataError

Limit = tuple[str, Any, str]
"""Field or property of an architecture, the only value the release supports, and why."""


def check_released(path: Path, config: Architecture) -> None:
    """Raise DataError for a model that the released code cannot build or would compute differently."""
    limits = _eve_limits(config) if config.base == "eve" else _sail_limits(config)
    differing = [
        f"{name} {getattr(config, name)!r}, expected {expected!r} ({why})"
        for name, expected, why in limits
        if getattr(config, name) != expected
    ]
    if differing:
        raise DataError(
            f"{path}: found {'; '.join(differing)}: the released code supports nothing else and silently skips weights "
            "that do not fit; train with these settings to convert to the release"
        )


def released_remarks(config: Architecture) -> tuple[str, ...]:
    """Return the model-dependent settings that the release's own configuration needs."""
    if config.base != "eve":
        return ()
    return (
        f"build the released EVE model with seg_pred_down_ratio={config.patch_size // 2 ** _halvings(config)}, and its "
        f"base with moe_part={list(config.modality_experts)} (add_moe={bool(config.modality_experts)}): other values "
        "skip weights silently",
        "the released EVE code cannot predict with visual prompts",
    )


def _sail_limits(config: Architecture) -> list[Limit]:
    """Return the limits for the SAIL base."""
    blocks = 1
    while config.patch_size / 2 ** (blocks - 1) > 4:
        blocks += 1
    limits: list[Limit] = [
        ("attention", "prefix", "the tokens of an image always see each other"),
        ("attention_bias", True, "queries, keys and values always have a bias"),
        ("num_upsample_blocks", blocks, f"fixed for patches of {config.patch_size}; mask_stride decides it here"),
        ("upsampler", "transposed", "its blocks are transposed convolutions"),
    ]
    if config.num_visual_prompts:
        limits += [
            ("visual_prompts", "injection", "a prompt is always added to the patches it covers"),
            ("prompt_projection", True, "prompts always go through vp_embed"),
        ]
    return limits


def _eve_limits(config: Architecture) -> list[Limit]:
    """Return the limits for the EVE base. `Architecture` itself allows no other attention and prompts."""
    limits: list[Limit] = [
        ("attention_bias", True, "queries, keys and values always have a bias"),
        ("num_upsample_blocks", max(1, config.num_upsample_blocks), "there is always one; mask_stride decides it here"),
        ("upsampler", "transposed", "its blocks are transposed convolutions"),
    ]
    if config.hidden_size == config.feature_size:
        limits.append(("hidden_size", f"> {config.feature_size}", "image_feature_pre_projector is always there"))
    return limits


def _halvings(config: Architecture) -> int:
    """Return how many times the release halves a patch until its stride is at most seg_pred_down_ratio."""
    return config.num_upsample_blocks - 1

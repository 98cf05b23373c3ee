"""Conversion of the released code's state dict into ours, strict in both directions.

`tools/check_parity.py` and checkpoint conversion call `convert_release_state`. Keys are mapped by a table, embedding
rows by token name, because the order in which the release appends its tokens differs between its configs:

    single_transformer.model.layers.0.self_attn.q_proj.weight  ->  decoder.layers.0.self_attn.q_proj.weight
    upsample_blocks.1.2.depthwise.bias                         ->  mask_head.upsampler.blocks.1.depthwise.bias
    row 503 ("[SEG]" there)                                    ->  row 151668 ("[SEG]" here)
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.types import DataError

KEY_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"single_transformer\.model\.embed_tokens\.(.+)", r"embed_tokens.\1"),
    (r"single_transformer\.model\.layers\.((?:(?!moe_).)+)", r"decoder.layers.\1"),
    (r"single_transformer\.model\.layers\.(\d+)\.(self_attn\.)?moe_(.+)", r"decoder.layers.\1.image.\2\3"),
    (r"single_transformer\.model\.norm\.(.+)", r"decoder.norm.\1"),
    (r"single_transformer\.model\.vis_embed\.(.+)", r"patch_embedding.patch_projection.\1"),
    (r"single_transformer\.model\.vp_embed\.(.+)", r"patch_embedding.prompt_projection.\1"),
    (r"single_transformer\.model\.vision_tower\.patch_embedding\.0\.(.+)", r"patch_embedding.piece_projection.\1"),
    (r"single_transformer\.model\.vision_tower\.patch_embedding\.2\.(.+)", r"patch_embedding.patch_projection.\1"),
    (r"single_transformer\.model\.vision_tower\.class_embedding", r"patch_embedding.class_embedding"),
    (r"single_transformer\.model\.vision_tower\.split_embedding", r"patch_embedding.row_end_embedding"),
    (r"single_transformer\.lm_head\.(.+)", r"lm_head.\1"),
    (r"image_feature_pre_projector\.(.+)", r"mask_head.pre_projector.\1"),
    (r"seg_token_projector\.(.+)", r"mask_head.seg_projector.\1"),
    (r"image_feature_projector\.(.+)", r"mask_head.pixel_projector.\1"),
    (r"upsample_blocks\.(\d+)\.0\.(.+)", r"mask_head.upsampler.blocks.\1.transposed.\2"),
    (r"upsample_blocks\.(\d+)\.2\.(depthwise|pointwise)\.(.+)", r"mask_head.upsampler.blocks.\1.\2.\3"),
    (r"upsample_blocks\.(\d+)\.3\.ln\.(.+)", r"mask_head.upsampler.blocks.\1.norm.\2"),
)
"""Released key -> ours. Source: bytedance/Sa2VA 9832e1a, sa2va_eval/projects/ST, state dicts of the SAIL and of the EVE
model."""

UNUSED_KEYS = frozenset({"single_transformer.vp_embed.weight"})
"""Released parameters of the EVE model that no output depends on."""

TOKEN_ROWS = ("embed_tokens.weight", "lm_head.weight")
"""Parameters whose rows belong to tokens."""

DROPPED_TOKENS = frozenset({"<NO_Prompt>"})
"""Released tokens that never occur in inputs, so a vocabulary may lack them."""


def our_key(released_key: str) -> str:
    """Return our name of a released parameter. Raises: ValueError for an unknown name."""
    for pattern, replacement in KEY_PATTERNS:
        if re.fullmatch(pattern, released_key):
            return re.sub(pattern, replacement, released_key)
    raise DataError(
        f"released state dict: unknown key {released_key!r}; expected a Pixel-SAIL checkpoint "
        "(single_transformer.*, upsample_blocks.*, image_feature_projector.*, seg_token_projector.*)"
    )


def row_sources(
    source_tokens: Mapping[str, int], target_tokens: Mapping[str, int], *, source_rows: int, target_rows: int
) -> Tensor:
    """Return for each target row the source row to copy, -1 for rows that no token uses.

    Tokens are matched by name. An id without a name on either side maps to itself.
    Raises: DataError for a token that exists on one side only (`DROPPED_TOKENS` may be missing in the target).
    """
    lost = set(source_tokens) - set(target_tokens) - DROPPED_TOKENS
    invented = set(target_tokens) - set(source_tokens)
    if lost or invented:
        raise DataError(
            f"vocabularies differ: {sorted(lost)[:10]} only in the checkpoint, {sorted(invented)[:10]} only in the "
            "target; give the tokenizer the checkpoint was trained with"
        )
    sources = torch.full((target_rows,), -1, dtype=torch.long)
    shared = min(source_rows, target_rows)
    sources[:shared] = torch.arange(shared)
    # First remove the identity mapping of ids named on either side, then map every name to its own row.
    for index in {*source_tokens.values(), *target_tokens.values()}:
        if index < target_rows:
            sources[index] = -1
    for token, index in target_tokens.items():
        sources[index] = source_tokens[token]
    return sources


def convert_release_state(
    released: Mapping[str, Tensor],
    model: PixelSailForSegmentation,
    *,
    source_tokens: Mapping[str, int],
    target_tokens: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return a complete state dict of `model` made from a released one.

    A tied text head may be absent; if present it must equal the embedding. Rows that no token uses (padding of the
    vocabulary) become zero.
    Raises: DataError for unknown, missing, duplicate or misshapen tensors, naming all of them.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in released.items():
        if key in UNUSED_KEYS:
            continue
        name = our_key(key)
        if name in TOKEN_ROWS:
            tensor = _place_rows(tensor, source_tokens, target_tokens, model.config.vocab_size)
        state[name] = tensor
    embedding = state.get("embed_tokens.weight")
    if embedding is not None and model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", embedding)
    if model.config.tie_word_embeddings and not torch.equal(state["lm_head.weight"], state["embed_tokens.weight"]):
        raise DataError("released state dict: lm_head differs from embed_tokens, but tie_word_embeddings is true")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown {name} {found[name]}" for name in sorted(found.keys() - expected.keys())]
    shared = sorted(expected.keys() & found.keys())
    problems += [f"{n}: found {found[n]}, expected {expected[n]}" for n in shared if found[n] != expected[n]]
    if problems:
        raise DataError("released state dict does not fit the model: " + "; ".join(problems[:20]))
    return state


def _place_rows(
    rows: Tensor, source_tokens: Mapping[str, int], target_tokens: Mapping[str, int], target_rows: int
) -> Tensor:
    """Return `rows` reordered by token name, zero for rows without a token."""
    sources = row_sources(source_tokens, target_tokens, source_rows=rows.shape[0], target_rows=target_rows)
    placed = rows[sources.clamp_min(0)].clone()
    placed[sources < 0] = 0
    return placed

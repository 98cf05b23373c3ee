"""Name tables of all checkpoint layouts.

`plan` looks up every key. One `Layout` per value of `--from`:

    release    single_transformer.model.layers.0.self_attn.q_proj.weight   ->  decoder.layers.0.self_attn.q_proj.weight
    sail       model.vis_embed.weight                                      ->  patch_embedding.patch_projection.weight
    evev2      model.layers.0.moe_mlp.up_proj.weight                       ->  decoder.layers.0.image.mlp.up_proj.weight
    solo       model.embed_vision_patch.weight                             ->  patch_embedding.patch_projection.weight
    qwen2      lm_head.weight                                              ->  lm_head.weight
"""

import re
from dataclasses import dataclass

from pixel_sail.model.convert import KEY_PATTERNS, our_key
from pixel_sail.types import DataError

RELEASE_PREFIX = r"single_transformer\."
PATCHES, PROMPTS, HEAD = r"patch_embedding\..+", r"patch_embedding\.prompt_projection\..+", r"mask_head\..+"
"""Patterns of our parameters."""

_RECOMPUTED = (r"(.+\.)?rotary_emb\.inv_freq", "computed from rope_theta")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one checkpoint layout."""

    name: str
    keys: tuple[tuple[str, str], ...]
    """Their key -> ours."""
    dropped: tuple[tuple[str, str], ...] = (_RECOMPUTED,)
    """Pattern of unused keys -> why they are dropped."""
    initialised: tuple[tuple[str, str], ...] = ()
    """Pattern of our parameters that the layout may lack -> why."""


def _with_prefix(prefix: str, *, text_only: bool = False) -> tuple[tuple[str, str], ...]:
    """Return the entries of the release's table below `single_transformer` with another prefix."""
    rows = [(key.removeprefix(RELEASE_PREFIX), ours) for key, ours in KEY_PATTERNS if key.startswith(RELEASE_PREFIX)]
    return tuple((prefix + key, ours) for key, ours in rows if not text_only or not ours.startswith("patch_embedding"))


_NO_PROMPTS = (PROMPTS, "the base has no visual prompts")
_NO_HEAD = (HEAD, "the base has no mask head")

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="release",
            keys=KEY_PATTERNS,
            dropped=(
                _RECOMPUTED,
                (r"(mask2former|sam2|radio)_(model|distill_linear)\..+", "only training with teachers uses it"),
                (r"single_transformer\.vp_embed\.weight", "no output of the released model depends on it"),
            ),
        ),
        Layout(name="sail", keys=_with_prefix(""), initialised=(_NO_PROMPTS, _NO_HEAD)),
        Layout(
            name="solo",
            keys=(
                *_with_prefix("", text_only=True),
                (r"model\.embed_vision_patch\.(.+)", r"patch_embedding.patch_projection.\1"),
            ),
            initialised=(_NO_PROMPTS, _NO_HEAD),
        ),
        Layout(name="evev2", keys=_with_prefix(""), initialised=(_NO_HEAD,)),
        Layout(
            name="qwen2",
            keys=_with_prefix("", text_only=True),
            initialised=((PATCHES, "the base reads text only"), _NO_HEAD),
        ),
    )
}
"""By the value of `--from`."""


def find_layout(name: str) -> Layout:
    """Return a layout. Raises: DataError for an unknown name."""
    if name not in LAYOUTS:
        raise DataError(f"--from {name}: found no table of its keys, expected one of {sorted(LAYOUTS)}")
    return LAYOUTS[name]


def renamed(layout: Layout, key: str) -> str | None:
    """Return our name of a key, None if the layout does not have it."""
    for pattern, ours in layout.keys:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return None


def layout_reason(table: tuple[tuple[str, str], ...], key: str) -> str | None:
    """Return why a key is dropped or initialized, None if it is neither."""
    return next((why for pattern, why in table if re.fullmatch(pattern, key)), None)


def released_key(ours: str, *, base: str) -> str:
    """Return the release's name of one of our parameters. Raises: DataError if the release does not have it.

    base: of the architecture. The name of `patch_embedding.patch_projection` depends on it.
    """
    for pattern, released in (*RELEASED_IMAGE_KEYS[base], *RELEASED_KEYS):
        if re.fullmatch(pattern, ours):
            key = re.sub(pattern, released, ours)
            # Both tables are written by hand. A change of only one must not rename a weight silently.
            if our_key(key) != ours:
                raise DataError(f"{ours}: becomes {key} in the release, which comes back as {our_key(key)}")
            return key
    raise DataError(
        f"{ours}: the release has no such parameter with base {base}, expected parameters of a model that it can "
        "build; train with the settings of configs/model/"
    )


RELEASED_KEYS: tuple[tuple[str, str], ...] = (
    (r"embed_tokens\.(.+)", r"single_transformer.model.embed_tokens.\1"),
    (r"decoder\.(layers|norm)\.(.+)", r"single_transformer.model.\1.\2"),
    (r"lm_head\.(.+)", r"single_transformer.lm_head.\1"),
    (r"mask_head\.pre_projector\.(.+)", r"image_feature_pre_projector.\1"),
    (r"mask_head\.seg_projector\.(.+)", r"seg_token_projector.\1"),
    (r"mask_head\.pixel_projector\.(.+)", r"image_feature_projector.\1"),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.transposed\.(.+)", r"upsample_blocks.\1.0.\2"),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.(depthwise|pointwise)\.(.+)", r"upsample_blocks.\1.2.\2.\3"),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.norm\.(.+)", r"upsample_blocks.\1.3.ln.\2"),
)
"""Ours -> released key, the inverse of `KEY_PATTERNS` for parameters of both bases."""

RELEASED_IMAGE_KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "sail": (
        (r"patch_embedding\.patch_projection\.(.+)", r"single_transformer.model.vis_embed.\1"),
        (r"patch_embedding\.prompt_projection\.(.+)", r"single_transformer.model.vp_embed.\1"),
    ),
    "eve": (
        (r"patch_embedding\.piece_projection\.(.+)", r"single_transformer.model.vision_tower.patch_embedding.0.\1"),
        (r"patch_embedding\.patch_projection\.(.+)", r"single_transformer.model.vision_tower.patch_embedding.2.\1"),
        (r"patch_embedding\.class_embedding", "single_transformer.model.vision_tower.class_embedding"),
        (r"patch_embedding\.row_end_embedding", "single_transformer.model.vision_tower.split_embedding"),
        (r"decoder\.layers\.(\d+)\.image\.(self_attn\.)?(.+)", r"single_transformer.model.layers.\1.\2moe_\3"),
    ),
}
"""The same for image embeddings, by base. These take precedence."""

"""Bytes that the forward pass of one micro-batch keeps for its backward pass.

Place in the flow: `memory.py` adds them to weights, gradients and moments. Every term names what autograd saves, as the
modules of `pixel_sail/model` are written; a test counts the same with `saved_tensors_hooks`. Parameters do not count,
a storage that is saved twice counts once.

    0.5B model, one row of 5,208 tokens with eight masks, bf16, in GB: decoder 5.81, dense masks 0, text head 0.0004,
    mask head 0.50, mask losses 0.004; computed in the obvious way 7.61, 0.05, 0.12, 0.54, 0.004

Letters in comments: T tokens, D width, I width of the SwiGLU, A heads, V vocabulary, C channels of the upsampler.
"""

from dataclasses import dataclass

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.speed import Speed
from pixel_sail.planning.workload import Workload

FLOAT32 = 4
POINT_TENSORS = 9
"""float32 values kept per sampled point and mask: its place (2), logit, target, and what the losses make of them."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes kept by part."""

    decoder: float
    dense_masks: float
    """The attention mask as numbers, which all layers share."""
    text_head: float
    mask_head: float
    mask_losses: float

    @property
    def total(self) -> float:
        """Return all of them."""
        return sum(vars(self).values())


def activation_bytes(
    architecture: Architecture,
    work: Workload,
    *,
    element: int,
    num_points: int,
    checkpointing: bool,
    speed: Speed | None = None,
) -> Activations:
    """Return what one micro-batch keeps, with `element` bytes per number (4 or 2), computed as `speed` says (None: the
    default).

    With activation checkpointing a layer keeps its input only, and one layer at a time is computed again.
    """
    speed = speed if speed is not None else Speed()
    layers = architecture.num_hidden_layers
    tokens = work.rows * work.tokens_per_row
    residual = tokens * architecture.hidden_size * element
    layer = layer_bytes(architecture, work, element, speed)
    mask = work.rows * work.tokens_per_row**2 * element if speed.attention == "dense" else 0
    logits = architecture.vocab_size if speed.text_loss == "plain" else 0
    kept_layers = layers * residual + layer if checkpointing else layers * layer
    ends = norm_bytes(architecture, tokens, element) + _embedding_bytes(architecture, work, element)
    return Activations(
        decoder=kept_layers + ends,
        dense_masks=mask,
        text_head=work.supervised * (architecture.hidden_size * element + (logits + 1) * FLOAT32),
        mask_head=mask_head_bytes(architecture, work, element, speed),
        mask_losses=float(work.num_masks * num_points * POINT_TENSORS * FLOAT32),
    )


def norm_bytes(architecture: Architecture, tokens: int, element: int) -> float:
    """Return what an RMSNorm keeps: its input in float32, the normalised values, and what the next layer reads."""
    return tokens * (architecture.hidden_size * (FLOAT32 + 2 * element) + FLOAT32)


def layer_bytes(architecture: Architecture, work: Workload, element: int, speed: Speed) -> float:
    """Return what one decoder layer keeps, the attention mask apart."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    tokens = work.rows * work.tokens_per_row
    if speed.attention == "dense":
        # Rotated queries, keys and values repeated for every head, and the mixed values.
        maps = 4 * width * tokens
    elif speed.attention == "flex":
        maps = (2 * width + 2 * architecture.num_key_value_heads * architecture.head_dim) * tokens
    else:
        # Rotated queries, the mixed values of each call and all of them in one row; keys and values of each call,
        # repeated for every head.
        maps = 3 * width * tokens + 2 * width * work.computed_keys
    # A log-sum per head.
    attention = maps * element + tokens * architecture.num_attention_heads * FLOAT32
    # Gate and the other half; plain also the gate after the activation, and their product.
    swiglu = tokens * (2 if speed.swiglu == "recomputed" else 4) * inner * element
    norms = 2 * norm_bytes(architecture, tokens, element)
    # Both weights on every token keep everything twice.
    mixed = architecture.modality_experts if speed.experts == "mixed" else ()
    return norms * (1 + ("layernorm" in mixed)) + attention + swiglu * (1 + ("mlp" in mixed))


def _embedding_bytes(architecture: Architecture, work: Workload, element: int) -> float:
    """Return what the entrance keeps: normalised patches, three index tables and the rotation of every token."""
    num_patches = sum(image.patches for image in work.images)
    patches = num_patches * 3 * architecture.patch_size**2 * element
    if architecture.base == "eve":
        # Four pieces of each patch, before and after GELU.
        patches += num_patches * 2 * 4 * architecture.patch_hidden_size * element
    tokens = work.rows * work.tokens_per_row
    return patches + tokens * (3 * 8 + 2 * architecture.head_dim * element)


def mask_head_bytes(architecture: Architecture, work: Workload, element: int, speed: Speed) -> float:
    """Return what upsampler and projections keep for the images that have masks, and the mask logits."""
    width, channels, mask_dim = architecture.hidden_size, architecture.feature_size, architecture.mask_dim
    total = 0.0
    for image in work.images:
        if not image.masks:
            continue
        cells = image.patches
        total += cells * width * element
        if width > channels:
            total += cells * (width + channels) * element
        for _ in range(architecture.num_upsample_blocks):
            cells *= 4
            # Before and after GELU, after each of two convolutions, after the norm; two statistics per cell.
            total += cells * (5 * channels * element + 2 * FLOAT32)
        total += cells * (channels + (mask_dim if speed.mask_head == "maps" else 0)) * element
        # The losses read the logits in float32.
        total += image.masks * cells * FLOAT32
    return total + work.num_masks * (width + channels + mask_dim) * element

"""Activation memory: bytes that the forward pass of one micro-batch saves for its backward pass.

`memory.py` adds them to weights, gradients and moments. Every term corresponds to tensors that autograd saves in the
modules of `pixel_sail/model`; a test verifies the sum with `saved_tensors_hooks`. Parameters do not count, and a
storage that is saved twice counts once. Images are assumed to be large: small ones save some megabytes more
(`SMALL_MAP` in model/upsampler.py).

    0.5B model, one row of 5,208 tokens with eight masks on two of four images, bf16, in GB: decoder 3.88 (4.90 with
    attention varlen), dense masks 0, text head 0.0004, mask head 0.25, mask losses 0.004; with plain kernels 7.61,
    0.05, 0.12, 0.54, 0.004

Letters in comments: T tokens, D width, I width of the SwiGLU, A heads, V vocabulary, C channels of the upsampler.
"""

from dataclasses import dataclass

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.kernels import Kernels
from pixel_sail.planning.workload import Workload

FLOAT32 = 4
POINT_TENSORS = 9
"""float32 values saved per sampled point and mask: coordinates (2), logit, target, and intermediates of the losses."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Saved bytes by part."""

    decoder: float
    dense_masks: float
    """The dense attention mask, shared by all layers."""
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
    checkpointing: str,
    kernels: Kernels | None = None,
) -> Activations:
    """Return the activation memory of one micro-batch with `element` bytes per number (4 or 2) and `kernels` (None: the
    default; attention `auto` is that of a CPU).

    With `checkpointing` (one of `CHECKPOINTING`) only the input of a layer, or of its feed-forward half, is saved, and
    one layer at a time is recomputed.
    """
    kernels = kernels if kernels is not None else Kernels()
    layers = architecture.num_hidden_layers
    tokens = work.rows * work.tokens_per_row
    residual = tokens * architecture.hidden_size * element
    half = feed_forward_bytes(architecture, tokens, element, kernels, checkpointing)
    attention = attention_bytes(architecture, work, element, kernels)
    kept = {
        "none": layers * (attention + half),
        "feed_forward": layers * (attention + residual) + half,
        "layers": layers * residual + attention + half,
    }
    mask = work.rows * work.tokens_per_row**2 * element if kernels.attention == "dense" else 0
    logits = architecture.vocab_size if kernels.text_loss == "plain" else 0
    ends = norm_bytes(architecture, tokens, element, kernels) + _embedding_bytes(architecture, work, element)
    return Activations(
        decoder=kept[checkpointing] + ends,
        dense_masks=mask,
        text_head=work.supervised * (architecture.hidden_size * element + (logits + 1) * FLOAT32),
        mask_head=mask_head_bytes(architecture, work, element, kernels),
        mask_losses=float(work.num_masks * num_points * POINT_TENSORS * FLOAT32),
    )


def norm_bytes(architecture: Architecture, tokens: int, element: int, kernels: Kernels) -> float:
    """Return the bytes saved by an RMSNorm: its input, one number per token, and its output. The plain kernel also
    saves the normalized values and the input in float32."""
    maps = 2 * element if kernels.recompute_elementwise else FLOAT32 + 2 * element
    return tokens * (architecture.hidden_size * maps + FLOAT32)


def attention_bytes(architecture: Architecture, work: Workload, element: int, kernels: Kernels) -> float:
    """Return the bytes saved by the attention half of a decoder layer with its norm, without the attention mask."""
    width, key_value = architecture.hidden_size, architecture.num_key_value_heads * architecture.head_dim
    tokens = work.rows * work.tokens_per_row
    if kernels.attention == "dense":
        # Rotated queries, keys and values repeated for every head, and the attention output.
        maps = 4 * width * tokens
    elif kernels.attention == "varlen":
        # Rotated queries, the attention output of images and of texts, and both in one row; keys and values, and again
        # those of texts in the order of their segments.
        maps = (3 * width + 2 * key_value) * tokens + 2 * key_value * work.computed_keys
    else:
        # Rotated queries, keys, values, and the attention output.
        maps = (2 * width + 2 * key_value) * tokens
    norm = norm_bytes(architecture, tokens, element, kernels)
    # Both weights on every token keep everything twice.
    mixed = architecture.modality_experts if kernels.experts == "mixed" else ()
    # A log-sum per head.
    return norm * (1 + ("layernorm" in mixed)) + maps * element + tokens * architecture.num_attention_heads * FLOAT32


def feed_forward_bytes(
    architecture: Architecture, tokens: int, element: int, kernels: Kernels, checkpointing: str
) -> float:
    """Return the bytes saved by the feed-forward half of a decoder layer with its norm."""
    # Gate and up projections; plain, and during recomputation, also the activated gate and the product.
    maps = 2 if kernels.recompute_elementwise and checkpointing == "none" else 4
    swiglu = tokens * maps * architecture.intermediate_size * element
    norm = norm_bytes(architecture, tokens, element, kernels)
    mixed = architecture.modality_experts if kernels.experts == "mixed" else ()
    return norm * (1 + ("layernorm" in mixed)) + swiglu * (1 + ("mlp" in mixed))


def _embedding_bytes(architecture: Architecture, work: Workload, element: int) -> float:
    """Return the bytes saved by the embeddings: normalized patches, three index tables and rotary angles per token."""
    num_patches = sum(image.patches for image in work.images)
    patches = num_patches * 3 * architecture.patch_size**2 * element
    if architecture.base == "eve":
        # Four pieces of each patch, before and after GELU.
        patches += num_patches * 2 * 4 * architecture.patch_hidden_size * element
    tokens = work.rows * work.tokens_per_row
    return patches + tokens * (3 * 8 + 2 * architecture.head_dim * element)


def mask_head_bytes(architecture: Architecture, work: Workload, element: int, kernels: Kernels) -> float:
    """Return the bytes saved by upsampler, projections and mask logits for the images with masks."""
    width, channels, mask_dim = architecture.hidden_size, architecture.feature_size, architecture.mask_dim
    # Per cell of a block the results of both products. Plain: before and after GELU, after each of two convolutions,
    # after the norm, and two statistics.
    is_thin = kernels.recompute_elementwise and kernels.mask_head != "maps"
    per_cell = 2 * channels * element if is_thin else 5 * channels * element + 2 * FLOAT32
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
            total += cells * per_cell
        total += cells * (channels + (mask_dim if kernels.mask_head == "maps" else 0)) * element
        # The losses use float32 logits.
        total += image.masks * cells * FLOAT32
    return total + work.num_masks * (width + channels + mask_dim) * element

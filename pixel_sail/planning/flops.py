"""FLOPs of one training step, by part.

`plan.py` calls `training_flops` on the micro-batches of a step. A multiply-add counts as two FLOPs. The backward pass
costs twice the forward pass (gradients of inputs and weights). Norms, activations, rotary embeddings and losses are
omitted, as they are memory-bound.

    forward of the 0.5B model on four images of 480 x 640 in one row of 5,208 tokens, in TFLOP: decoder 3.73,
    attention 0.54 (2.33 with a dense mask), text head 0.05, upsampler 0.15, mask head 0.06
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.kernels import Kernels
from pixel_sail.planning.parameters import UPSAMPLE_TAPS, teacher_width
from pixel_sail.planning.workload import Workload

BACKWARD_AND_FORWARD = 3

TEACHER_FLOPS = {
    "mask2former": (1.57e12, "Swin-L and pixel decoder, 800 x 1088"),
    "sam2": (1.82e12, "Hiera-L image encoder with its neck, 1024 x 1024"),
    "radio": (2.80e12, "ViT-L with patches of 16, 768 x 1024"),
}
"""FLOPs of one image in a teacher, and the counted part: modules of transformers 5.23 with the published sizes, under
torch's FlopCounterMode, with attention as plain products."""


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """One forward pass of one micro-batch, by part."""

    image_embedding: float
    decoder: float
    """Linear layers."""
    attention: float
    """Products of queries, keys and values: all pairs with a dense mask, else only the keys of each text."""
    attention_minimal: float
    """The same for visible pairs only. Not part of the total."""
    text_head: float
    upsampler: float
    mask_head: float
    """Projections, and the dot products that give mask logits."""
    distill_head: float

    @property
    def total(self) -> float:
        """Return the FLOPs that training computes."""
        return sum(value for name, value in vars(self).items() if name != "attention_minimal")


def layer_macs(architecture: Architecture) -> dict[str, int]:
    """Return the multiply-adds of one token in the linear layers of a decoder layer, by part (names of
    `modality_experts`)."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    key_value = architecture.num_key_value_heads * architecture.head_dim
    return {"self_attn": 2 * width * width + 2 * width * key_value, "mlp": 3 * width * inner, "layernorm": 0}


def forward_flops(
    architecture: Architecture, work: Workload, teachers: Mapping[str, TeacherSettings], kernels: Kernels | None = None
) -> ForwardFlops:
    """Return the FLOPs of one forward pass with `kernels` (None: the default)."""
    kernels = kernels if kernels is not None else Kernels()
    width, layers = architecture.hidden_size, architecture.num_hidden_layers
    tokens = work.rows * work.tokens_per_row
    parts = layer_macs(architecture)
    per_token = sum(parts.values())
    if kernels.experts == "mixed":
        per_token += sum(parts[name] for name in architecture.modality_experts)
    patches = sum(image.patches for image in work.images)
    pixels = 3 * architecture.patch_size**2
    prompts = architecture.num_visual_prompts * width * width if architecture.projects_prompts else 0
    embedding = patches * pixels * width + prompts
    if architecture.base == "eve":
        embedding = patches * architecture.patch_hidden_size * (pixels + 4 * width)
    folded = kernels.mask_head != "maps" and not any(own.site == "pixel_map" for own in teachers.values())
    pairs = work.rows * work.tokens_per_row**2 if kernels.attention == "dense" else work.computed_pairs
    upsampler, mask_head = _mask_head_macs(
        architecture, work, has_pixel_teacher=reads_pixel_map(teachers), folded=folded
    )
    return ForwardFlops(
        image_embedding=2.0 * embedding,
        decoder=2.0 * layers * tokens * per_token,
        attention=4.0 * layers * width * pairs,
        attention_minimal=4.0 * layers * width * work.seen_pairs,
        text_head=2.0 * work.supervised * width * architecture.vocab_size,
        upsampler=2.0 * upsampler,
        mask_head=2.0 * mask_head,
        distill_head=2.0 * _distill_macs(architecture, work, teachers),
    )


def reads_pixel_map(teachers: Mapping[str, TeacherSettings]) -> bool:
    """Return whether a teacher needs the pixel map of images without masks, too."""
    return any(own.site == "pixel_map" and not own.masks_only and own.fraction > 0 for own in teachers.values())


def _mask_head_macs(
    architecture: Architecture, work: Workload, *, has_pixel_teacher: bool, folded: bool
) -> tuple[float, float]:
    """Return the multiply-adds of the upsampler and of the rest of the mask head."""
    width, channels, mask_dim = architecture.hidden_size, architecture.feature_size, architecture.mask_dim
    upsampler = 0.0
    head = float(work.num_masks * (width * channels + channels * mask_dim))
    for image in work.images:
        if not image.masks and not has_pixel_teacher:
            continue
        cells = image.patches
        head += cells * (width * width + width * channels) if width > channels else 0
        for _ in range(architecture.num_upsample_blocks):
            upsampler += cells * UPSAMPLE_TAPS[architecture.upsampler] * channels * channels
            cells *= 4
            upsampler += cells * (9 * channels + channels * channels)
        head += cells * channels * channels
        if folded:
            head += image.masks * channels * (mask_dim + cells)
        else:
            head += cells * channels * mask_dim + image.masks * cells * mask_dim
    return upsampler, head


def _distill_macs(architecture: Architecture, work: Workload, teachers: Mapping[str, TeacherSettings]) -> float:
    """Return the multiply-adds of the distillation layers."""
    scale = 4**architecture.num_upsample_blocks
    total = 0.0
    for own in teachers.values():
        images = [image for image in work.images if image.masks or not own.masks_only]
        cells = sum(image.patches for image in images) * (scale if own.site == "pixel_map" else 1)
        total += own.fraction * cells * teacher_width(architecture, own) * own.channels
    return total


def teacher_flops(work: Workload, teachers: Mapping[str, TeacherSettings]) -> dict[str, float | None]:
    """Return the FLOPs of every teacher that runs during training (forward only), None if unknown.

    A teacher with a cache costs nothing. A larger Pixel-SAIL model is not in the table; plan it as a separate run.
    """
    costs: dict[str, float | None] = {}
    for name, own in teachers.items():
        images = sum(1 for image in work.images if image.masks or not own.masks_only)
        each = TEACHER_FLOPS[name][0] if name in TEACHER_FLOPS else None
        if own.cache is not None:
            costs[name] = 0.0
        else:
            costs[name] = None if each is None else each * own.fraction * images
    return costs


def training_flops(forward: ForwardFlops, architecture: Architecture, *, checkpointing: str) -> dict[str, float]:
    """Return the FLOPs of forward and backward pass: those of the model, and those recomputed.

    `checkpointing` is one of `CHECKPOINTING`; the last product of a recomputed part is not repeated.
    """
    parts = layer_macs(architecture)
    # feed_forward repeats two of the three products of the feed-forward half; layers repeats all but the third.
    third = parts["mlp"] / 3 / sum(parts.values())
    again = {"none": 0.0, "feed_forward": 2 * third, "layers": 1 - third}
    recomputed = again[checkpointing] * forward.decoder
    if checkpointing == "layers":
        recomputed += forward.attention
    return {"model": BACKWARD_AND_FORWARD * forward.total, "recomputed": recomputed}


def useful_flops(architecture: Architecture, work: Workload, teachers: Mapping[str, TeacherSettings]) -> float:
    """Return the minimal FLOPs of forward and backward pass of a step.

    Only real tokens and visible pairs count, without padding, masked pairs, recomputation and teachers. A sample costs
    the same alone and packed.
    """
    forward = forward_flops(architecture, replace(work, rows=1, tokens_per_row=work.real_tokens), teachers)
    return BACKWARD_AND_FORWARD * (forward.total - forward.attention + forward.attention_minimal)

"""Which implementation computes each part of the model.

`kernels` of a training run becomes `model.kernels`. Every choice has a slow, obvious reference beside a fast path, and
tests that compare outputs and gradients of both:

    Kernels(attention="dense", text_loss="plain", mask_head="maps", recompute_elementwise=False)    the reference
    Kernels()                                                                                       the default
"""

from dataclasses import dataclass

from pixel_sail.types import DataError

KERNEL_CHOICES = {
    "attention": ("auto", "dense", "segments", "turns", "flex", "varlen"),
    "text_loss": ("chunked", "plain"),
    "mask_head": ("folded", "points", "maps"),
    "compile": ("off", "layers"),
    "experts": ("routed", "mixed"),
}


CHECKPOINTING = ("none", "feed_forward", "layers")
"""What of a decoder the backward pass computes again, products included (`optim.activation_checkpointing`)."""


@dataclass(kw_only=True)
class Kernels:
    """One choice per part of the model; all of them give the same losses but for rounding."""

    attention: str = "auto"
    """dense: one boolean mask over a packed row. segments: one call per image and per text, without a mask over the
    row. flex: torch's FlexAttention with a block mask. varlen: torch's variable-length flash kernels (CUDA, half
    precision). turns: products over what each sample shares and over its independent questions, padded to one size
    (CPU). auto: on a CPU the one of dense, segments and turns with fewest scores; on CUDA varlen in half precision and
    flex otherwise."""
    text_loss: str = "chunked"
    """plain: logits of all supervised positions are kept. chunked: some positions at a time, computed again in the
    backward pass."""
    mask_head: str = "folded"
    """maps: features of the mask width at every cell, then logits. folded: the last layer is folded into the mask
    embedding of each [SEG] and the upsampler runs as matrix products. points: as folded, and logits are computed at
    the loss's points only."""
    recompute_elementwise: bool = True
    """Whether the backward pass recomputes what lies between two matrix products (norms, rotation, activations,
    depthwise convolutions) from the output of the product before it, instead of keeping every step. The small maps of
    the mask head are kept."""
    compile: str = "off"
    """layers: norms, projections, rotation and feed-forward of the decoder layers go through torch.compile, once for
    all lengths; of layers with weights for images, the feed-forward alone."""
    experts: str = "routed"
    """Where images have weights of their own. mixed: both weights compute every token and one result is kept. routed:
    each token is computed by its own weights only."""

    def __post_init__(self) -> None:
        """Check the choices. Raises: DataError."""
        for name, allowed in KERNEL_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"kernels.{name} is {getattr(self, name)!r}, expected one of {allowed}")


REFERENCE = Kernels(
    attention="dense", text_loss="plain", mask_head="maps", recompute_elementwise=False, experts="mixed"
)
"""The obvious way of everything."""

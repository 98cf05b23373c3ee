"""Which implementation computes each part of the model.

The config group `kernels` of a training run becomes `model.kernels`. Every choice has a simple, slow reference, and
tests compare outputs and gradients of each implementation with it:

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
"""What the backward pass recomputes of a decoder, matrix products included (`optim.activation_checkpointing`)."""


@dataclass(kw_only=True)
class Kernels:
    """One implementation per part of the model. All give the same losses up to rounding."""

    attention: str = "auto"
    """dense: one boolean mask per packed sequence. segments: one call per image and per text, without a dense mask.
    flex: torch's FlexAttention with a block mask. varlen: torch's variable-length flash kernels (CUDA, half
    precision). turns: separate products for the shared part and the independent questions of each sample, padded to
    one size (CPU). auto: on a CPU the cheapest of dense, segments and turns; on CUDA varlen in half precision, else
    flex."""
    text_loss: str = "chunked"
    """plain: keeps the logits of all supervised positions. chunked: computes some positions at a time and recomputes
    them in the backward pass."""
    mask_head: str = "folded"
    """maps: pixel features for every cell, then logits. folded: the last pixel layer is folded into the mask embedding
    of each [SEG], and the upsampler runs as matrix products. points: as folded, with logits at the loss points only."""
    recompute_elementwise: bool = True
    """Whether the backward pass recomputes the elementwise steps between two matrix products (norms, rotation,
    activations, depthwise convolutions) instead of keeping their outputs. Small maps of the mask head are kept."""
    compile: str = "off"
    """layers: torch.compile for norms, projections, rotation and feed-forward of the decoder layers, once for all
    lengths. In layers with separate image weights only the feed-forward is compiled."""
    experts: str = "routed"
    """For layers with separate image weights. mixed: both weights process every token and one result is kept. routed:
    each token is processed by its own weights only."""

    def __post_init__(self) -> None:
        """Check the choices. Raises: DataError."""
        for name, allowed in KERNEL_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"kernels.{name} is {getattr(self, name)!r}, expected one of {allowed}")


REFERENCE = Kernels(
    attention="dense", text_loss="plain", mask_head="maps", recompute_elementwise=False, experts="mixed"
)
"""The reference implementation of every part."""

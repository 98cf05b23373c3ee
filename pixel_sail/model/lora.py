"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers.

`training/build.py` adds them to a model with loaded weights. On export `training/checkpoint.py` merges them into the
adapted weights. The adapted layer keeps its parameter names and gets two new ones:

    decoder.layers.0.self_attn.q_proj.weight [896, 896]    frozen
    decoder.layers.0.self_attn.q_proj.lora_A [16, 896]     random
    decoder.layers.0.self_attn.q_proj.lora_B [896, 16]     zero, so that training starts at exactly the given model

Axis letters: R rank, O outputs, I inputs of a layer.
"""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.model.decoder import DownProjection

LINEAR = (nn.Linear, DownProjection)
"""Layer types that can be adapted."""


class LoraLinear(nn.Linear):
    """A frozen linear layer plus `scale` times the product of two trained low-rank matrices."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Take over the parameters of `linear` and freeze them."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        # Initialized on the CPU, so that the values are the same wherever the layer is.
        start_RI = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(start_RI, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start_RI.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last axis."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model: nn.Module, names: Sequence[str], *, rank: int, alpha: float, seed: int) -> None:
    """Replace the named linear layers of a model with adapted ones.

    Each is initialized from its own generator, so that no adapter depends on the presence of others.
    """
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, LINEAR), f"{name} is a {type(linear).__name__}"
        # A CPU generator uses the lower 32 bits of its seed, so both values must be in them.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        parent, _, own = name.rpartition(".")
        adapted = LoraLinear(linear, rank=rank, alpha=alpha, generator=generator)
        setattr(model.get_submodule(parent), own, adapted.train(linear.training))


def fold_lora(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the full parameters by name with every adapter merged into its layer's weight."""
    folded = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a_RI, b_OR = folded.pop(f"{name}.lora_A"), folded.pop(f"{name}.lora_B")
            weight_OI = folded[f"{name}.weight"]
            change_OI = module.scale * (b_OR.float() @ a_RI.float())
            folded[f"{name}.weight"] = weight_OI.float() + change_OI.to(weight_OI.device)
    return folded

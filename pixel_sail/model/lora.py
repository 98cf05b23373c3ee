"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers.

`training/build.py` adds them to a model whose weights are loaded, `training/checkpoint.py` folds them into the weights
they adapt when it exports, so that nothing after training knows of them. The adapted layer keeps its place and the
names of its parameters; two are new:

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
"""What can be adapted."""


class LoraLinear(nn.Linear):
    """A frozen linear layer plus `scale` times a product of two thin trained matrices."""

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
    """Replace the named linear layers of a model by adapted ones.

    Each is initialized from a generator of its own, so that no adapter depends on which others there are.
    """
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, LINEAR), f"{name} is a {type(linear).__name__}"
        # A generator on the CPU takes the lower 32 bits of its seed: both must be in them.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        parent, _, own = name.rpartition(".")
        adapted = LoraLinear(linear, rank=rank, alpha=alpha, generator=generator)
        setattr(model.get_submodule(parent), own, adapted.train(linear.training))


def fold_lora(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole parameters by name with every adapter added into its layer's weight, as a model without has them."""
    folded = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a_RI, b_OR = folded.pop(f"{name}.lora_A"), folded.pop(f"{name}.lora_B")
            weight_OI = folded[f"{name}.weight"]
            change_OI = module.scale * (b_OR.float() @ a_RI.float())
            folded[f"{name}.weight"] = weight_OI.float() + change_OI.to(weight_OI.device)
    return folded

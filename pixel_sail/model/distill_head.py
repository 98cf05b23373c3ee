"""Linear layers that project student features to the channels of each teacher. Exports do not contain them.

`training/build.py` adds a `DistillHead` to the model if teachers are configured. The forward pass applies it to the
sampled images and `losses/distill.py` compares the result. Names follow the release:

    distill_head.mask2former_distill_linear.weight [256, mask_dim]    from the pixel map, after the projector
    distill_head.sam2_distill_linear.weight        [256, hidden]      from the patch states, after the final norm

Axis letters: Y X cells of a map, C student channels, E teacher channels.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixel_sail.model.configuration_pixel_sail import Architecture

PREFIX = "distill_head."
"""Prefix of parameters that an export excludes."""

_FIRST_NAMES = {"attribute_states": "drawn_states", "attribute_pixels": "drawn_pixels"}
"""Former names of teachers. Seeds and parameter names keep them, so that runs and checkpoints of earlier versions
resume."""


@dataclass(frozen=True, kw_only=True)
class DistillSite:
    """The student feature map a teacher is compared with, and the teacher's number of channels."""

    site: str
    channels: int


def lasting_name(teacher: str) -> str:
    """Return the name of a teacher for seeds and parameters, the same in all versions."""
    return _FIRST_NAMES.get(teacher, teacher)


def linear_name(teacher: str) -> str:
    """Return the released name of a teacher's linear layer."""
    return f"{lasting_name(teacher)}_distill_linear"


def _init_ours(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    nn.init.zeros_(layer.bias)


def _init_as_torch(layer: nn.Linear, generator: torch.Generator) -> None:
    """Initialize as `nn.Linear.reset_parameters`, which takes no generator."""
    bound = layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


_INITIALIZERS = {"ours": _init_ours, "torch": _init_as_torch}
"""One for each of `mask_head.INITS`."""


class DistillHead(nn.ModuleDict):
    """One linear layer per teacher."""

    def __init__(
        self, config: Architecture, sites: Mapping[str, DistillSite], *, seed: int, init: str = "ours"
    ) -> None:
        """Initialize each layer from its own generator, so that no other weight depends on the teachers.

        init: `ours` keeps the variance of the states and has zero bias; `torch` (release) is `nn.Linear`'s default.
        """
        super().__init__()
        self.site_of = {name: sites[name].site for name in sorted(sites)}
        for name in self.site_of:
            width = config.mask_dim if self.site_of[name] == "pixel_map" else config.hidden_size
            layer = nn.utils.skip_init(nn.Linear, width, sites[name].channels)
            # A CPU generator uses the lower 32 bits of its seed, so both values must be in them.
            generator = torch.Generator().manual_seed(zlib.crc32(lasting_name(name).encode(), seed))
            with torch.no_grad():
                _INITIALIZERS[init](layer, generator)
            self[linear_name(name)] = layer

    def reads(self, site: str) -> list[str]:
        """Return the teachers that are compared at a site."""
        return [name for name, own in self.site_of.items() if own == site]

    def predict(self, teacher: str, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the student's prediction of a teacher's features, [Y, X, E] for each map [Y, X, C].

        All maps are projected in one call.
        """
        cells_NE: Tensor = self[linear_name(teacher)](torch.cat([map_YXC.flatten(0, 1) for map_YXC in maps]))
        sizes = [map_YXC.shape[:2] for map_YXC in maps]
        parts = cells_NE.split([size.numel() for size in sizes])
        return tuple(part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True))

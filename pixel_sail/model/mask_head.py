"""Mask head: mask logits are dot products of [SEG] queries and per-pixel features, without bias or scale.

`modeling_pixel_sail` passes it the patch states of each image and the states of the [SEG] tokens. Losses and predictor
use the logits.

Example: an 8 x 8 grid of 128 channels and 5 [SEG] states give logits [5, 32, 32] at stride 4 of a 128 x 128 image.

Axis letters: I images of one grid size, N masks, h w patch grid, Y X cells of the upsampled map, C channels, D mask
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.upsampler import UpsampleBlock, Upsampler

MaskHeadMode = Literal["reference", "products", "folded"]
"""Implementations of `MaskHead.forward`."""

INITS = ("ours", "torch")
"""Initializations of the mask head and of the distillation layers, see `MaskHead.init_weights`."""


def two_layer(size_in: int, size_middle: int, size_out: int) -> nn.Sequential:
    """Return Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(size_in, size_middle), nn.ReLU(), nn.Linear(size_middle, size_out))


class MaskHead(nn.Module):
    """Pre-projection (wide decoders only), upsampler, and the projections of pixels and of [SEG] states."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width, channels = config.hidden_size, config.feature_size
        self.pre_projector = two_layer(width, width, channels) if width > channels else None
        self.upsampler = Upsampler(channels, config.num_upsample_blocks, config.upsampler)
        self.pixel_projector = two_layer(channels, channels, config.mask_dim)
        self.seg_projector = two_layer(width, channels, config.mask_dim)

    @torch.no_grad()
    def init_weights(self, init: str = "ours") -> None:
        """Initialize the weights, from the global generator.

        ours: the upsampler initially repeats its input, and mask logits are of order one.
        torch (release): PyTorch's defaults, and all upsampling blocks start as copies of one. The biases outweigh the
        signal: after two blocks nine tenths of the features' energy is the same at every pixel, and the layer norms
        preserve this.
        """
        {"ours": self._init_ours, "torch": self._init_as_torch}[init]()

    def _init_as_torch(self) -> None:
        for layer in self.modules():
            if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
        self.upsampler.copy_first_block()

    def _init_ours(self) -> None:
        for layer in self.modules():
            if isinstance(layer, UpsampleBlock):
                layer.init_weights()
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
        for projector in (self.pixel_projector, self.seg_projector):
            last = projector[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(last.out_features**-0.25)

    def forward(
        self, groups: Sequence[Tensor], seg_states_NC: Tensor, *, mode: MaskHeadMode = "reference"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixel embeddings [P, *], [SEG] queries [N, D] and mask embeddings [N, *]. Patch states come in groups
        [I, h, w, hidden] whose pixel embeddings are concatenated. Mask logit = mask embedding . pixel embedding.

        reference: pixel embeddings are the pixel features, mask embeddings the queries. products: the same, with the
        upsampler as matrix products. folded: as products, but a pixel embedding is the input of the last layer of the
        pixel projection [P, C], and mask embeddings contain that layer, its bias last [N, C + 1].

        A training forward pass calls this once and gets three tensors for any number of grid sizes: ZeRO-3 gathers
        parameters at each call of a module and again for each of its output tensors, and every rank must gather
        equally often.
        """
        queries_ND = self.seg_queries(seg_states_NC)
        if mode == "reference":
            maps = [self.pixel_features(states_IhwC).flatten(0, 2) for states_IhwC in groups]
            return torch.cat(maps), queries_ND, queries_ND.clone()
        first, _, last = self.pixel_projector
        assert isinstance(last, nn.Linear)

        def embed_pixels(states_IhwC: Tensor) -> Tensor:
            # Flatten before the product, so that the activation can run in place on its result.
            return self.upsampler.channels_last(self._projected(states_IhwC), lambda x: first(x.flatten(0, 2))).relu_()

        maps = [embed_pixels(states_IhwC) for states_IhwC in groups]
        pixel_embed = maps[0] if len(maps) == 1 else torch.cat(maps)
        if mode == "products":
            return last(pixel_embed), queries_ND, queries_ND.clone()
        bias_N1 = queries_ND @ last.bias[:, None]
        return pixel_embed, queries_ND, torch.cat((queries_ND @ last.weight, bias_N1), dim=1)

    def _projected(self, states_IhwC: Tensor) -> Tensor:
        """Return patch states projected to the width of the upsampler."""
        return states_IhwC if self.pre_projector is None else self.pre_projector(states_IhwC)

    def pixel_features(self, states_IhwC: Tensor) -> Tensor:
        """Return the pixel features [I, Y, X, D] of patch states [I, h, w, hidden]."""
        upsampled_ICYX = self.upsampler(self._projected(states_IhwC).permute(0, 3, 1, 2))
        return self.pixel_projector(upsampled_ICYX.permute(0, 2, 3, 1))

    def seg_queries(self, seg_states_NC: Tensor) -> Tensor:
        """Return the query [N, D] of each [SEG] state."""
        return self.seg_projector(seg_states_NC)


def mask_logits(queries_ND: Tensor, features_YXD: Tensor) -> Tensor:
    """Return the logits [N, Y, X] of masks of one image."""
    num_rows, num_columns, width = features_YXD.shape
    return (queries_ND @ features_YXD.reshape(-1, width).T).view(-1, num_rows, num_columns)


def folded_logits(mask_embed_NE: Tensor, pixel_embed_YXC: Tensor) -> Tensor:
    """Return the logits [N, Y, X] of masks of one image from mask embeddings that contain the last layer, bias last."""
    num_rows, num_columns, width = pixel_embed_YXC.shape
    logits_NP = torch.addmm(mask_embed_NE[:, width:], mask_embed_NE[:, :width], pixel_embed_YXC.reshape(-1, width).T)
    return logits_NP.view(-1, num_rows, num_columns)


@dataclass(frozen=True, kw_only=True)
class PointLogits:
    """Masks of one image whose logits are computed at requested points only, without a full map."""

    mask_embed_NE: Tensor
    pixel_embed_YXC: Tensor

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self.mask_embed_NE)

    def at(self, points_NQ2: Tensor) -> Tensor:
        """Return the logits [N, Q] at points (x, y) in [0, 1] x [0, 1], equal to bilinear sampling of a logit map.

        Sampling and the dot product are both linear, so their order does not matter. Logits are 0 outside the map,
        bias included: near the border the bias has the weight of the cells inside.
        """
        num_rows, num_columns, width = self.pixel_embed_YXC.shape
        map_1CYX = self.pixel_embed_YXC.float().permute(2, 0, 1)[None]
        inside_11YX = map_1CYX.new_ones(1, 1, num_rows, num_columns)
        rows = []
        for mask_embed_E, points_Q2 in zip(self.mask_embed_NE.float(), points_NQ2, strict=True):
            grid_1Q12 = points_Q2[None, :, None] * 2.0 - 1.0
            read_CQ = F.grid_sample(map_1CYX, grid_1Q12, align_corners=False)[0, :, :, 0]
            weight_Q = F.grid_sample(inside_11YX, grid_1Q12, align_corners=False)[0, 0, :, 0]
            rows.append(mask_embed_E[:width] @ read_CQ + mask_embed_E[width] * weight_Q)
        return torch.stack(rows)

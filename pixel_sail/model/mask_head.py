"""From hidden states to mask logits: pixel features dotted with [SEG] queries.

Place in the flow: `modeling_pixel_sail` gives it the patch states of each image and the states of the [SEG] tokens; the
losses and the predictor take the logits. No bias, no scale: a logit is a plain dot product.

Example: a 8 x 8 grid of 128 channels and 5 [SEG] states give logits [5, 32, 32] at stride 4 of a 128 x 128 image.

Axis letters: I images of one grid size, N masks, h w patch grid, Y X cells of the upsampled map, C channels, D mask
width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.upsampler import Upsampler


def two_layer(size_in: int, size_middle: int, size_out: int) -> nn.Sequential:
    """Return Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(size_in, size_middle), nn.ReLU(), nn.Linear(size_middle, size_out))


class MaskHead(nn.Module):
    """Pre-projection (wide decoders only), upsampler, and the projections of pixels and of [SEG] states."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width, channels = config.hidden_size, config.feature_size
        self.pre_projector = two_layer(width, width, channels) if width > channels else None
        self.upsampler = Upsampler(channels, config.num_upsample_blocks)
        self.pixel_projector = two_layer(channels, channels, config.mask_dim)
        self.seg_projector = two_layer(width, channels, config.mask_dim)

    @torch.no_grad()
    def draw_weights(self) -> None:
        """Draw starting weights that keep the variance of what differs between pixels, and mask logits of order one.

        PyTorch's defaults, which the release uses, start with biases that outweigh the signal: after two blocks nine
        tenths of the features' energy is the same at every pixel, and the layer norms keep it so.
        """
        for layer in self.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                # Kernel and stride are equal, so that every output cell sees one tap of each input channel.
                nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
            elif isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d, nn.Linear)) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for projector in (self.pixel_projector, self.seg_projector):
            last = projector[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(last.out_features**-0.25)

    def forward(self, groups: Sequence[Tensor], seg_states_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixel features [cells, D] of groups [I, h, w, hidden] one after another, and the queries [N, D].

        Training comes through here once in a forward pass and takes two tensors, however many grid sizes its batch
        has: ZeRO-3 gathers parameters at each call of a module and again for each tensor that came out of it, and
        every rank must gather equally often.
        """
        maps = [self.pixel_features(states_IhwC).flatten(0, 2) for states_IhwC in groups]
        return torch.cat(maps), self.seg_queries(seg_states_NC)

    def pixel_features(self, states_IhwC: Tensor) -> Tensor:
        """Return the pixel features [I, Y, X, D] of patch states [I, h, w, hidden]."""
        if self.pre_projector is not None:
            states_IhwC = self.pre_projector(states_IhwC)
        upsampled_ICYX = self.upsampler(states_IhwC.permute(0, 3, 1, 2))
        return self.pixel_projector(upsampled_ICYX.permute(0, 2, 3, 1))

    def seg_queries(self, seg_states_NC: Tensor) -> Tensor:
        """Return the query [N, D] of each [SEG] state."""
        return self.seg_projector(seg_states_NC)


def mask_logits(queries_ND: Tensor, features_YXD: Tensor) -> Tensor:
    """Return the logits [N, Y, X] of masks of one image."""
    num_rows, num_columns, width = features_YXD.shape
    return (queries_ND @ features_YXD.reshape(-1, width).T).view(-1, num_rows, num_columns)

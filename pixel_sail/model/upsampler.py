"""The learned upsampler: from one state per patch to output stride `mask_stride`.

The input is the map of an image's final patch states. The mask head projects the output.

Example: two blocks turn a 40 x 30 grid of 896 channels (a 640 x 480 image in patches of 16) into 160 x 120.

Axis letters: I images of one grid size, C channels, Y X cells.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.model.recompute import recompute_between_products

Step = Callable[[Tensor], Tensor]

SMALL_MAP = 2**21
"""Size of an upsampled map in numbers (8 MB in float32) below which intermediate steps are kept, because recomputing
costs more time than the memory is worth. Six images of 128 x 128 at stride 4 with 128 channels have 786,432."""

START_NOISE = 0.1
"""Fraction of unstructured random values in the initial weights of a block."""


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each cell."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(channels).fill_(1.0))
        self.bias = nn.Parameter(Tensor(channels).fill_(0.0))
        self.eps = eps

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Normalize axis 1."""
        x_IYXC = x_ICYX.permute(0, 2, 3, 1)
        return F.layer_norm(x_IYXC, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class UpsampleBlock(nn.Module):
    """Double the resolution, GELU, depthwise 3x3, pointwise 1x1, channel layer norm.

    Doubling is a transposed 2x2 convolution; or a 1x1 convolution and bilinear interpolation, which commute, so the
    product runs on the small map; or a 3x3 convolution to four times the channels and pixel shuffle. (With a 1x1
    convolution, pixel shuffle would equal the transposed convolution.)
    """

    def __init__(self, channels: int, design: str = "transposed") -> None:
        super().__init__()
        self.design = design
        if design == "transposed":
            self.transposed = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        elif design == "bilinear":
            self.mixed = nn.Conv2d(channels, channels, kernel_size=1)
        else:
            self.shuffled = nn.Conv2d(channels, 4 * channels, kernel_size=3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = ChannelLayerNorm(channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights so that the output repeats the input up to noise: each cell becomes four equal cells
        without influence of neighbors.

        One linear layer can then decode every cell alike. With independent random weights for the four cells, learning
        locations from the upsampled map takes far longer (docs/experiments.md).
        Source: ICNR (arXiv 1707.02937) for the doubling; the two convolutions after it follow the same idea.
        """
        for layer in self.children():
            if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
                fan_in = layer.in_channels if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
                nn.init.normal_(layer.weight, std=START_NOISE * fan_in**-0.5)
        same_CC = torch.eye(self.pointwise.in_channels, device=self.pointwise.weight.device)
        if self.design == "transposed":
            self.transposed.weight += same_CC[:, :, None, None]
        elif self.design == "bilinear":
            self.mixed.weight += same_CC[:, :, None, None]
        else:
            # Channels 4c .. 4c + 3 become the four cells of channel c.
            self.shuffled.weight[:, :, 1, 1] += same_CC.repeat_interleave(4, dim=0)
        self.depthwise.weight[:, :, 1, 1] += 1.0
        self.pointwise.weight += same_CC[:, :, None, None]

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Return [I, C, 2Y, 2X]."""
        return self.norm(self.pointwise(self.depthwise(F.gelu(self.upsample(x_ICYX)))))

    def upsample(self, x_ICYX: Tensor) -> Tensor:
        """Return the map [I, C, 2Y, 2X] before the activation."""
        if self.design == "transposed":
            return self.transposed(x_ICYX)
        if self.design == "bilinear":
            return upsample_bilinear(self.mixed(x_ICYX))
        return F.pixel_shuffle(self.shuffled(x_ICYX), 2)

    def norm_channels_last(self, x_IYXC: Tensor) -> Tensor:
        """Return the block's last step."""
        return F.layer_norm(x_IYXC, self.norm.weight.shape, self.norm.weight, self.norm.bias, self.norm.eps)

    def convolve_channels_last(self, x_IYXC: Tensor) -> Tensor:
        """Return the doubled map after the activation and both convolutions."""
        # As [I, C, Y, X] this is torch's channels-last layout, which the convolution preserves.
        mixed_IYXC = self.depthwise(F.gelu(x_IYXC).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.linear(mixed_IYXC, self.pointwise.weight.flatten(1), self.pointwise.bias)

    def upsample_channels_last(self, x_IYXC: Tensor) -> Tensor:
        """Return the map [I, 2Y, 2X, C] before the activation."""
        images, rows, columns, channels = x_IYXC.shape
        if self.design == "bilinear":
            mixed_IYXC = F.linear(x_IYXC, self.mixed.weight.flatten(1), self.mixed.bias)
            return upsample_bilinear(mixed_IYXC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.design == "pixel_shuffle":
            quads = self.shuffled(x_IYXC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            quads = quads.reshape(images, rows, columns, channels, 2, 2).permute(0, 1, 4, 2, 5, 3)
            return quads.reshape(images, 2 * rows, 2 * columns, channels)
        # Kernel and stride are equal, so every cell maps to four cells independently: one matrix product.
        taps_4CC = self.transposed.weight.permute(2, 3, 1, 0).reshape(4 * channels, channels)
        bias = self.transposed.bias
        assert bias is not None
        quads = F.linear(x_IYXC, taps_4CC, bias.repeat(4)).view(images, rows, columns, 2, 2, channels)
        return quads.permute(0, 1, 3, 2, 4, 5).reshape(images, 2 * rows, 2 * columns, channels)


def upsample_bilinear(x_ICYX: Tensor) -> Tensor:
    """Return [I, C, 2Y, 2X] in the same memory layout."""
    return F.interpolate(x_ICYX, scale_factor=2, mode="bilinear", align_corners=False)


class Upsampler(nn.Module):
    """`num_blocks` blocks with independent weights (the release initializes them as copies of one: `model.init`)."""

    recompute = True
    """Whether the backward pass recomputes what lies between two products (see `Kernels.recompute_elementwise`)."""

    def __init__(self, channels: int, num_blocks: int, design: str = "transposed") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UpsampleBlock(channels, design) for _ in range(num_blocks))

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Return [I, C, Y * 2**num_blocks, X * 2**num_blocks]; with no blocks, the input."""
        for block in self.blocks:
            x_ICYX = block(x_ICYX)
        return x_ICYX

    def copy_first_block(self) -> None:
        """Copy the weights of the first block to all others. They remain separate parameters."""
        for block in self.blocks[1:]:
            block.load_state_dict(self.blocks[0].state_dict())

    def channels_last(self, x_IYXC: Tensor, last: Step) -> Tensor:
        """Like `forward` followed by `last`, with channels on the last axis. Dense convolutions run as matrix products
        if possible.

        The linear layer after the upsampler is included because recomputation goes from product to product.
        """
        recompute = self.recompute and x_IYXC.numel() * 4 ** len(self.blocks) >= SMALL_MAP
        for step in self.steps(last):
            x_IYXC = recompute_between_products(step, x_IYXC) if recompute else step(x_IYXC)
        return x_IYXC

    def steps(self, last: Step) -> Iterator[Step]:
        """Yield the steps, each from the output of one matrix product to the output of the next."""
        norm: Step | None = None
        for block in self.blocks:
            assert isinstance(block, UpsampleBlock)
            yield _compose(norm, block.upsample_channels_last)
            yield block.convolve_channels_last
            norm = block.norm_channels_last
        yield _compose(norm, last)


def _compose(first: Step | None, second: Step) -> Step:
    return second if first is None else lambda x: second(first(x))

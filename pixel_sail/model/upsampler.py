"""The learnable upsampler: from one state per patch to one feature per `mask_stride` pixels.

Place in the flow: the last hidden states of an image's patches enter as a map, the mask head projects what comes out.

Example: a 40 x 30 grid of 896 channels (a 640 x 480 image in patches of 16) leaves two blocks as 160 x 120.

Axis letters: I images of one grid size, C channels, Y X cells.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of every cell."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(channels).fill_(1.0))
        self.bias = nn.Parameter(Tensor(channels).fill_(0.0))
        self.eps = eps

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Normalise axis 1."""
        x_IYXC = x_ICYX.permute(0, 2, 3, 1)
        return F.layer_norm(x_IYXC, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class UpsampleBlock(nn.Module):
    """Double the resolution: transposed convolution 2x2, GELU, depthwise 3x3, pointwise 1x1, channel layer norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.transposed = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = ChannelLayerNorm(channels)

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Return [I, C, 2Y, 2X]."""
        return self.norm(self.pointwise(self.depthwise(F.gelu(self.transposed(x_ICYX)))))


class Upsampler(nn.Module):
    """`num_blocks` blocks, each with its own fresh weights (the release starts them as copies of one)."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UpsampleBlock(channels) for _ in range(num_blocks))

    def forward(self, x_ICYX: Tensor) -> Tensor:
        """Return [I, C, Y * 2**num_blocks, X * 2**num_blocks]; with no blocks, the input."""
        for block in self.blocks:
            x_ICYX = block(x_ICYX)
        return x_ICYX

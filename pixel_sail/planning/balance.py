"""Cost of a sample for packing, so that packed sequences of all ranks take equally long.

`training/prepare.py` passes `SampleCost` to the packing if `data.packing.balance` is `flops`. The slowest rank decides
the time of a step, and equal token counts are not equal work: attention within an image is quadratic in its patches,
and masks need the upsampler. In the 0.5B model, with 100 text tokens of which half are supervised, the average cost per
token, relative to the linear layers of the decoder, is

    480 x 640 without masks 1.16, with five masks 1.28, 1024 x 1024 without masks 1.50, with five masks 1.62
"""

from dataclasses import dataclass

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.planning.flops import forward_flops
from pixel_sail.planning.workload import Workload, of_example
from pixel_sail.types import Example


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """Cost of a sample in tokens: the number of tokens with the same FLOPs in the decoder's linear layers."""

    architecture: Architecture

    def __call__(self, example: Example) -> float:
        """Return the cost, never less than the number of tokens."""
        return self.of(of_example(example))

    def of(self, work: Workload) -> float:
        """Return the cost of a workload."""
        forward = forward_flops(self.architecture, work, {})
        minimal = forward.total - forward.attention + forward.attention_minimal
        return minimal * work.real_tokens / forward.decoder

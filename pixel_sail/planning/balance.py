"""What a sample weighs in a sequence, so that sequences of all ranks take equally long.

`training/prepare.py` hands `SampleCost` to the packing where `data.packing.balance` is `flops`. A step ends when its
slowest rank does, and equal numbers of tokens are not equal work: attention within an image grows with the square of
its patches, and masks want the upsampler. In the 0.5B model, with 100 tokens of text of which half are learned,

    480 x 640 without masks 1.16, with five masks 1.28, 1024 x 1024 without masks 1.50, with five masks 1.62

is the work of one token on the average, in units of a token's way through the products of the layers.
"""

from dataclasses import dataclass

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.planning.flops import forward_flops
from pixel_sail.planning.workload import Workload, of_example
from pixel_sail.types import Example


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """The work of a sample in tokens: how many would cost as much in the layers without attention."""

    architecture: Architecture

    def __call__(self, example: Example) -> float:
        """Return the cost, never less than the number of tokens."""
        return self.of(of_example(example))

    def of(self, work: Workload) -> float:
        """Return the cost of what a batch holds."""
        forward = forward_flops(self.architecture, work, {})
        minimal = forward.total - forward.attention + forward.attention_minimal
        return minimal * work.real_tokens / forward.decoder

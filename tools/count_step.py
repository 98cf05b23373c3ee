"""Compute a lower bound on the GPU time of a training step, without a GPU, from its kernels, memory traffic and FLOPs.

    python tools/count_step.py                                            0.5B, six images of 480 x 640 in a sequence
    python tools/count_step.py --size 3b --image 1024 1024 --samples 2
    python tools/count_step.py --checkpointing layers --json runs/count.json

Forward pass, losses and backward pass of one packed sequence run on torch's meta device in bfloat16, with
`kernels.attention=varlen` as on a GPU. Every operation that would launch a kernel is recorded with the bytes that it
must read and write and, for matrix products and attention, its FLOPs. The bound sums, over kernels, `--launch` plus the
larger of FLOPs / `--rate` and bytes / `--bandwidth`. Real kernels take longer; use it to compare implementations and to
see where time cannot be saved. Optimizer and communication are not included, nor are the fused kernels of
torch.compile.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.attention_backends import attention_segments
from pixel_sail.model.kernels import CHECKPOINTING, Kernels
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.benchmarks import BENCHMARK_SIZES, packed, sized_config, small_tokenizer, synthetic_examples
from pixel_sail.planning.flops import forward_flops, training_flops
from pixel_sail.planning.workload import of_batch
from pixel_sail.provenance import code_version

NO_KERNEL = ("detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
DATASHEET = 989e12
"""Dense bfloat16 operations per second of an H100 or H200; MFU is relative to it."""


@dataclass(kw_only=True)
class KernelTotal:
    """Sums over one kind of kernel."""

    kernels: int = 0
    operations: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


def traffic(tensor: Tensor) -> int:
    """Return the bytes moved by reading or writing a tensor; dimensions of stride 0 count once."""
    own = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(own) * tensor.element_size() if tensor.numel() else 0


class Counter(TorchDispatchMode):
    """Sum up every operation on the device, by phase and name."""

    def __init__(self, options: argparse.Namespace, attention: dict[bool, float]) -> None:
        super().__init__()
        self.options, self.attention = options, attention
        self.phase = "forward"
        self.rows: dict[str, KernelTotal] = defaultdict(KernelTotal)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record it."""
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        read, written = ([x for x in tree_leaves(x) if isinstance(x, Tensor)] for x in ((args, kwargs), result))
        if function.is_view or name in NO_KERNEL or any(x.device.type == "cpu" for x in (*read, *written)):
            return result
        row = self.rows[f"{self.phase} {'product' if name in PRODUCTS else name}"]
        operations = self.operations(name, args, read)
        moved = sum(map(traffic, read)) + sum(map(traffic, written))
        row.kernels += 1
        row.operations += operations
        row.bytes += moved
        options = self.options
        row.seconds += max(operations / options.rate, moved / options.bandwidth) / 1e12 + options.launch / 1e6
        return result

    def operations(self, name: str, args: Sequence[Any], read: Sequence[Tensor]) -> float:
        """Return the FLOPs of a matrix product or attention, 0 for anything else."""
        if name in PRODUCTS:
            left, right = read[-2:]
            return 2.0 * left.numel() * right.shape[-1]
        if name == "_varlen_attn":
            return self.attention[bool(args[7])]
        # The backward pass recomputes the scores: five products, where the forward pass has two.
        return 2.5 * self.attention[bool(args[10])] if name == "_varlen_attn_backward" else 0.0


class StandInNorm(torch.autograd.Function):
    """Torch's fused norm, which has no kernel for the meta device: the same inputs and outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor) -> Tensor:
        """Return the normed states."""
        ctx.save_for_backward(x, weight_D)
        return torch.mul(x, weight_D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of states and weight."""
        x, weight_D = ctx.saved_tensors
        return torch.addcmul(x, gradients[0], weight_D), torch.sum(x.flatten(0, -2), 0)


def fused_norm(x: Tensor, shape: Sequence[int], weight_D: Tensor, eps: float) -> Tensor:
    """Replace `F.rms_norm`."""
    normed: Tensor = StandInNorm.apply(x, weight_D)
    return normed


def counted(options: argparse.Namespace) -> dict[str, Any]:
    """Return all counts."""
    tokenizer = small_tokenizer()
    config = sized_config(options.size, tokenizer, max_long_side=max(options.image))
    with torch.device("meta"):
        model = PixelSailForSegmentation(config).train()
    model.to(device=torch.device("meta"), dtype=torch.bfloat16)
    kernels = Kernels(attention="varlen")
    model.use(kernels, options.checkpointing)
    processor, size_hw = PixelSailProcessor.for_model(tokenizer, config), (options.image[0], options.image[1])
    examples = synthetic_examples(processor, options.samples, expressions=options.expressions, size_hw=size_hw)
    (batch,) = packed(examples, options.samples, processor.seg_id)
    assert batch.spans is not None
    attention = {
        is_causal: sum(
            4.0 * segment.num_queries * (segment.num_prefix_keys + segment.num_queries) * config.hidden_size
            for segment in attention_segments(batch.spans)
            if segment.is_image != is_causal
        )
        for is_causal in (False, True)
    }
    moved, losses, counter = batch.to("meta"), LossConfig(), Counter(options, attention)
    with mock.patch.object(F, "rms_norm", fused_norm), counter:
        output = model(**moved.training_inputs())
        loss = combine(loss_sums(output, moved, losses), count(batch), losses) + output.zero_loss
        counter.phase = "backward"
        loss.backward()
    total = KernelTotal(
        kernels=sum(row.kernels for row in counter.rows.values()),
        operations=sum(row.operations for row in counter.rows.values()),
        bytes=sum(row.bytes for row in counter.rows.values()),
        seconds=sum(row.seconds for row in counter.rows.values()),
    )
    needed = training_flops(forward_flops(config, of_batch(batch), {}, kernels), config, checkpointing="none")["model"]
    tokens = batch.input_ids_BT.numel()
    return {
        "tokens": tokens,
        "total": asdict(total),
        "tokens_per_second_at_most": tokens / total.seconds,
        "mfu_at_most": needed / total.seconds / DATASHEET,
        "rows": {name: asdict(row) for name, row in sorted(counter.rows.items(), key=lambda pair: -pair[1].seconds)},
    }


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(BENCHMARK_SIZES), default="0.5b")
    parser.add_argument("--image", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--samples", type=int, default=6, help="samples per packed sequence")
    parser.add_argument("--expressions", type=int, default=5, help="expressions per image")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none")
    parser.add_argument("--rate", type=float, default=700.0, help="achievable TFLOP/s of matrix products")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="memory bandwidth in TB/s")
    parser.add_argument("--launch", type=float, default=3.0, help="microseconds per kernel launch")
    parser.add_argument("--top", type=int, default=20, help="number of kinds of kernels to print")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = counted(options)
    total = found["total"]
    print(f"{options.size} model, bf16, {options.samples} images of {options.image}, {found['tokens']} tokens")
    print(f"{'':42s} {'kernels':>8s} {'TFLOP':>8s} {'GB':>8s} {'ms at least':>12s}")
    for name, row in [*list(found["rows"].items())[: options.top], ("all", total)]:
        print(
            f"{name:42s} {row['kernels']:8d} {row['operations'] / 1e12:8.2f} {row['bytes'] / 1e9:8.2f} "
            f"{1e3 * row['seconds']:12.2f}"
        )
    print(f"at most {found['tokens_per_second_at_most']:,.0f} tokens/s, MFU {found['mfu_at_most']:.0%}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "top")}
        result = {**settings, "torch": torch.__version__, "code": code_version(), **found}
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

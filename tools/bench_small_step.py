"""Benchmark the small training step of `experiment=quickstart` against a plain implementation: CPU seconds, torch
operations, and agreement of the losses.

    OMP_NUM_THREADS=1 python tools/bench_small_step.py
    OMP_NUM_THREADS=1 python tools/bench_small_step.py --expressions 8 16 32 --ways ours dense segments

16 images of 128 x 128, 112 x 144 and 144 x 112 with independent questions go through a model of width 128 and 4
layers in two micro-batches of 8 rows. `reference` is `kernels.REFERENCE` with mask losses image by image. `ours` is the
training step; `dense`, `segments` and `turns` are the same with that attention backend, `kept` without recomputation in
the backward pass, `bf16` under autocast, `compiled` with `kernels.compile=layers`. The variants alternate in one
process and start from the same weights. Seconds are medians of CPU time, which is less sensitive to other load. A torch
operation on a CPU corresponds roughly to a kernel on a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixel_sail.config import OptimConfig
from pixel_sail.data.collate import collate
from pixel_sail.data.packing import PackedSequence, StreamState
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.losses import total
from pixel_sail.losses.mask import ImageMasks, PointSampling, point_losses
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.benchmarks import sized_config, small_tokenizer, synthetic_examples
from pixel_sail.provenance import code_version
from pixel_sail.training.optim import build_optimizer
from pixel_sail.types import Batch

VARIANTS = {
    "reference": REFERENCE,
    "ours": Kernels(),
    "dense": Kernels(attention="dense"),
    "segments": Kernels(attention="segments"),
    "turns": Kernels(attention="turns"),
    "kept": Kernels(recompute_elementwise=False),
    "bf16": Kernels(),
    "compiled": Kernels(compile="layers"),
}
IMAGES = ((128, 128), (112, 144), (144, 112))
ROWS = 8
LOSSES = LossConfig(points=PointSampling(num_points=1024, oversample_ratio=1.0, importance_ratio=0.0), dice=2.0)


def synthetic_batches(processor: PixelSailProcessor, images: int, expressions: int) -> list[Batch]:
    """Return micro-batches with one image per row, cycling through the sizes."""
    share = -(-images // len(IMAGES))
    of_size = [
        synthetic_examples(processor, share, expressions=expressions, size_hw=size, independent_turns=True)
        for size in IMAGES
    ]
    examples = [example for alike in zip(*of_size, strict=True) for example in alike][:images]
    sequences = [PackedSequence(stream=0, after=StreamState(next=1), examples=(example,)) for example in examples]
    return [collate(sequences[first : first + ROWS], seg_id=processor.seg_id) for first in range(0, images, ROWS)]


def one_by_one(images: Sequence[ImageMasks], sampling: PointSampling) -> tuple[torch.Tensor, list[int]]:
    """Return the mask losses of `losses_at_points` summed image by image."""
    columns = []
    for image in images:
        generator = torch.Generator().manual_seed(image.seed)
        sums = point_losses(image.logits, torch.stack(list(image.masks)), sampling, generator)
        columns.append(torch.stack((sums.bce, sums.dice)))
    return torch.stack(columns, dim=1), list(range(len(images)))


class SmallStepVariant:
    """One variant, with its own model and optimizer."""

    def __init__(self, name: str, batches: Sequence[Batch]) -> None:
        self.name, self.batches = name, batches
        torch.manual_seed(0)
        self.model = PixelSailForSegmentation(sized_config("small", small_tokenizer())).train()
        self.model.use(VARIANTS[name])
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-4))

    def step(self) -> float:
        """Make one update; return the loss."""
        is_reference = VARIANTS[self.name] == REFERENCE
        counts = [count(batch) for batch in self.batches]
        of_all = total.Counts(
            tokens=sum(own.tokens for own in counts),
            masks=sum(own.masks for own in counts),
            samples=sum(own.samples for own in counts),
        )
        summed = 0.0
        for batch in self.batches:
            with (
                torch.autocast("cpu", torch.bfloat16) if self.name == "bf16" else nullcontext(),
                mock.patch.object(total, "losses_at_points", one_by_one) if is_reference else nullcontext(),
            ):
                output = self.model(**batch.training_inputs())
                loss = combine(loss_sums(output, batch, LOSSES), of_all, LOSSES) + output.zero_loss
            loss.backward()
            summed += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return summed


class Operations(TorchDispatchMode):
    """Counts torch operations that are not views."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one."""
        self.number += not (function.is_view or function.name().split("::")[1].split(".")[0] in ("detach", "empty"))
        return function(*args, **(kwargs or {}))


def measured(options: argparse.Namespace, expressions: int) -> dict[str, Any]:
    """Return the measurements of each variant for a number of expressions per image."""
    tokenizer = small_tokenizer()
    processor = PixelSailProcessor.for_model(tokenizer, sized_config("small", tokenizer))
    batches = synthetic_batches(processor, options.images, expressions)
    trainers = [SmallStepVariant(name, batches) for name in options.ways]
    losses: dict[str, list[float]] = {name: [] for name in options.ways}
    seconds: dict[str, list[float]] = {name: [] for name in options.ways}
    for round_ in range(options.rounds + 1):
        for trainer in trainers:
            start = time.process_time()
            losses[trainer.name].append(trainer.step())
            if round_:
                seconds[trainer.name].append(time.process_time() - start)
    found = {}
    for trainer in trainers:
        with Operations() as operations:
            trainer.step()
        own, first = losses[trainer.name], losses[options.ways[0]]
        found[trainer.name] = {
            "seconds": statistics.median(seconds[trainer.name]),
            "lowest": min(seconds[trainer.name]),
            "speed": statistics.median(seconds[options.ways[0]]) / statistics.median(seconds[trainer.name]),
            "operations": operations.number,
            "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(own, first, strict=True)),
        }
    return {"expressions": expressions, "tokens": sum(b.input_ids_BT.numel() for b in batches), "ways": found}


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ways", nargs="+", choices=list(VARIANTS), default=["reference", "ours"], help="first: yardstick"
    )
    parser.add_argument("--expressions", nargs="+", type=int, default=[5], help="per image")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    points = [measured(options, expressions) for expressions in options.expressions]
    for point in points:
        print(f"{options.images} images, {point['expressions']} expressions each, {point['tokens']} tokens")
        for name, way in point["ways"].items():
            print(
                f"{name:10s} {way['seconds']:7.3f} CPU-s (lowest {way['lowest']:.3f})  speed {way['speed']:5.2f}  "
                f"{way['operations']:6d} operations  losses differ by {way['loss_difference']:.1e} at most"
            )
    if options.json:
        result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "code": code_version()}
        replace_text(options.json, json.dumps({**result, "points": points}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark the mask head with its losses over expressions per image, and the text loss over supervised tokens.

    python tools/bench_heads.py
    python tools/bench_heads.py --hidden 896 --mask-dim 512 --vocab 151680 --device cuda --precision bf16
    python tools/bench_heads.py --json runs/heads.json --png runs/heads.png

Masks of one 480 x 640 image (30 x 40 patches) are computed by `maps` (mask features of every cell, then logits),
`folded` (the last layer folded into the query) and `points` (logits only at the points sampled by the loss); the text
loss by `plain` and `chunked`. Times are medians of forward plus backward pass. `--json` writes them and `growth`, the
exponent of cost over expressions between the first and the last point; below 1, the cost per expression decreases.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import save_panels, size_panel
from pixel_sail.files import replace_text
from pixel_sail.losses.mask import PointSampling, point_losses
from pixel_sail.losses.text import text_losses
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.mask_head import MaskHead
from pixel_sail.model.modeling_pixel_sail import mask_logits_of_images
from pixel_sail.model.text_head import TextHead
from pixel_sail.provenance import code_version
from pixel_sail.types import DTYPES

GRID = (30, 40)
IMAGE_HW = (480, 640)


def median_seconds(work: Callable[[], Tensor], rounds: int, device: str) -> float:
    """Return the median seconds of a forward and backward pass, without the first."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work().backward()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def mask_seconds(kind: str, head: MaskHead, options: argparse.Namespace, number: int) -> float:
    """Return the seconds of the mask head and its losses with `number` masks of one image."""
    weight = next(head.parameters())
    states = torch.randn(1, *GRID, options.hidden, device=weight.device, dtype=weight.dtype, requires_grad=True)
    segs = torch.randn(number, options.hidden, device=weight.device, dtype=weight.dtype, requires_grad=True)
    masks = torch.rand(number, *IMAGE_HW, device=weight.device) < 0.3
    scale = 2 ** head.upsampler.blocks.__len__()

    def work() -> Tensor:
        pixel_embed, _, mask_embed = head([states], segs, mode="reference" if kind == "maps" else "folded")
        maps = [pixel_embed.view(GRID[0] * scale, GRID[1] * scale, -1)]
        (logits,) = mask_logits_of_images(mask_embed, maps, [number], kind=kind)
        assert logits is not None
        sums = point_losses(logits, masks, PointSampling(), torch.Generator().manual_seed(0))
        return sums.bce + sums.dice

    return median_seconds(work, options.rounds, options.device)


def text_seconds(kind: str, head: TextHead, options: argparse.Namespace, number: int) -> float:
    """Return the seconds of the losses of `number` supervised tokens."""
    weight = head.weight
    states = torch.randn(number, options.hidden, device=weight.device, dtype=weight.dtype, requires_grad=True)
    targets = torch.randint(options.vocab, (number,), device=weight.device)

    def work() -> Tensor:
        losses = head(states, targets) if kind == "chunked" else text_losses(head(states), targets)
        assert isinstance(losses, Tensor)
        return losses.sum()

    return median_seconds(work, options.rounds, options.device)


def table(title: str, sizes: Sequence[int], curves: dict[str, list[float]]) -> dict[str, float]:
    """Print seconds per size; return the growth of each curve."""
    print(f"{title:>18s} " + " ".join(f"{name:>10s}" for name in curves))
    for index, size in enumerate(sizes):
        print(f"{size:18d} " + " ".join(f"{curve[index]:10.4f}" for curve in curves.values()))
    if len(sizes) < 2:
        return {}
    steps = math.log(sizes[-1] / sizes[0])
    grown = {name: math.log(curve[-1] / curve[0]) / steps for name, curve in curves.items()}
    print(f"{'growth':>18s} " + " ".join(f"{exponent:10.2f}" for exponent in grown.values()))
    return grown


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mask-dim", type=int, default=144)
    parser.add_argument("--vocab", type=int, default=11_264)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--expressions", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--tokens", type=int, nargs="+", default=[30, 300, 1200])
    parser.add_argument("--kinds", nargs="+", default=["maps", "folded", "points"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "mask_dim": options.mask_dim, "mask_stride": options.stride}
    head, text = MaskHead(Architecture(**sizes)), TextHead(options.hidden, options.vocab)
    head.init_weights()
    for module in (head, text):
        module.to(device=options.device, dtype=DTYPES[options.precision])
    masks = {
        kind: [mask_seconds(kind, head, options, number) for number in options.expressions] for kind in options.kinds
    }
    grown = table("expressions", options.expressions, masks)
    texts = {
        kind: [text_seconds(kind, text, options, number) for number in options.tokens] for kind in ("plain", "chunked")
    }
    text_grown = table("supervised tokens", options.tokens, texts)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "png")}
        found = {"mask_seconds": masks, "text_seconds": texts, "growth": grown, "text_growth": text_grown}
        replace_text(options.json, json.dumps({**settings, "code": code_version(), **found}, indent=1) + "\n")
    if options.png:
        panel = size_panel(
            "mask head and losses", options.expressions, masks, x_label="expressions per image", y_label="seconds"
        )
        save_panels(options.png, [panel], "")
    return 0


if __name__ == "__main__":
    sys.exit(main())

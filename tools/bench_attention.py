"""Benchmark attention over one packed sequence, forward and backward: a dense mask against one call per image and text.

    python tools/bench_attention.py                                        scaling with the number of packed samples
    python tools/bench_attention.py --device cuda --precision bf16 --heads 14 --groups 2 --ways dense varlen flex
    python tools/bench_attention.py --json runs/attention.json --png runs/attention.png

Samples of one size (30 x 40 patches and 130 text tokens) are packed into one sequence. With a dense mask, cost should
be quadratic in the sequence length; without, linear. `--json` writes the seconds of every point and `growth`, the
exponent of cost over tokens between the first and the last point.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import save_panels, size_panel
from pixel_sail.files import replace_text
from pixel_sail.model.attention_backends import attention_backend
from pixel_sail.model.spans import sample_spans
from pixel_sail.provenance import code_version
from pixel_sail.types import DTYPES


def packed_row(samples: int, image_tokens: int, text_tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return sample index, branches and image flags [1, T] of equal samples in one sequence."""
    one = torch.tensor([True] * image_tokens + [False] * text_tokens)
    owners = torch.arange(samples).repeat_interleave(len(one))
    in_image = one.repeat(samples)
    return owners[None].to(device), (~in_image).long()[None].to(device), in_image[None].to(device)


def seconds_of(way: str, options: argparse.Namespace, samples: int) -> float:
    """Return the median seconds of forward and backward pass of one layer; building the backend is not timed."""
    dtype = DTYPES[options.precision]
    where = packed_row(samples, options.image_tokens, options.text_tokens, options.device)
    length = where[0].shape[1]
    backend = attention_backend(way, *where, sample_spans(*where), dtype=dtype)
    q_BATE, k_BGTE, v_BGTE = (
        torch.randn(1, heads, length, options.width, device=options.device, dtype=dtype, requires_grad=True)
        for heads in (options.heads, options.groups, options.groups)
    )
    upstream = torch.randn_like(q_BATE)
    times = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        backend(0, q_BATE, k_BGTE, v_BGTE).backward(upstream)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def growth(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the exponent of cost over tokens between the first and the last point: 1 is linear, 2 quadratic."""
    return math.log(seconds[-1] / seconds[0]) / math.log(tokens[-1] / tokens[0])


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=["dense", "segments"])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--image-tokens", type=int, default=1202)
    parser.add_argument("--text-tokens", type=int, default=130)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=1, help="number of key/value heads")
    parser.add_argument("--width", type=int, default=64, help="dimension of one head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    tokens = [number * (options.image_tokens + options.text_tokens) for number in options.samples]
    curves = {way: [seconds_of(way, options, number) for number in options.samples] for way in options.ways}
    print(
        f"{'tokens':>8s} " + " ".join(f"{way:>12s}" for way in curves) + "   seconds, one layer, forward and backward"
    )
    for index, length in enumerate(tokens):
        print(f"{length:8d} " + " ".join(f"{curve[index]:12.4f}" for curve in curves.values()))
    grown = {way: growth(tokens, curve) for way, curve in curves.items()} if len(tokens) > 1 else {}
    print("growth " + ", ".join(f"{way} {exponent:.2f}" for way, exponent in grown.items()))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "png")}
        result = {**settings, "code": code_version(), "tokens": tokens, "seconds": curves, "growth": grown}
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.png:
        panel = size_panel(
            "attention of one layer", tokens, curves, x_label="tokens of the sequence", y_label="seconds"
        )
        save_panels(options.png, [panel], "")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark decoder layers with separate weights for image tokens: routed, or both weights applied to every token.

    python tools/bench_routing.py                                    0.5B width, fp32, CPU
    python tools/bench_routing.py --device cuda --precision bf16 --hidden 3584 --inner 18944 --heads 28 --groups 4
    python tools/bench_routing.py --json runs/routing.json

Samples of one size (a grid of patches with class token and row ends, and a text) are packed into one sequence. Forward
and backward passes of both variants alternate, so that other load affects both equally. Prints the medians and their
ratio.

`OMP_NUM_THREADS=1 python tools/bench_routing.py --rounds 5` gave 1.88 and 1.83 (mixed 3.95 s, routed 2.10 s) on a
shared Intel Xeon with two cores, one of them used, torch 2.13.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.model.attention_backends import attention_backend
from pixel_sail.model.configuration_pixel_sail import EXPERT_PARTS, Architecture
from pixel_sail.model.image_layout import image_tokens
from pixel_sail.model.routed_decoder import Mixed, RoutedDecoder, RoutedTokens
from pixel_sail.provenance import code_version
from pixel_sail.types import DTYPES


def packed_row(samples: int, image_length: int, text_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Return sample index and which tokens belong to an image [1, T], of equal samples in one sequence."""
    one = torch.tensor([True] * image_length + [False] * text_length)
    return torch.arange(samples).repeat_interleave(len(one))[None].to(device), one.repeat(samples)[None].to(device)


def build_decoder(options: argparse.Namespace) -> RoutedDecoder:
    """Return layers of the requested width with random weights."""
    torch.manual_seed(0)
    architecture = Architecture(
        base="eve",
        attention="causal",
        modality_experts=options.parts,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.groups,
    )
    decoder = RoutedDecoder(architecture).train()
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return decoder.to(device=torch.device(options.device), dtype=DTYPES[options.precision])


def passes(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Return for each variant a function that runs forward and backward and returns the states."""
    decoder = build_decoder(options)
    image_length = image_tokens("eve", (options.grid[0], options.grid[1]))
    samples_1T, is_image_1T = packed_row(options.samples, image_length, options.text_tokens, options.device)
    num_tokens = samples_1T.shape[1]
    states = torch.randn(1, num_tokens, options.hidden, device=options.device, dtype=DTYPES[options.precision])
    upstream = torch.randn_like(states)
    positions = torch.arange(num_tokens, device=options.device).expand(2, 1, -1)
    kinds = {
        "mixed": lambda: Mixed(is_image_1T),
        "routed": lambda: RoutedTokens(is_image_1T, image_length * options.samples),
    }

    def run(way: str) -> Tensor:
        decoder.zero_grad()
        zeros = torch.zeros_like(samples_1T)
        backend = attention_backend("auto", samples_1T, zeros, zeros > 0, None, dtype=states.dtype)
        hidden: Tensor = decoder(states.requires_grad_(), positions, backend, kinds[way]())
        hidden.backward(upstream)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return hidden.detach()

    return {way: lambda way=way: run(way) for way in kinds}  # type: ignore[misc]


def measured(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of each variant. The variants alternate; a warm-up round is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds + 1):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[way].append(time.perf_counter() - start)
    return seconds


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print and write the results; exit status 1 if the outputs of the variants differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--inner", type=int, default=4864, help="hidden width of the feed-forward network")
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--groups", type=int, default=2, help="number of key/value heads")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--parts", nargs="*", default=list(EXPERT_PARTS), choices=EXPERT_PARTS)
    parser.add_argument("--grid", type=int, nargs=2, default=[22, 29], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    runs = passes(options)
    expected, found = runs["mixed"](), runs["routed"]()
    difference = float((found - expected).abs().max())
    seconds = measured(runs, options.rounds)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    for way, times in seconds.items():
        print(f"{way:>8s} {median[way]:9.4f} s (from {min(times):.4f} to {max(times):.4f}), forward and backward")
    print(
        f"routed is {median['mixed'] / median['routed']:.2f} times as fast; results differ by {difference:.1e} at most"
    )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        result = {**settings, "code": code_version(), "seconds": seconds, "difference": difference}
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0 if difference < (1e-3 if options.precision == "fp32" else 0.5) else 1


if __name__ == "__main__":
    sys.exit(main())

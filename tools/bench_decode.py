"""Measure what torch.compile gains for the single tokens of answers (`predict.compile=decode`), and what it costs.

    python tools/bench_decode.py                                     the 0.5B model's proportions, scaled down for a CPU
    python tools/bench_decode.py --size 0.5b --device cuda --precision bf16 --answers 1 32 256
    python tools/bench_decode.py --json runs/bench_decode.json

One image of 480 x 640 is encoded, then some questions about it are answered together, with random weights and without
an end token. A token's time is that of a long answer less that of a short one, divided by the tokens between them;
plain and compiled take turns. The first compiled answer stands apart: it holds the compilation.
Compiled answers are compared with the plain ones. In half precision random weights may turn a token; that is counted.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pixel_sail.entry import one_message
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest
from pixel_sail.files import replace_text
from pixel_sail.model.generation import GenerationOutput, ImagePrefixes, generate
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.benchmarks import (
    BENCHMARK_QUESTION,
    BENCHMARK_SIZES,
    random_image,
    sized_config,
    small_tokenizer,
)
from pixel_sail.provenance import code_version, device_name
from pixel_sail.types import DTYPES

IMAGE_HW = (480, 640)
SHORT = 2


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """One number of answers at a time."""

    answers: int
    plain_seconds: float
    """Per token of all answers together."""
    compiled_seconds: float
    first_seconds: float
    """Of the first compiled answers, compilation included."""
    changed_answers: int


def build_predictor(size: str, *, precision: str, device: str) -> BatchPredictor:
    """Return a predictor with random weights."""
    tokenizer = small_tokenizer()
    config = sized_config(size, tokenizer)
    torch.manual_seed(0)
    model = PixelSailForSegmentation(config).eval()
    model.to(device=torch.device(device), dtype=DTYPES[precision])
    return BatchPredictor(model, PixelSailProcessor.for_model(tokenizer, config))


def timed_answers(
    predictor: BatchPredictor, prefixes: ImagePrefixes, number: int, tokens: int, *, compiled: bool
) -> tuple[float, list[GenerationOutput]]:
    """Return the seconds of answers of `tokens` tokens, and the answers."""
    texts = [predictor.question_ids(f"{BENCHMARK_QUESTION} {index}.", follows_image=True) for index in range(number)]
    start = time.perf_counter()
    (answers,) = generate(
        predictor.model, prefixes, [texts], max_new_tokens=tokens, end_ids=(), compiled=compiled
    )  # fmt: skip
    # Tokens are read on the host in every step, so that all work is done here.
    return time.perf_counter() - start, answers


def measure(
    predictor: BatchPredictor, prefixes: ImagePrefixes, number: int, *, tokens: int, rounds: int
) -> DecodeTimes:
    """Return the time of a token, plain and compiled, with `number` answers at a time."""
    first, answers = timed_answers(predictor, prefixes, number, SHORT + tokens, compiled=True)
    _, expected = timed_answers(predictor, prefixes, number, SHORT + tokens, compiled=False)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for compiled, own in seconds.items():
            short, long = (
                timed_answers(predictor, prefixes, number, length, compiled=compiled)[0]
                for length in (SHORT, SHORT + tokens)
            )
            own.append((long - short) / tokens)
    return DecodeTimes(
        answers=number,
        plain_seconds=statistics.median(seconds[False]),
        compiled_seconds=statistics.median(seconds[True]),
        first_seconds=first,
        changed_answers=sum(one.token_ids != two.token_ids for one, two in zip(answers, expected, strict=True)),
    )


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(BENCHMARK_SIZES), default="scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 8, 32], help="at a time")
    parser.add_argument("--tokens", type=int, default=32, help="of a long answer beyond those of a short one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    predictor = build_predictor(options.size, precision=options.precision, device=options.device)
    image = random_image(np.random.default_rng(0), IMAGE_HW)
    prefixes = predictor.encode([GenerationRequest(image=predictor.prepare(image), questions=())])
    assert prefixes is not None
    points = [
        measure(predictor, prefixes, number, tokens=options.tokens, rounds=options.rounds)
        for number in tqdm(options.answers, desc="points", unit="point")
    ]
    device = device_name()
    print(f"{options.size} model, {options.precision}, {device}, image {IMAGE_HW[0]} x {IMAGE_HW[1]}")
    print(f"{'answers':>8s} {'plain ms':>9s} {'compiled ms':>12s} {'ratio':>6s} {'first s':>8s} {'changed':>8s}")
    for point in points:
        print(
            f"{point.answers:8d} {1e3 * point.plain_seconds:9.1f} {1e3 * point.compiled_seconds:12.1f} "
            f"{point.plain_seconds / point.compiled_seconds:6.2f} {point.first_seconds:8.1f} {point.changed_answers:8d}"
        )
    result = {
        "size": options.size,
        "precision": options.precision,
        "device": device,
        "torch": torch.__version__,
        "code": code_version(),
        "points": [asdict(point) for point in points],
    }
    if options.json:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark `torch.compile` for token-by-token decoding (`predict.compile=decode`): time per token and compile time.

    python tools/bench_decode.py                                     the 0.5B model's proportions, scaled down for a CPU
    python tools/bench_decode.py --size 0.5b --device cuda --precision bf16 --answers 1 32 256
    python tools/bench_decode.py --json runs/bench_decode.json

One image of 480 x 640 is encoded, then several questions about it are answered in one batch, with random weights and no
end token. Time per token is the difference between a long and a short answer, divided by the difference in tokens.
Plain and compiled runs alternate. The first compiled answer, which includes compilation, is reported separately.
Compiled answers are compared with plain ones; in half precision, random weights may change a token, which is counted.
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
    """Results for one batch size."""

    answers: int
    plain_seconds: float
    """Seconds of one decoding step of the batch."""
    compiled_seconds: float
    first_seconds: float
    """Seconds of the first compiled answers, compilation included."""
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
    # Tokens are read on the host in every step, so all work is finished here.
    return time.perf_counter() - start, answers


def measure(
    predictor: BatchPredictor, prefixes: ImagePrefixes, number: int, *, tokens: int, rounds: int
) -> DecodeTimes:
    """Return the time of a token, plain and compiled, with a batch of `number` answers."""
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
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(BENCHMARK_SIZES), default="scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that a long answer has more than a short one")
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

"""Benchmark evaluation with shared image encoding: expressions per second of the released method and of ours.

    python tools/bench_eval.py                                   the 0.5B model's proportions, scaled down for a CPU
    python tools/bench_eval.py --size 0.5b --device cuda --precision bf16 --images 16
    python tools/bench_eval.py --json runs/bench_eval.json --png runs/bench_eval.png

The released method processes one expression at a time: it encodes the image again with a dense mask, runs the text head
at every position, grows the cache by concatenation, and recomputes the mask features. Ours is
`BatchPredictor.ask_many`: images of one grid size form a batch, each is encoded once, all its expressions are decoded
in one batch, and mask features are computed once per image. Both produce masks at image size in main memory. Other
overhead of the released code (hidden states of all layers, packing and unpacking masks, decoding images one by one) is
excluded.

Both use the same random weights, set up so that every answer is "It is [SEG].": the layers add almost nothing to the
token embeddings, and the text head maps each token to its successor. Answers and masks of both methods are compared.

`--json` writes, per number of expressions per image, the expressions per second, seconds and ratio, and `ratio_at_7`,
the ratio at RefCOCO's mean number of expressions per image.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixel_sail.config import PredictConfig
from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import save_panels, size_panel
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest, PreparedImage, resize_logits, span_length
from pixel_sail.files import replace_text
from pixel_sail.model.decoder import attend
from pixel_sail.model.image_layout import image_positions
from pixel_sail.model.mask_head import mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.benchmarks import (
    ANSWER,
    BENCHMARK_QUESTION,
    BENCHMARK_SIZES,
    random_image,
    sized_config,
    small_tokenizer,
)
from pixel_sail.provenance import code_version
from pixel_sail.types import DTYPES

IMAGE_HW = (480, 640)
"""COCO's usual size."""

REFCOCO_SPLITS = {"expressions": 57_457, "images": 9_900}
"""All 8 splits of RefCOCO, RefCOCO+ and RefCOCOg (UMD), images counted once per split."""
FLOOR_SECONDS = 43.0
"""The same 8 splits at 400 TFLOP/s, every image encoded once, for the 0.5B model."""


@dataclass(frozen=True, kw_only=True)
class EvalTimes:
    """Results for one number of expressions per image."""

    expressions_per_image: int
    released_seconds: float
    shared_seconds: float
    """Per expression."""
    changed_answers: int
    changed_pixels: float
    """Fraction of mask pixels in which the two methods differ."""

    @property
    def ratio(self) -> float:
        """Return the speedup of ours."""
        return self.released_seconds / self.shared_seconds

    def as_json(self) -> dict[str, float]:
        """Return the measured and derived values."""
        return asdict(self) | {
            "released_expressions_per_second": 1.0 / self.released_seconds,
            "shared_expressions_per_second": 1.0 / self.shared_seconds,
            "ratio": self.ratio,
        }


class GrowingCache:
    """Attention of the released code: one dense mask, keys and values concatenated for every token."""

    def __init__(self, device: torch.device) -> None:
        self.key_values: list[tuple[Tensor, Tensor]] = []
        self.device = device

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output: bidirectional for the image, causal for text."""
        if len(self.key_values) == layer:
            self.key_values.append((k_BGTE, v_BGTE))
            mask_TS = torch.ones(q_BATE.shape[2], k_BGTE.shape[2], dtype=torch.bool, device=self.device)
        else:
            keys, values = self.key_values[layer]
            self.key_values[layer] = (torch.cat((keys, k_BGTE), dim=2), torch.cat((values, v_BGTE), dim=2))
            num_keys, length = self.key_values[layer][0].shape[2], q_BATE.shape[2]
            mask_TS = torch.ones(length, num_keys, dtype=torch.bool, device=self.device).tril(num_keys - length)
        return attend(q_BATE, *self.key_values[layer], mask_TS[None, None])


@torch.no_grad()
def released_answer(predictor: BatchPredictor, image: PreparedImage, question: str) -> tuple[list[int], np.ndarray]:
    """Return the generated tokens and the masks [N, H, W] of one expression, computed as the released code does."""
    model, processor, grid = predictor.model, predictor.processor, image.grid_hw
    device, config = model.device, model.config
    span = [config.token_id("<vision>"), *[config.token_id("<vpatch>")] * len(image.patches_PK)]
    ids = torch.tensor([[*span, config.token_id("</vision>")]], device=device)
    no_prompts = torch.full_like(ids, -1)
    positions = image_positions(grid).to(device)
    cache = GrowingCache(device)
    hidden, _ = model.encode_prefix(ids, positions[:, None], image.patches_PK[None].to(device), no_prompts, cache)
    model.lm_head(hidden).float()
    patch_states = hidden[0, 1:-1].view(*grid, -1)
    consumed, position = processor.question_ids(question), int(positions.max()) + 1
    generated: list[int] = []
    seg_states: list[Tensor] = []
    while True:
        tokens = torch.tensor([consumed], device=device)
        steps = torch.arange(position, position + len(consumed), device=device)
        hidden = model.decoder(model.embed_tokens(tokens), steps.expand(2, 1, -1), cache)
        seg_states += [hidden[0, place] for place, token in enumerate(consumed) if token == processor.seg_id]
        generated.append(int(model.lm_head(hidden).float()[0, -1].argmax()))
        position += len(consumed)
        if generated[-1] == processor.end_id:
            break
        consumed = generated[-1:]
    features = model.mask_head.pixel_features(patch_states[None])[0]
    logits = mask_logits(model.mask_head.seg_queries(torch.stack(seg_states)), features)
    return generated, (resize_logits(logits, image.size_hw).sigmoid() > 0.5).cpu().numpy()


def build_predictor(size: str, *, precision: str, device: str, max_batch_tokens: int) -> BatchPredictor:
    """Return a predictor with random weights whose every answer is ANSWER."""
    tokenizer = small_tokenizer()
    config = sized_config(size, tokenizer, tie_word_embeddings=False)
    torch.manual_seed(0)
    model, processor = PixelSailForSegmentation(config).eval(), PixelSailProcessor.for_model(tokenizer, config)
    chain = [*processor.question_ids("x")[-1:], *processor.text_ids(ANSWER), processor.end_id]
    if len(set(chain)) != len(chain):
        raise RuntimeError(f"the answer's tokens {chain} repeat, expected each to name its successor")
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.self_attn.o_proj.weight.mul_(1e-2)
            layer.mlp.down_proj.weight.mul_(1e-2)
        for token, following in pairwise(chain):
            model.lm_head.weight[following] = 2.0 * model.embed_tokens.weight[token]
    settings = PredictConfig(max_batch_tokens=max_batch_tokens, max_new_tokens=len(chain) + 4)
    model.to(device=torch.device(device), dtype=DTYPES[precision])
    return BatchPredictor(model, processor, settings)


def random_images(predictor: BatchPredictor, number: int) -> list[PreparedImage]:
    """Return images of COCO's usual size."""
    rng = np.random.default_rng(0)
    return [predictor.prepare(random_image(rng, IMAGE_HW)) for _ in range(number)]


def timed_seconds(start: float, device: torch.device) -> float:
    """Return the seconds from `start` until all device work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    predictor: BatchPredictor, images: Sequence[PreparedImage], number: int, *, released_images: int
) -> EvalTimes:
    """Return the time per expression of both methods at `number` expressions per image."""
    questions = [f"{BENCHMARK_QUESTION} {index}." for index in range(number)]
    requests = [GenerationRequest(image=image, questions=questions) for image in images]
    device = predictor.model.device
    start = time.perf_counter()
    outputs = predictor.ask_many(requests)
    shared = timed_seconds(start, device) / (len(images) * number)
    start = time.perf_counter()
    released = [
        [released_answer(predictor, image, question) for question in questions] for image in images[:released_images]
    ]
    slow = timed_seconds(start, device) / (released_images * number)
    changed_answers, pixels = 0, []
    for own, expected in zip(outputs, released, strict=False):
        for output, (token_ids, masks_NHW) in zip(own, expected, strict=True):
            changed_answers += output.answer != predictor.processor.decode(token_ids).strip()
            if output.masks_NHW.shape == masks_NHW.shape:
                pixels.append((output.masks_NHW != masks_NHW).mean())
    return EvalTimes(
        expressions_per_image=number,
        released_seconds=slow,
        shared_seconds=shared,
        changed_answers=changed_answers,
        changed_pixels=float(np.mean(pixels)) if pixels else 0.0,
    )


def projected_seconds(points: Sequence[EvalTimes]) -> float:
    """Return the seconds for all 8 RefCOCO splits, from the point closest to their expressions per image."""
    wanted = REFCOCO_SPLITS["expressions"] / REFCOCO_SPLITS["images"]
    nearest = min(points, key=lambda point: abs(point.expressions_per_image - wanted))
    return nearest.shared_seconds * REFCOCO_SPLITS["expressions"]


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(BENCHMARK_SIZES), default="scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument(
        "--images", type=int, default=4, help="images per point; half as many for 16 or more expressions"
    )
    parser.add_argument(
        "--released-images", type=int, default=1, help="images of each point that the released method processes"
    )
    parser.add_argument("--expressions", type=int, nargs="+", default=[1, 2, 4, 7, 8, 16, 32])
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    predictor = build_predictor(
        options.size, precision=options.precision, device=options.device, max_batch_tokens=options.max_batch_tokens
    )
    images = random_images(predictor, options.images)
    measure(predictor, images[:1], 1, released_images=1)  # warm up
    points = [
        measure(
            predictor,
            images[: max(options.released_images, len(images) // (2 if number >= 16 else 1))],
            number,
            released_images=options.released_images,
        )
        for number in tqdm(options.expressions, desc="points", unit="point")
    ]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    title = f"{options.size} model, {options.precision}, {device}, image {IMAGE_HW[0]} x {IMAGE_HW[1]}"
    print(f"{title}, {span_length(images[0].grid_hw)} tokens per image")
    print(
        f"{'expr/image':>10s} {'released/s':>11s} {'ours/s':>9s} {'ratio':>6s} {'answers changed':>16s} {'pixels':>9s}"
    )
    for point in points:
        print(
            f"{point.expressions_per_image:10d} {1 / point.released_seconds:11.2f} {1 / point.shared_seconds:9.2f} "
            f"{point.ratio:6.2f} {point.changed_answers:16d} {point.changed_pixels:9.1e}"
        )
    result = {
        "size": options.size,
        "precision": options.precision,
        "device": device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "code": code_version(),
        "points": [point.as_json() for point in points],
        "ratio_at_7": next((point.ratio for point in points if point.expressions_per_image == 7), None),
    }
    if options.size == "0.5b":
        result["refcoco_8_splits_seconds"] = projected_seconds(points)
        print(f"all 8 RefCOCO splits: {projected_seconds(points):.0f} s; floor {FLOOR_SECONDS:.0f} s at 400 TFLOP/s")
    if options.json:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.png:
        rates = {
            "released method": [1 / point.released_seconds for point in points],
            "ours": [1 / point.shared_seconds for point in points],
        }
        numbers = [point.expressions_per_image for point in points]
        labels = {"x_label": "expressions per image", "y_label": "expressions per second"}
        save_panels(options.png, [size_panel("", numbers, rates, **labels)], title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark 8-bit decoder weights on a CPU: seconds per answer, memory, and agreement of masks with float32.

The decoder's linear layers use 8-bit weights and 8-bit per-token inputs (torchao). Heads, embeddings and norms stay in
float32. Needs the package torchao, which `make setup` does not install, and a C++ compiler for the compiled variant.

    pip install torchao
    python tools/bench_int8.py                               times with random weights of the 0.5B size
    python tools/bench_int8.py --agreement runs/quickstart   also compares the masks of a trained model
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pixel_sail.config import PredictConfig, TrainConfig, load_config
from pixel_sail.demo.examples import render_examples
from pixel_sail.entry import one_message
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest
from pixel_sail.evaluation.run import checkpoint_folder
from pixel_sail.files import replace_text
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import model_token_ids, train_tokenizer
from pixel_sail.provenance import code_version, device_name

MODEL = ["model=sail_0_5b", "name=bench_int8"]
IMAGE_HW = (480, 640)
ANSWER_TOKENS = 8
QUESTION = "Please segment the small dog to the left of the man in the red shirt."


def random_predictor(layers: int) -> BatchPredictor:
    """Return a model of the 0.5B width with random weights and a small vocabulary."""
    tokenizer = train_tokenizer([QUESTION] * 4, vocab_size=400, num_visual_prompts=15)
    token_ids = model_token_ids(tokenizer, num_visual_prompts=15)
    released = load_config("train", TrainConfig, MODEL).model.architecture
    torch.manual_seed(0)
    config = PixelSailConfig.from_architecture(
        replace(released, num_hidden_layers=layers, vocab_size=len(tokenizer), token_ids=token_ids)
    )
    processor = PixelSailProcessor.for_model(tokenizer, config)
    # No reachable end token, so that every answer has the same length.
    settings = PredictConfig(max_new_tokens=ANSWER_TOKENS)
    return BatchPredictor(PixelSailForSegmentation(config).eval(), processor, settings)


def with_int8(predictor: BatchPredictor, *, compiled: bool) -> BatchPredictor:
    """Return a copy whose decoder has 8-bit linear layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(predictor.model)
    quantize_(model.decoder, Int8DynamicActivationInt8WeightConfig())
    if compiled:
        for module in model.decoder.modules():
            if isinstance(module, nn.Linear):
                module.compile(dynamic=True)
    return BatchPredictor(model, predictor.processor, predictor.config)


def decoder_megabytes(predictor: BatchPredictor) -> float:
    """Return the megabytes of the decoder's weights."""
    total = 0
    for parameter in predictor.model.decoder.parameters():
        parts = [getattr(parameter, name, None) for name in ("qdata", "scale")]
        held = [part for part in parts if isinstance(part, torch.Tensor)] or [parameter]
        total += sum(part.numel() * part.element_size() for part in held)
    return total / 1e6


@torch.no_grad()
def seconds(predictor: BatchPredictor, rounds: int) -> dict[str, float]:
    """Return the median seconds of encoding one image, and of one token of an answer about it."""
    rng = np.random.default_rng(0)
    image = predictor.prepare(Image.fromarray(rng.integers(0, 256, (*IMAGE_HW, 3), dtype=np.uint8)))
    request = GenerationRequest(image=image, questions=[QUESTION])
    encode, whole = [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        predictor.encode([request])
        encode.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        predictor.ask_many([request])
        whole.append(time.perf_counter() - begun)
    # The first round warms up.
    encode_s, whole_s = statistics.median(encode[1:]), statistics.median(whole[1:])
    return {"encode_s": encode_s, "token_s": (whole_s - encode_s) / ANSWER_TOKENS}


def agreement(folder: str, scenes: int) -> dict[str, float]:
    """Return the agreement on synthetic scenes: mean IoU with the float32 masks, fraction of changed texts."""
    plain = BatchPredictor.from_pretrained(checkpoint_folder(folder), config=PredictConfig(max_new_tokens=16))
    small = with_int8(plain, compiled=False)
    overlaps, changed = [], 0
    for example in render_examples(scenes, "short"):
        (one,), (other,) = plain.ask(example.image, [example.text]), small.ask(example.image, [example.text])
        changed += one.text != other.text
        masks = [output.merged_mask("union") for output in (one, other)]
        if masks[0] is not None and masks[1] is not None and (masks[0] | masks[1]).any():
            overlaps.append(float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()))
    return {"scenes": scenes, "changed_texts": changed, "mean_iou": statistics.fmean(overlaps), "worst": min(overlaps)}


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 2 if torchao or the checkpoint is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agreement", metavar="RUN", help="a run folder or an exported folder")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        import torchao
    except ImportError:
        print("torchao is not installed: pip install torchao", file=sys.stderr)
        return 2
    found = agreement(options.agreement, options.scenes) if options.agreement else {}
    plain = random_predictor(options.layers)
    ways = {
        "float32": lambda: plain,
        "int8": lambda: with_int8(plain, compiled=False),
        "int8, compiled": lambda: with_int8(plain, compiled=True),
    }
    rows = {}
    for name, make in ways.items():
        predictor = make()
        rows[name] = seconds(predictor, options.rounds) | {"decoder_mb": decoder_megabytes(predictor)}
        print(
            "{:<16} image {encode_s:6.2f} s   token {token_s:6.3f} s   decoder {decoder_mb:6.0f} MB".format(
                name, **rows[name]
            )
        )
    if found:
        print("agreement with float32: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if options.json:
        made_by = {"code": code_version(), "device": device_name(), "torchao": torchao.__version__}
        replace_text(options.json, json.dumps({**made_by, "ways": rows, "agreement": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

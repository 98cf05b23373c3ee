"""Model sizes and synthetic samples for the benchmarks in `tools/`.

`tools/bench_*.py` and `tools/count_step.py` share them, so that their results are about the same models and work:

    sized_config("scaled", small_tokenizer())    width 256, 6 layers, the 0.5B model's proportions
    synthetic_examples(processor, 2, expressions=5, size_hw=(480, 640))    an image and five questions with a box each
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from pixel_sail.data.collate import collate
from pixel_sail.data.packing import PackedSequence, StreamState
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import model_token_ids, train_tokenizer
from pixel_sail.types import Batch, Example, Sample, SizeHW, Turn

BENCHMARK_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 600, "mask_dim": 16},
    # The quickstart's model, except for its vocabulary.
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 704, "mask_dim": 128},
    # Width, depth and vocabulary scaled down together. At stride 2 the cost of its mask head relative to the decoder is
    # four times that in the 0.5B model, because it has a quarter of the layers. So is that of attention, because the
    # model is narrower.
    "scaled": {"hidden_size": 256, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 4,
               "num_key_value_heads": 1, "vocab_size": 11_264, "mask_dim": 144},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_680, "mask_dim": 512},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151_680, "mask_dim": 512},
}  # fmt: skip

ANSWER = "It is [SEG]."
BENCHMARK_QUESTION = "Please segment the small dog to the left of the man in the red shirt number"
"""A number is appended to distinguish the questions about an image."""
PROMPTS_PER_IMAGE = 15
"""Visual prompts in the tokenizer's vocabulary."""


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the benchmarks' own words; the model's vocabulary is larger."""
    return train_tokenizer([ANSWER, f"{BENCHMARK_QUESTION}."] * 4, vocab_size=500, num_visual_prompts=PROMPTS_PER_IMAGE)


def sized_config(size: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PixelSailConfig:
    """Return the configuration of a model of one of `BENCHMARK_SIZES`, with some fields changed."""
    token_ids = model_token_ids(tokenizer, num_visual_prompts=PROMPTS_PER_IMAGE)
    return PixelSailConfig.from_architecture(
        Architecture(**{**BENCHMARK_SIZES[size], "token_ids": token_ids, **changes})
    )


def random_image(rng: np.random.Generator, size_hw: SizeHW) -> Image.Image:
    """Return an image of noise."""
    return Image.fromarray(rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8))


def synthetic_examples(
    processor: PixelSailProcessor, number: int, *, expressions: int, size_hw: SizeHW, independent_turns: bool = False
) -> list[Example]:
    """Return samples of one synthetic image each, every expression with a box for a mask."""
    rng, examples = np.random.default_rng(0), []
    for index in range(number):
        turns = []
        for turn in range(expressions):
            mask = np.zeros(size_hw, dtype=bool)
            top, left = (int(rng.integers(side // 2)) for side in size_hw)
            mask[top : top + size_hw[0] // 3, left : left + size_hw[1] // 3] = True
            turns.append(Turn(question=f"{BENCHMARK_QUESTION} {turn}.", answer=ANSWER, masks=(mask,)))
        sample = Sample(sample_id=str(index), source="synthetic", image_path=None, image_hw=size_hw, turns=tuple(turns))
        examples.append(
            processor.encode_sample(sample, random_image(rng, size_hw), independent_turns=independent_turns)
        )
    return examples


def packed(examples: Sequence[Example], per_sequence: int, seg_id: int) -> list[Batch]:
    """Return the samples as batches of one row on the host."""
    groups = [examples[first : first + per_sequence] for first in range(0, len(examples), per_sequence)]
    sequences = [PackedSequence(stream=0, after=StreamState(next=1), examples=tuple(group)) for group in groups]
    return [collate([sequence], seg_id=seg_id) for sequence in sequences]

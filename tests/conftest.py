"""Fixtures shared by several test files: an untrained tokenizer, tiny models, synthetic images, samples and batches.

The header of a test run shows processor and BLAS, because these determine how numbers are rounded.
"""

import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import data_root  # noqa: F401, a fixture for all tests

from pixel_sail.data.collate import collate
from pixel_sail.data.packing import PackedSequence, StreamState
from pixel_sail.model import attention_backends, upsampler
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import model_token_ids, train_tokenizer
from pixel_sail.types import Sample, Turn, VisualPrompt

NUM_PROMPTS = 15
WORDS = ("red", "left", "star", "the small", "box", "behind it", "of", "round")


def machine_line():
    """Return processor, cores, torch, instruction set and BLAS of this run."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return (
        f"machine: {named[1].strip() if named else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, BLAS {blas[1] if blas else 'unknown'}, "
        f"oneDNN {'on' if torch.backends.mkldnn.is_available() else 'off'}"
    )


def pytest_report_header():
    return machine_line()


def pytest_terminal_summary(terminalreporter):
    # `make test` passes -q, which prints no header.
    if not terminalreporter.showheader:
        terminalreporter.write_line(machine_line())


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Write annotation indexes to a folder of this session, also those of started commands."""
    os.environ["PIXEL_SAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def as_large_images(monkeypatch):
    """Compute the tests' tiny images like large ones, as plans assume."""
    monkeypatch.setattr(attention_backends, "fastest_on_cpu", lambda spans, shape: "segments")
    monkeypatch.setattr(upsampler, "SMALL_MAP", 0)


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    """Every test starts from the same global seed and runs torch on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([], vocab_size=320, num_visual_prompts=NUM_PROMPTS)


@pytest.fixture(scope="session")
def make_config(tokenizer):
    """Return a function from changed fields to a tiny configuration.

    Weights are sampled ten times wider than usual: attention is uneven, so a wrongly visible token changes results.
    """
    token_ids = model_token_ids(tokenizer, num_visual_prompts=NUM_PROMPTS)

    def make(**changes):
        fields = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "patch_size": 8,
            "max_long_side": 64,
            "mask_stride": 4,
            "mask_dim": 16,
            "token_ids": token_ids,
        }
        return PixelSailConfig.from_architecture(Architecture(**(fields | changes)))

    return make


@pytest.fixture(scope="session")
def tiny_config(make_config):
    return make_config()


@pytest.fixture(scope="session")
def tiny_model(make_config):
    """Return a function from a seed and changed fields to a newly initialized model in evaluation mode."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return PixelSailForSegmentation(make_config(**changes)).eval()

    return make


@pytest.fixture(scope="session")
def processor(tokenizer, tiny_config):
    return PixelSailProcessor.for_model(tokenizer, tiny_config)


@pytest.fixture(scope="session")
def make_image():
    def make(rng, size_hw):
        return Image.fromarray(rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def make_sample(make_image):
    """Return a function that samples a sample with one turn per entry of `masks_per_turn`, and its image."""

    def make(rng, *, size_hw=(16, 24), masks_per_turn=(1,), prompts=(), sample_id="random", path=None):
        turns = tuple(_random_turn(rng, size_hw, num_masks) for num_masks in masks_per_turn)
        painted = tuple(VisualPrompt(prompt_id=i, mask=_random_mask(rng, size_hw)) for i in prompts)
        sample = Sample(
            sample_id=sample_id, source="random", image_path=path, image_hw=size_hw, turns=turns, prompts=painted
        )
        return sample, make_image(rng, size_hw) if size_hw else None

    return make


def _random_mask(rng, size_hw):
    mask = rng.random(size_hw) < 0.3
    mask[0, 0] = True
    return mask


def _random_turn(rng, size_hw, num_masks):
    question = " ".join(rng.choice(WORDS, size=rng.integers(1, 4)))
    answer = " and ".join(["here [SEG]"] * num_masks) or "no"
    return Turn(question=question, answer=answer, masks=tuple(_random_mask(rng, size_hw) for _ in range(num_masks)))


@pytest.fixture(scope="session")
def make_batch(processor):
    """Return a function from rows of examples to the batch with one packed row for each."""

    def make(*rows):
        sequences = [
            PackedSequence(stream=i, after=StreamState(next=len(row)), examples=tuple(row))
            for i, row in enumerate(rows)
        ]
        return collate(sequences, seg_id=processor.seg_id)

    return make

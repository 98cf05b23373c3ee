"""Benchmark data loading: samples per second, memory per worker, padding, and the fraction of a training step.

    python tools/bench_data.py                                         all synthetic sources, the 0.5B model
    python tools/bench_data.py data=refcoco --seq-len 4608             any data group, model or experiment
    python tools/bench_data.py --json runs/bench_data.json --sequences 64 data.packing.packing_buffer=16

Render the synthetic data with tools/make_refshapes.py first. Overrides are those of scripts/train.py. Three
measurements: samples one by one in this process (time per stage), sequences of one stream (padding), and the training
loader with worker processes (rate, memory, CPU time that the training process spends receiving sequences). They give

    data work of a step    worker seconds per sequence / workers + seconds per sequence in the training process
    step                   3 x forward FLOPs of the sequence / rate          (backward: 2 x forward, none recomputed)

Workers run in parallel to the GPU, so the first term costs nothing while the sum is below 100 %. The goal is 15 %.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.images import load_image
from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings, StreamState
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import load_tokenizer, train_tokenizer
from pixel_sail.planning.flops import BACKWARD_AND_FORWARD
from pixel_sail.planning.parameters import QWEN_VOCABULARY
from pixel_sail.training.prepare import build_mixture
from pixel_sail.types import IGNORE_LABEL, Example

DEFAULT_OVERRIDES = {"name": "bench_data", "data": "refshapes_all", "model": "sail_0_5b"}
"""Overrides for groups that the command line does not set."""

GOAL = 0.15


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Mean milliseconds of one sample in one process."""

    annotation: float
    image: float
    tokens: float
    num_turns: float
    num_masks: float

    @property
    def total(self) -> float:
        """Return the sum of all stages."""
        return self.annotation + self.image + self.tokens


@dataclass(frozen=True, kw_only=True)
class SequenceFigures:
    """Contents of the sequences of one stream."""

    num_sequences: int
    samples_per_sequence: float
    tokens_per_sequence: float
    filled: float
    """Fraction of the token slots that hold a token."""
    forward_tflop: float
    """Mean per sequence."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Measurements of the training loader and its processes."""

    num_workers: int
    samples_per_second: float
    main_ms_per_sequence: float
    """CPU time of the training process: receiving sequences from the workers and collating batches."""
    private_mb: float
    """Private memory of one worker."""
    proportional_mb: float
    """Proportional set size (PSS): the same plus its fraction of shared pages."""


def forward_flops(architecture: Architecture, examples: Sequence[Example], *, vocab_size: int) -> float:
    """Return the floating-point operations of one forward pass over these samples, two per multiplication and addition.

    Counted: linear layers of the decoder, attention between tokens that see each other, patch embedding, head on
    supervised tokens only, mask head for images with masks. Norms, activations and losses are not counted.
    """
    width, layers = architecture.hidden_size, architecture.num_hidden_layers
    key_value = architecture.num_key_value_heads * architecture.head_dim
    linear = layers * (2 * width * width + 2 * width * key_value + 3 * width * architecture.intermediate_size)
    total = 0.0
    for example in examples:
        num_patches = int((example.patch_index_T >= 0).sum())
        num_supervised = int((example.labels_T != IGNORE_LABEL).sum())
        total += len(example) * linear + layers * 2 * width * _seen_pairs(example)
        total += num_patches * 3 * architecture.patch_size**2 * width + num_supervised * width * vocab_size
        if example.masks:
            total += _mask_head_products(architecture, num_patches, len(example.masks))
    return 2 * total


def _seen_pairs(example: Example) -> int:
    """Return the number of (query, key) pairs of attention: full within the image, causal for text, which sees the
    image."""
    num_image = int(example.in_image_T.sum())
    pairs = num_image * num_image
    for branch in example.branch_ids_T[~example.in_image_T].unique():
        num_text = int(((example.branch_ids_T == branch) & ~example.in_image_T).sum())
        pairs += num_text * num_image + num_text * (num_text + 1) // 2
    return pairs


def _mask_head_products(architecture: Architecture, num_patches: int, num_masks: int) -> float:
    """Return the multiplications of upsampler, projections and dot products for one image."""
    width, channels, size = architecture.hidden_size, architecture.feature_size, architecture.mask_dim
    total: float = num_patches * (width * width + width * channels) if width > channels else 0
    cells = num_patches
    for _ in range(architecture.num_upsample_blocks):
        cells *= 4
        total += cells * (2 * channels * channels + 9 * channels)
    # The last layer is folded into the queries (`kernels.mask_head`).
    total += cells * channels * channels
    return total + num_masks * (width * channels + 2 * channels * size + cells * channels)


def time_stages(mixture: Mixture, processor: PixelSailProcessor, settings: PackingSettings, num_samples: int) -> Stages:
    """Time the stages of each sample. Every file is read once before, so that the disk is not measured."""
    seconds = [0.0, 0.0, 0.0]
    num_turns = num_masks = 0
    for position in tqdm(range(-num_samples, num_samples), desc="samples", leave=False, disable=None):
        times = [time.perf_counter()]
        sample = mixture.item(position % num_samples).sample
        times.append(time.perf_counter())
        path, where = sample.image_path, sample.sample_id
        image = None if path is None else load_image(path, where=where, expected_hw=sample.image_hw)
        times.append(time.perf_counter())
        processor.encode_sample(sample, image, independent_turns=settings.independent_turns)
        times.append(time.perf_counter())
        if position >= 0:
            seconds = [total + times[i + 1] - times[i] for i, total in enumerate(seconds)]
            num_turns += len(sample.turns)
            num_masks += sum(len(turn.masks) for turn in sample.turns)
    annotation, image_time, tokens = (1000 * total / num_samples for total in seconds)
    return Stages(
        annotation=annotation,
        image=image_time,
        tokens=tokens,
        num_turns=num_turns / num_samples,
        num_masks=num_masks / num_samples,
    )


def measure_packing(
    mixture: Mixture,
    processor: PixelSailProcessor,
    settings: PackingSettings,
    architecture: Architecture,
    num_sequences: int,
    *,
    vocab_size: int,
) -> SequenceFigures:
    """Pack sequences of one stream and count tokens."""
    stream = PackedStream(mixture, processor, settings, index=0, num_streams=1)
    num_samples = num_tokens = 0
    flops = 0.0
    for sequence in tqdm(
        islice(stream, num_sequences), desc="sequences", total=num_sequences, leave=False, disable=None
    ):
        num_samples += len(sequence.examples)
        num_tokens += sum(len(example) for example in sequence.examples)
        flops += forward_flops(architecture, sequence.examples, vocab_size=vocab_size)
    return SequenceFigures(
        num_sequences=num_sequences,
        samples_per_sequence=num_samples / num_sequences,
        tokens_per_sequence=num_tokens / num_sequences,
        filled=num_tokens / num_sequences / settings.seq_len,
        forward_tflop=flops / num_sequences / 1e12,
    )


def run_workers(
    mixture: Mixture, processor: PixelSailProcessor, settings: PackingSettings, num_workers: int, num_sequences: int
) -> Workers:
    """Run the loader of the training loop, one stream per worker, and measure after a warm-up round."""
    assignment = StreamAssignment(global_batch_size=num_workers, rank=0, world_size=1, micro_batch_size=1)
    start = [StreamState()] * num_workers
    steps = training_batches(mixture, processor, settings, assignment, start=start, num_workers=num_workers)
    rounds = -(-num_sequences // num_workers)
    # The loader prefetches four sequences per worker; they must not count as fast ones.
    for _ in range(4):
        next(steps)
    began, cpu = time.perf_counter(), time.process_time()
    num_samples = sum(
        len(batch.sample_ids)
        for step in tqdm(islice(steps, rounds), desc="loader", total=rounds, leave=False, disable=None)
        for batch in step.batches
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    memory = [process_memory(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
    del steps
    return Workers(
        num_workers=num_workers,
        samples_per_second=num_samples / seconds,
        main_ms_per_sequence=1000 * cpu_seconds / (rounds * num_workers),
        private_mb=max(private for private, _ in memory),
        proportional_mb=max(proportional for _, proportional in memory),
    )


def process_memory(pid: int) -> tuple[float, float]:
    """Return private and proportional megabytes of a process, from /proc."""
    values: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        values[name] = int(amount)
    return (values["Private_Clean:"] + values["Private_Dirty:"]) / 1024, values["Pss:"] / 1024


def data_fraction(
    stages: Stages, sequences: SequenceFigures, workers: Workers, *, num_workers: int, flop_rate: float
) -> dict[str, float]:
    """Return the milliseconds of a training step on one sequence, of its data work, and their ratio."""
    worker_ms = stages.total * sequences.samples_per_sequence
    step_ms = 1000 * BACKWARD_AND_FORWARD * sequences.forward_tflop * 1e12 / flop_rate
    data_ms = worker_ms / num_workers + workers.main_ms_per_sequence
    return {"worker_ms": worker_ms, "data_ms": data_ms, "step_ms": step_ms, "fraction": data_ms / step_ms}


def processor_of(config: TrainConfig, mixture: Mixture) -> tuple[PixelSailProcessor, int, str]:
    """Return the model's processor, its vocabulary size and a description of the tokenizer. If the tokenizer's folder
    is missing, one is trained on the mixture's text."""
    architecture, folder = config.model.architecture, config.model.tokenizer
    num_prompts = architecture.num_visual_prompts
    if Path(folder).is_dir():
        tokenizer = load_tokenizer(folder, num_visual_prompts=num_prompts)
        return PixelSailProcessor.for_model(tokenizer, architecture), len(tokenizer), folder
    turns = [turn for i in range(min(mixture.epoch_length, 500)) for turn in mixture.item(i).sample.turns]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    trained = train_tokenizer(texts, vocab_size=4096, num_visual_prompts=num_prompts)
    note = f"{folder} is missing, replaced by {len(trained)} tokens trained on the data's text"
    return PixelSailProcessor.for_model(trained, architecture), QWEN_VOCABULARY, note


def report(options: argparse.Namespace, config: TrainConfig) -> dict[str, object]:
    """Run all measurements, print them and return them."""
    torch.set_num_threads(1)
    mixture = build_mixture(config.data, seed=config.seed)
    processor, vocab_size, tokenizer = processor_of(config, mixture)
    settings, architecture = config.data.packing, config.model.architecture
    num_samples = min(options.samples, mixture.epoch_length * 20)
    stages = time_stages(mixture, processor, settings, num_samples)
    sequences = measure_packing(mixture, processor, settings, architecture, options.sequences, vocab_size=vocab_size)
    workers = run_workers(mixture, processor, settings, options.processes, options.sequences)
    cost = data_fraction(stages, sequences, workers, num_workers=options.workers, flop_rate=options.flop_rate)
    mean, ratio = f"{stages.total:.1f} ms in one process = {1000 / stages.total:.0f} samples/s", cost["fraction"]
    verdict = f"{ratio:.1%} of a step: {'less' if ratio < GOAL else 'NOT less'} than {GOAL:.0%}"
    rate = f"{workers.samples_per_second:.0f} samples/s"
    lines = (
        ("sources", f"{', '.join(mixture.names)}: {mixture.epoch_length} samples an epoch"),
        ("tokenizer", tokenizer),
        ("sample", mean),
        ("", f"{stages.annotation:6.2f} ms annotation: {stages.num_turns:.1f} turns, {stages.num_masks:.1f} masks"),
        ("", f"{stages.image:6.2f} ms opening the image"),
        ("", f"{stages.tokens:6.2f} ms resizing, patches and tokens"),
        (
            "sequence",
            f"{sequences.samples_per_sequence:.2f} samples, {sequences.tokens_per_sequence:.0f} of "
            f"{settings.seq_len} tokens",
        ),
        (
            "",
            f"{sequences.filled:.1%} filled, {1 - sequences.filled:.1%} padding ({sequences.num_sequences} in all)",
        ),
        ("loader", f"{workers.num_workers} workers on {os.cpu_count()} cores: {rate}"),
        ("", f"{workers.private_mb:.0f} MB private, {workers.proportional_mb:.0f} MB PSS per worker"),
        ("", f"{workers.main_ms_per_sequence:.1f} ms of the training process per sequence"),
        (
            "step",
            f"3 x {sequences.forward_tflop:.2f} TFLOP / {options.flop_rate:.3g} FLOP/s = {cost['step_ms']:.1f} ms",
        ),
        ("data", f"{cost['worker_ms']:.1f} ms / {options.workers} workers + {workers.main_ms_per_sequence:.1f} ms"),
        ("", f"= {cost['data_ms']:.1f} ms, {verdict}"),
    )
    print("\n".join(f"{title:11}{text}" for title, text in lines))
    measured = {"stages": asdict(stages), "sequences": asdict(sequences), "workers": asdict(workers), "cost": cost}
    return {"data": list(mixture.names), "tokenizer": tokenizer, "seq_len": settings.seq_len, **measured}


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence (8192)")
    parser.add_argument("--samples", type=int, default=100, help="samples timed stage by stage (100)")
    parser.add_argument("--sequences", type=int, default=40, help="sequences for padding and for the loader (40)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="loader workers to start")
    parser.add_argument("--workers", type=int, default=8, help="loader workers assumed for the computed step (8)")
    parser.add_argument("--flop-rate", type=float, default=400e12, help="FLOP/s of the training GPU (4e14)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options, overrides = parser.parse_known_args(arguments)
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    missing = [
        f"{key}={value}" for key, value in DEFAULT_OVERRIDES.items() if key not in given and "experiment" not in given
    ]
    budget = [] if "data.packing.seq_len" in given else [f"data.packing.seq_len={options.seq_len}"]
    result = report(options, load_config("train", TrainConfig, [*missing, *budget, *overrides]))
    if options.json is not None:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Estimate the cost of a run before it starts: parameters, FLOPs, hours, memory per GPU, disk.

    python tools/plan_run.py experiment=quickstart gpu=cpu gpus=2
    python tools/plan_run.py name=x model=sail_3b data=cotrain_3b optim.steps=20000 optim.precision=bf16 gpus=32
    python tools/plan_run.py name=x model=sail_3b data=cotrain_3b optim.steps=null optim.epochs=1 gpus=32 sequences=0
    python tools/plan_run.py ... mfu=0.45 gpu=h200 peak_tflops=989 --json plan.json

Overrides are those of scripts/train.py; `gpu` (h100, h200, a100, 4090, cpu), `gpus`, `mfu` and `peak_tflops`
describe the machine. If the files of the configured data exist, the cost of a step is estimated from `sequences=N`
packed sequences (16), and samples per sequence from the lengths of up to 4,096 samples. With `sequences=0` or missing
files, samples are assumed: images of COCO's sizes, `text_tokens=`, `supervised_fraction=`, `masks_per_image=`,
`images_with_masks=`, packed as in the run, and `data.planned_samples` per epoch. Nothing is trained and no GPU is used.

Time is the model's FLOPs at the given MFU, plus recomputation and teachers at the same rate. Data loading, validation
and checkpoints are not included. Frozen parameters reduce the memory of gradients and moments, but their backward pass
is counted in full. tests/test_plan_run.py compares the formulas with tiny runs.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.packing import StreamState
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import load_tokenizer, train_tokenizer
from pixel_sail.planning.assumed import Assumptions, assumed_sequences
from pixel_sail.planning.length import Length, length_of, measured_length
from pixel_sail.planning.parameters import TrainingParts, fill_in_vocabulary
from pixel_sail.planning.plan import Machine, make_plan, plan_text
from pixel_sail.planning.workload import Workload, of_batch
from pixel_sail.training.build import add_training_parts
from pixel_sail.training.muon import ORTHOGONAL
from pixel_sail.training.optim import freeze, parameter_groups
from pixel_sail.training.prepare import build_mixture, sample_cost
from pixel_sail.types import DataError

logger = logging.getLogger("plan_run")

DEFAULT_SEQUENCES = 16

MACHINE_KEYS = {"gpu": str, "gpus": int, "mfu": float, "peak_tflops": float}
ASSUMED_KEYS = {field.name: float for field in fields(Assumptions) if field.name != "image_hw"}
WHOLE_NUMBERS = ("text_tokens", "masks_per_image")


def split_arguments(arguments: Sequence[str]) -> tuple[Machine, Assumptions, int, list[str]]:
    """Return the machine, the assumptions, the number of sequences to read, and the overrides. Raises: ConfigError."""
    machine: dict[str, Any] = {}
    assumptions: dict[str, Any] = {}
    sequences, overrides = DEFAULT_SEQUENCES, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        try:
            if key == "sequences":
                sequences = int(value)
            elif key in MACHINE_KEYS:
                machine[key] = MACHINE_KEYS[key](value)
            elif key in ASSUMED_KEYS:
                assumptions[key] = int(value) if key in WHOLE_NUMBERS else float(value)
            else:
                overrides.append(argument)
        except ValueError:
            raise ConfigError(f"found {argument!r}, expected a number") from None
    if sequences < 0:
        raise ConfigError(f"sequences is {sequences}, expected 0 or more")
    if not any(override.startswith(("name=", "experiment=")) for override in overrides):
        overrides.append("name=plan")
    return Machine(**machine), Assumptions(**assumptions), sequences, overrides


def measure(config: TrainConfig, num_sequences: int, *, gpus: int) -> tuple[list[Workload], Length]:
    """Return the micro-batches of the first sequences of the data, and the length of the run.

    Raises: DataError when files are missing.
    """
    mixture = build_mixture(config.data, seed=config.seed)
    architecture, folder = config.model.architecture, Path(config.model.tokenizer)
    prompts = architecture.num_visual_prompts
    if folder.is_dir():
        tokenizer = load_tokenizer(str(folder), num_visual_prompts=prompts)
    else:
        turns = [turn for i in range(min(mixture.epoch_length, 200)) for turn in mixture.item(i).sample.turns]
        texts = [text for turn in turns for text in (turn.question, turn.answer)]
        tokenizer = train_tokenizer(texts, vocab_size=4096, num_visual_prompts=prompts)
    rows = config.data.micro_batch_size
    count = max(num_sequences // rows, 1)
    assignment = StreamAssignment(global_batch_size=rows, rank=0, world_size=1, micro_batch_size=rows)
    processor, cost = PixelSailProcessor.for_model(tokenizer, architecture), sample_cost(config)
    steps = training_batches(
        mixture,
        processor,
        config.data.packing,
        assignment,
        start=[StreamState()] * rows,
        num_workers=0,
        max_skipped_fraction=config.data.max_skipped_fraction,
        cost=cost,
    )
    works = [of_batch(batch) for step in islice(steps, count) for batch in step.batches]
    return works, measured_length(config, mixture, processor, group=gpus * rows, cost=cost)


def assume(config: TrainConfig, assumptions: Assumptions, *, gpus: int) -> tuple[list[Workload], Length]:
    """Return micro-batches of assumed samples, and the length of the run for the planned samples per epoch.

    Raises: ConfigError if the length depends on a number of samples that is not configured.
    """
    data = config.data
    rows = data.micro_batch_size
    works, forecast = assumed_sequences(config.model.architecture, data.packing, assumptions, rows=rows)
    return works, length_of(config, forecast, items=data.planned_samples, group=gpus * rows, is_assumed=True)


def training_parts(config: TrainConfig) -> TrainingParts:
    """Return the parameter counts of a model on the meta device; the vocabulary size must be set."""
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(config.model.architecture))
    add_training_parts(model, config.model.lora, seed=config.seed, teachers=config.distillation)
    freeze(model, config.optim)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapters = sum(count for name, count in counts.items() if ".lora_" in name)
    trained = sum(counts[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    groups = parameter_groups(model, config.optim)
    orthogonal = sum(p.numel() for group in groups if group.get(ORTHOGONAL, False) for p in group["params"])
    return TrainingParts(adapters=adapters, trained=trained, orthogonal=orthogonal)


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; wrong input ends with one message and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the plan to this file; - prints only JSON"
    )
    options, rest = parser.parse_known_args(arguments)
    machine, assumptions, sequences, overrides = split_arguments(rest)
    config = load_config("train", TrainConfig, overrides)
    if remark := fill_in_vocabulary(config.model):
        logger.warning(remark)
    measured = None
    if sequences:
        try:
            measured = measure(config, sequences, gpus=machine.gpus)
        except DataError as error:
            logger.warning("the data cannot be read, so its contents are assumed: %s", error)
    works, length = measured or assume(config, assumptions, gpus=machine.gpus)
    plan = make_plan(
        config,
        works,
        machine,
        length=length,
        assumptions=assumptions if measured is None else None,
        training_parts=training_parts(config),
    )
    text = json.dumps(plan, indent=1) + "\n"
    if options.json is not None and str(options.json) == "-":
        print(text, end="")
        return 0
    print(plan_text(plan))
    if options.json is not None:
        replace_text(options.json, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

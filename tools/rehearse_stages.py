"""Run the four training stages of docs/stages.md in order with a tiny model on RefShapes, and print held-out losses.

    python tools/rehearse_stages.py --out runs/rehearsal --steps 60

Each stage starts from the export of the previous one. Losses on held-out data are printed before and after each stage:
nats per supervised token for captions and chat; these, BCE and dice for the mix; BCE and dice for referring
segmentation. RefShapes has no image captions, so they are composed from the region descriptions of its Osprey file.
Requires the data rendered by `make quickstart`. Exit status 1 if a stage did not improve all its losses.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.packing import StreamState
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.losses.total import count, loss_sums
from pixel_sail.training.build import build_model
from pixel_sail.training.prepare import build_mixture
from pixel_sail.types import DataError

ROOT = Path(__file__).resolve().parent.parent

NUM_HELD_OUT = 200
"""Number of held-out records at the end of a file."""
BATCHES = 24

COMMON = (
    *("model=tiny", "model.architecture.hidden_size=64", "model.architecture.intermediate_size=176"),
    *("model.architecture.num_attention_heads=2", "model.architecture.num_key_value_heads=1"),
    *("deepspeed=none", "optim.precision=fp32", "optim.lr=1.5e-3", "log.tensorboard=false"),
    *("optim.epochs=null", "data.samples_per_step=null"),
    *("data.global_batch_size=16", "data.micro_batch_size=8", "data.stream_rounds=1", "data.num_workers=1"),
    *("data.packing.seq_len=512", "data.packing.max_samples=1", "data.packing.independent_turns=true"),
    *("data.decontamination.held_out=[]", "loss.points.num_points=1024", "loss.points.oversample_ratio=1.0"),
    *("loss.points.importance_ratio=0.0", "loss.dice=2.0"),
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training, and the held-out data of its losses."""

    name: str
    overrides: tuple[str, ...]
    held_out: tuple[str, ...]
    """Overrides that replace the training data by the held-out data."""
    figures: tuple[str, ...]


def stages(data: Path, steps: int) -> list[Stage]:
    """Return the four stages; the first has two passes."""
    images = f"{data}/refshapes/images"
    where = f"paths.data={data}"
    captions = (
        "stage=pretrain",
        f"data.sources.llava_pretrain.image_dir={images}/train2014",
        f"optim.steps={steps}",
        where,
    )
    chat = (f"data.sources.llava_mix665k.image_dir={images}", f"optim.steps={steps}", where)
    file = "data.sources.{}.annotations={}"
    held_captions = (file.format("llava_pretrain", "captions_held_out.json"),)
    short = ("+data.sources.{}.question_style=short", "+data.sources.{}.expressions_per_image=6")
    masks = tuple(one.format(name) for name in ("refshapes", "groupshapes") for one in short)
    # Without sources that have no val split.
    val = ("data.sources.refshapes.split=val", "+data.repeats.groupshapes=0")
    return [
        Stage(
            name="pretrain_patches",
            overrides=(*captions, "tuning=patch_embedding_only", file.format("llava_pretrain", "captions.json")),
            held_out=held_captions,
            figures=("text",),
        ),
        Stage(
            name="pretrain",
            overrides=(*captions, "optim.lr=1.0e-3", file.format("llava_pretrain", "captions.json")),
            held_out=held_captions,
            figures=("text",),
        ),
        Stage(
            name="sft",
            overrides=("stage=sft", *chat, "optim.lr=1.0e-3", file.format("llava_mix665k", "chat.json")),
            held_out=(file.format("llava_mix665k", "chat_held_out.json"),),
            figures=("text",),
        ),
        Stage(
            name="cotrain",
            overrides=(
                *("stage=cotrain", "data=refshapes_regions", f"optim.steps={2 * steps}", where, *masks),
                file.format("osprey_short_form", "questions.json"),
            ),
            held_out=(*val, file.format("osprey_short_form", "questions_held_out.json")),
            figures=("text", "bce", "dice"),
        ),
        Stage(
            name="finetune",
            overrides=("stage=finetune", "data=refshapes", f"optim.steps={2 * steps}", where, *masks),
            held_out=val,
            figures=("bce", "dice"),
        ),
    ]


def write_files(data: Path, out: Path) -> None:
    """Write captions, chat and questions about regions of RefShapes, with the last records held out. Raises:
    DataError."""
    folder = data / "refshapes"
    try:
        described = json.loads((folder / "osprey" / "osprey_detail_description.json").read_text())
        chat = json.loads((folder / "llava" / "llava_v1_5_mix665k.json").read_text())
        questions = json.loads((folder / "osprey" / "osprey_short_form.json").read_text())
    except OSError as error:
        raise DataError(f"{folder}: {error}; render the data with tools/make_refshapes.py first") from error
    captions = [
        {
            "id": record["file_name"],
            "image": record["file_name"],
            "conversations": [
                {"from": "human", "value": "Describe the image.\n<image>"},
                {"from": "gpt", "value": record["description"][0].partition(": ")[2]},
            ],
        }
        for record in described
    ]
    for name, records in (("captions", captions), ("chat", chat), ("questions", questions)):
        replace_text(out / f"{name}.json", json.dumps(records[:-NUM_HELD_OUT]))
        replace_text(out / f"{name}_held_out.json", json.dumps(records[-NUM_HELD_OUT:]))


@torch.no_grad()
def held_out_losses(overrides: Sequence[str]) -> dict[str, float]:
    """Return text loss in nats per supervised token, and bce and dice per mask, on the first batches of a dataset."""
    config = load_config("train", TrainConfig, overrides)
    model, processor = build_model(config.model, seed=config.seed, teachers={})
    model.eval()
    rows = config.data.micro_batch_size
    batches = training_batches(
        build_mixture(config.data, seed=0),
        processor,
        config.data.packing,
        StreamAssignment(global_batch_size=rows, rank=0, world_size=1, micro_batch_size=rows),
        start=[StreamState()] * rows,
        num_workers=0,
        max_skipped_fraction=config.data.max_skipped_fraction,
    )
    config.loss.text_factor_with_masks = 1.0
    sums, tokens, masks = torch.zeros(3, dtype=torch.float64), 0, 0
    for batch in (batch for step in islice(batches, BATCHES) for batch in step.batches):
        sums += loss_sums(model(**batch.training_inputs()), batch, config.loss).detached().sum(0)
        counts = count(batch)
        tokens, masks = tokens + counts.tokens, masks + counts.masks
    shares = sums / torch.tensor([max(tokens, 1), max(masks, 1), max(masks, 1)])
    return dict(zip(("text", "bce", "dice"), shares.tolist(), strict=True))


def run_stage(stage: Stage, start: Path | None, out: Path) -> dict[str, tuple[float, float]]:
    """Train one stage; return each loss before and after. Raises: DataError if the training fails."""
    overrides = [*COMMON, *(value.replace("annotations=", f"annotations={out}/") for value in stage.overrides)]
    held_out = [value.replace("annotations=", f"annotations={out}/") for value in stage.held_out]
    begin = f"model.init_from={start}" if start is not None else "model.init_from=null"
    run_dir = out / stage.name
    command = [sys.executable, "scripts/train.py", *overrides, begin, f"run_dir={run_dir}", f"name={stage.name}"]
    print("$ " + " ".join(command), flush=True)
    before = held_out_losses([*overrides, *held_out, begin])
    if subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode != 0:
        raise DataError(f"{stage.name}: the training failed; run the command above to see why")
    after = held_out_losses([*overrides, *held_out, f"model.init_from={run_dir}/export"])
    return {figure: (before[figure], after[figure]) for figure in stage.figures}


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and print their losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that contains refshapes/")
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument(
        "--steps", type=int, default=60, help="steps per text stage; stages with masks take twice as many"
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    write_files(options.data.resolve(), out)
    start, improved = None, True
    for stage in stages(options.data.resolve(), options.steps):
        for figure, (before, after) in run_stage(stage, start, out).items():
            improved &= after < before
            print(f"{stage.name:18} held-out {figure:5} {before:.4f} -> {after:.4f}", flush=True)
        start = out / stage.name / "export"
    return int(not improved)


if __name__ == "__main__":
    sys.exit(main())

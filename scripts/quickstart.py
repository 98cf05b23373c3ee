"""Render RefShapes, train a small model, score it and write runs/quickstart/report.html.

    make quickstart        (or: python scripts/quickstart.py [overrides of the training config ...])

Every stage is a command that is printed before it runs and can also be run by hand. A second call reuses existing data
and predictions, and resumes an interrupted training.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from pixel_sail.config import EvalConfig, TrainConfig, build, load_config
from pixel_sail.entry import one_message
from pixel_sail.evaluation.predictions import read_predictions
from pixel_sail.evaluation.report import write_html_report
from pixel_sail.evaluation.result_examples import spread_examples
from pixel_sail.evaluation.results import SCORED, read_rows
from pixel_sail.evaluation.tables import guesses_table, scores_table
from pixel_sail.evaluation.task_scores import Scores
from pixel_sail.files import read_json, replace_text
from pixel_sail.provenance import code_version
from pixel_sail.refshapes.formats import KIND_SPLITS
from pixel_sail.renamed import current_config
from pixel_sail.types import DataError

ROOT = Path(__file__).resolve().parent.parent
EVAL_SPLITS = ("val", *KIND_SPLITS, "testA", "testB")
BLIND = {"language-blind": "refshapes_val_language_blind", "image-blind": "refshapes_val_image_blind"}
EVALS = [f"refshapes_{split}" for split in EVAL_SPLITS] + list(BLIND.values())
REPORTED_SPLITS = (*KIND_SPLITS, "testA", "testB")
EXAMPLES_PER_SPLIT = 6


def run(*command: str) -> float:
    """Print and run a command in the repository root; return the seconds it took. A failure exits the quickstart."""
    print("\n$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(f"quickstart: the command above ended with status {done.returncode}")
    return time.monotonic() - started


def num_processes(global_batch_size: int | None) -> int:
    """Return one process per GPU, or two without a GPU, reduced until the global batch divides evenly. Without a global
    batch size, the batch is fitted to the processes."""
    wanted = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    return max(
        number for number in range(1, wanted + 1) if global_batch_size is None or global_batch_size % number == 0
    )


def launch(processes: int, script: str, *overrides: str) -> float:
    """Run a script in one or several processes."""
    return run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(script, *overrides),
    )


@one_message
def main() -> int:
    """Render, train, score, report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = ["experiment=quickstart", *sys.argv[1:]]
    config = load_config("train", TrainConfig, overrides)
    data, run_dir = Path(config.paths.data) / "refshapes", Path(config.run_dir)
    run(sys.executable, "tools/make_refshapes.py", "--out", str(data))
    # Every process reads it for every eval, and the restricted unpickler is slow.
    run(sys.executable, "tools/convert_refs.py", str(data / "refshapes"))
    if not (data / "tokenizer").is_dir():
        arguments = ("--refer-root", str(data), "--dataset", "refshapes", "--out", str(data / "tokenizer"))
        run(sys.executable, "tools/make_tokenizer.py", *arguments)
    timing = StageTimes(run_dir / "timing.json")
    processes = num_processes(config.data.global_batch_size)
    if not timing.has("train"):
        micro = config.data.micro_batch_size
        if config.data.global_batch_size is not None:
            micro = min(micro, config.data.global_batch_size // processes)
        share = f"data.micro_batch_size={micro}"
        timing.add("train", launch(processes, "scripts/train.py", *overrides, share))
    if not timing.has("evaluate"):
        options = [f"checkpoint={run_dir}", f"paths.data={config.paths.data}", f"output={run_dir / 'evaluation'}"]
        options += [f"evals=[{','.join(EVALS)}]", f"predict.prompt={config.predict.prompt}"]
        timing.add("evaluate", launch(processes, "scripts/evaluate.py", *options))
    report(config, data, run_dir, timing)
    print(f"\nReport: {run_dir / 'report.html'}  scores: {run_dir / 'metrics.json'}")
    return 0


class StageTimes:
    """Seconds of each finished stage, stored in a file so that a second call skips these stages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        remedy = "delete it to run every stage again"
        self.seconds: dict[str, float] = read_json(path, {}, fail=DataError, remedy=remedy) if path.is_file() else {}

    def has(self, stage: str) -> bool:
        """Return whether a stage is finished."""
        return stage in self.seconds

    def add(self, stage: str, seconds: float) -> None:
        """Record a finished stage."""
        self.seconds[stage] = round(seconds, 1)
        replace_text(self.path, json.dumps(self.seconds) + "\n")


def report(config: TrainConfig, data: Path, run_dir: Path, timing: StageTimes) -> None:
    """Write metrics.json, report.md and report.html from the output of the commands. Raises: DataError."""
    scores = read_scores(run_dir)
    splits = {split: scores[f"refshapes_{split}"] for split in EVAL_SPLITS}
    blind = {row: scores[name] for row, name in BLIND.items()}
    meta = read_json(data / "meta.json", {"blind_scores": dict}, fail=DataError, remedy="render the data again")
    guesses = {split: meta["blind_scores"][split] for split in EVAL_SPLITS}
    seconds = round(sum(timing.seconds.values()), 1)
    metrics = {"splits": _brief(splits), "blind": _brief(blind), "guesses": guesses, "seconds": seconds}
    replace_text(run_dir / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    names = ",".join(f"refshapes_{split}" for split in REPORTED_SPLITS)
    where = [f"checkpoint={run_dir}", f"evals=[{names}]", f"paths.data={config.paths.data}"]
    evals = load_config("evaluate", EvalConfig, where).evals
    examples = {}
    for split in REPORTED_SPLITS:
        name = f"refshapes_{split}"
        predictions = read_predictions(run_dir / "evaluation" / name / "predictions.jsonl")
        examples[split] = spread_examples(build(evals[name], name), predictions, EXAMPLES_PER_SPLIT)
    made_with = current_config(json.loads((run_dir / "config.json").read_text()))
    steps, sequences = made_with["optim"]["steps"], made_with["data"]["global_batch_size"]
    write_html_report(
        run_dir,
        title="Pixel-SAIL quickstart: referring segmentation on RefShapes",
        facts=[
            f"{steps} steps of {sequences} images, seed {config.seed}",
            f"training {timing.seconds['train']:.0f} s, scoring {timing.seconds['evaluate']:.0f} s",
            f"code {code_version()}",
            "train and val mix all kinds of expressions. Expressions of each val_... need one kind of words, and "
            "another object has the color of the target (in val_colour: its shape).",
            "testA: all objects of an image have one shape. testB: pairs of color and shape that are not in training.",
            f"Masks at stride {config.model.architecture.mask_stride}, scored at image size; missing = empty mask.",
        ],
        tables=[
            guesses_table("Scores by split, with answers that need no model", splits, guesses),
            scores_table("All scores", splits),
            scores_table("The same model on val without image or expression", blind),
        ],
        examples=examples,
        log_file=run_dir / "log.jsonl",
    )


def read_scores(run_dir: Path) -> dict[str, Scores]:
    """Return the scores of every eval of the quickstart. Raises: DataError if some are missing."""
    rows = read_rows(run_dir / "evaluation", fields=SCORED)
    if absent := [name for name in EVALS if name not in rows]:
        raise DataError(
            f"{run_dir}/evaluation: found no scores of {', '.join(absent)}, expected {len(EVALS)} evals; the run is of "
            "an earlier version. Move its folder away, or set name=... to train another one"
        )
    return {name: rows[name]["scores"] for name in EVALS}


def _brief(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    return {row: {key: found[key] for key in ("ciou", "giou", "count")} for row, found in scores.items()}


if __name__ == "__main__":
    sys.exit(main())

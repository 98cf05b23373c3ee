"""All configured evals of one checkpoint.

Place in the flow: `scripts/evaluate.py` and the quickstart call `run_evals`. Results are appended to
`<output>/results.jsonl`, one line per eval, each with what made it:

    {"eval": "refshapes_val", "scores": {"ciou": 0.81, ...}, "protocol": {"weights_sha256": ..., "predict": ...},
     "code": "1a2b3c4", "world_size": 2, "precision": "fp32"}

`<output>/report.html` shows the scores of this call and pictures from every eval.
"""

import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixel_sail import dist
from pixel_sail.config import ConfigError, EvalConfig, build
from pixel_sail.evaluation.engine import evaluate, protocol_of
from pixel_sail.evaluation.predict import DTYPES, Predictor
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.report import Case, Scores, spread, write_report
from pixel_sail.evaluation.task import Task
from pixel_sail.files import sha256
from pixel_sail.metrics.visual_referring import perbench_overall

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Folder inside a run folder that holds the Hugging Face files."""

PERBENCH_EVALS = ("perbench_caption", "perbench_choice", "perbench_visual_referring")
"""Evals whose mean is PerBench's overall score; they are known by these names in `configs/evals/`."""


def run_evals(config: EvalConfig) -> dict[str, Scores]:
    """Score the checkpoint on every eval and return {eval name: scores}, on every rank.

    Raises: ConfigError when the checkpoint or the evals are missing; DataError for wrong annotations or images.
    """
    folder = checkpoint_folder(config.checkpoint)
    if config.precision not in DTYPES:
        raise ConfigError(f"precision is {config.precision!r}, expected one of {sorted(DTYPES)}")
    tasks = _build_tasks(config)
    predictor = Predictor.from_pretrained(
        folder, config=config.predict, precision=config.precision, device=str(dist.local_device())
    )
    weights = sha256(folder / "model.safetensors")
    output = folder.parent / "evaluation" if config.output is None else Path(config.output)
    results: dict[str, Scores] = {}
    cases: dict[str, list[Case]] = {}
    for name, task in tasks.items():
        protocol = protocol_of(
            predictor,
            task,
            checkpoint=str(folder),
            weights_sha256=weights,
            precision=config.precision,
            eval_node=config.evals[name] | {"max_images": config.max_images},
        )
        records = evaluate(predictor, task, output / name, protocol=protocol, progress=config.progress)
        results[name] = _score_once(task, records)
        if dist.rank() == 0:
            line = {
                "eval": name,
                "scores": results[name],
                "protocol": protocol,
                "code": code_version(),
                "world_size": dist.world_size(),
                "precision": config.precision,
            }
            with (output / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            pairs = spread(list(zip(task.items, records, strict=True)), config.examples)
            cases[name] = [task.case(item, record) for item, record in pairs]
    if dist.rank() == 0:
        write_report(
            output,
            title=f"Evaluation: {folder}",
            facts=[
                f"weights {weights[:12]}, code {code_version()}, {config.precision}",
                f"prompt {config.predict.prompt}, mask {config.predict.mask}, answer {config.predict.answer}",
                "A missing prediction counts as an empty mask.",
            ],
            tables=_tables(tasks, results),
            cases=cases,
        )
    return results


def _build_tasks(config: EvalConfig) -> dict[str, Task[Any, Any]]:
    """Return the configured evals, after finding out all that can be wrong before the model is loaded."""
    if not config.evals:
        raise ConfigError("evals is empty; name some, for example evals=[refshapes_val]")
    tasks: dict[str, Task[Any, Any]] = {}
    for name, node in config.evals.items():
        task = as_task(build(node, f"evals.{name}"), f"evals.{name}")
        task.questions(config.predict.prompt)
        task.check()
        tasks[name] = task.first_images(config.max_images, config.predict.prompt)
    return tasks


def _score_once(task: Task[Any, Any], records: Sequence[Any]) -> Scores:
    """Return the scores on every rank; rank 0 computes them, as some start programs of their own."""
    scores: Scores = dist.gather_objects(task.score(task.items, records) if dist.rank() == 0 else None)[0]
    return scores


def perbench_overall_of(results: Mapping[str, Scores]) -> Scores:
    """Return PerBench's overall score in each protocol in which all three of its parts were scored."""
    caption, choice, referring = (results.get(name, {}) for name in PERBENCH_EVALS)
    overall: dict[str, float | int] = {}
    for prefix in ("", "paper_"):
        parts = [scores.get(prefix + name) for scores, name in ((caption, "meteor"), (choice, "accuracy"))]
        ious = [referring.get(prefix + name) for name in ("ciou", "giou")]
        found = [value for value in (*parts, *ious) if value is not None]
        if len(found) == 4:
            meteor, accuracy, ciou, giou = found
            score = perbench_overall(meteor=meteor, accuracy=accuracy, ciou=ciou, giou=giou)
            overall[f"{prefix}overall"] = score
    return overall


def _tables(tasks: Mapping[str, Task[Any, Any]], results: Mapping[str, Scores]) -> dict[str, dict[str, Scores]]:
    """Return the scores of each kind of task as a table of its own."""
    tables: dict[str, dict[str, Scores]] = {}
    for name, scores in results.items():
        heading = tasks[name].kind
        tables.setdefault(heading[0].upper() + heading[1:], {})[name] = scores
    if overall := perbench_overall_of(results):
        tables["PerBench"] = {"overall": overall}
    return tables


def checkpoint_folder(name: str) -> Path:
    """Return the exported folder of a checkpoint given as that folder or as its run folder."""
    for folder in (Path(name), Path(name) / EXPORT):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise ConfigError(
        f"checkpoint {name}: neither it nor its {EXPORT}/ holds config.json and model.safetensors; "
        "give a run folder whose training finished, or an exported folder"
    )


def code_version() -> str:
    """Return the commit of the code, with "+" when files differ from it, "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

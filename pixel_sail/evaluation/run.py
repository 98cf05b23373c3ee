"""Evaluation of one checkpoint on all configured evals.

`scripts/evaluate.py` and the quickstart call `run_evals`, which writes

    <output>/<eval>/...        predictions, see `engine.py`
    <output>/.lock             the process that writes to the folder, see `training/run_lock.py`
    <output>/results.jsonl     one row per eval, see `results.py`
    <output>/report.html       the scores of this call, the paper's tables, and images from every eval

Files, options and Java are checked before the model is loaded.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixel_sail import dist
from pixel_sail.config import ConfigError, EvalConfig, build
from pixel_sail.evaluation.confidence import bootstrap, seed_for
from pixel_sail.evaluation.engine import evaluate, protocol_of
from pixel_sail.evaluation.loaders import eval_entry
from pixel_sail.evaluation.paper_tables import paper_tables
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.report import write_html_report
from pixel_sail.evaluation.result_examples import ResultExample, ranked, spread
from pixel_sail.evaluation.results import (
    EVALUATION,
    Cost,
    Resampled,
    ResultRow,
    append_row,
    perbench_overall_of,
    perbench_row,
    result_row,
)
from pixel_sail.evaluation.tables import scores_table
from pixel_sail.evaluation.task import Task
from pixel_sail.evaluation.task_scores import Scores, TaskScores
from pixel_sail.model.folder import holds_model, model_hashes
from pixel_sail.provenance import code_version, device_name
from pixel_sail.training.run_lock import RunLock
from pixel_sail.types import DTYPES, MissingDataError

__all__ = ["checkpoint_folder", "perbench_overall_of", "run_evals"]

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Folder inside a run folder that holds the Hugging Face files."""

RANKED_BY = ("giou", "miou")
"""Scores that select the best, median and worst items for the report. The first that a task has is used."""


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """The evals to run, and the skipped ones."""

    tasks: Mapping[str, Task[Any, Any]]
    skipped: Mapping[str, str]
    """Skipped eval -> its missing file."""


def run_evals(config: EvalConfig) -> dict[str, Scores]:
    """Score the checkpoint on every eval and return {eval name: scores} on every rank.

    Raises: ConfigError if the checkpoint or the evals are missing, or another process writes to the folder; DataError
    for wrong annotations or images, and for non-finite outputs of the model.
    """
    folder = checkpoint_folder(config.checkpoint)
    if config.precision not in DTYPES:
        raise ConfigError(f"precision is {config.precision!r}, expected one of {sorted(DTYPES)}")
    plan = plan_evals(config)
    output = folder.parent / EVALUATION if config.output is None else Path(config.output)
    lock = RunLock(output, name="output")
    try:
        return _run_plan(config, plan, folder, output)
    finally:
        lock.release()


def _run_plan(config: EvalConfig, plan: EvalPlan, folder: Path, output: Path) -> dict[str, Scores]:
    """Run and score all evals of a plan. The caller holds the lock of the folder."""
    hashes = model_hashes(folder)
    predictor = BatchPredictor.from_pretrained(
        folder, config=config.predict, precision=config.precision, device=str(dist.local_device())
    )
    rows: dict[str, ResultRow] = {}
    resampled: dict[str, Resampled] = {}
    examples: dict[str, list[ResultExample]] = {}
    for name, task in plan.tasks.items():
        protocol = protocol_of(
            predictor,
            task,
            checkpoint=str(folder),
            hashes=hashes,
            precision=config.precision,
            eval_entry=eval_entry(config.evals[name], config.max_images),
        )
        started, num_before = time.monotonic(), _num_answered(output / name)
        records = evaluate(predictor, task, output / name, protocol=protocol, progress=config.progress)
        asked = time.monotonic()
        # Only rank 0 scores, because some scorers start external programs.
        if dist.rank() == 0:
            images = [str(request.image_id) for request in task.requests(config.predict.prompt)]
            task_scores = task.measure(task.items, records)
            resampled[name] = _resample(task_scores, images, name, config)
            now = time.monotonic()
            cost = Cost(asked=len(records) - num_before, asking_s=asked - started, scoring_s=now - asked)
            rows[name] = result_row(name, task.kind, task_scores, resampled[name], cost, protocol)
            append_row(output, rows[name])
            examples[name] = _choose(task, records, task_scores, images, config.examples)
        dist.barrier()
    if dist.rank() == 0:
        if (overall := perbench_row(rows, resampled)) is not None:
            rows[overall["eval"]] = overall
            append_row(output, overall)
        _report(output, config, folder, plan, rows, examples)
    return dist.gather_objects({name: row["scores"] for name, row in rows.items()})[0]


def plan_evals(config: EvalConfig) -> EvalPlan:
    """Return the configured evals after all checks that need no model.

    Raises: ConfigError, DataError; MissingDataError naming every eval with missing files, unless `missing_data` is
    skip and another eval can run.
    """
    if not config.evals:
        raise ConfigError("evals is empty; name some, for example evals=[refshapes_val]")
    tasks: dict[str, Task[Any, Any]] = {}
    skipped: dict[str, str] = {}
    for name, node in config.evals.items():
        try:
            tasks[name] = _ready(as_task(build(node, f"evals.{name}"), f"evals.{name}"), config)
        except MissingDataError as error:
            skipped[name] = str(error)
    if skipped and (config.missing_data == "stop" or not tasks):
        listed = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise MissingDataError(
            f"evals: found no files for {len(skipped)} of {len(config.evals)}:{listed}\nexpected all of them; download "
            "the files (see data/README.md), choose other evals, or run the available ones with "
            "missing_data=skip"
        )
    for name, reason in skipped.items():
        logger.warning("evals.%s is skipped: %s", name, reason)
    return EvalPlan(tasks=tasks, skipped=skipped)


def _ready(task: Task[Any, Any], config: EvalConfig) -> Task[Any, Any]:
    """Return the task with the selected items, after checking their images and scorer."""
    chosen = task.first_images(config.max_images, config.predict.prompt)
    images = dict.fromkeys(request.source_image.path for request in chosen.requests(config.predict.prompt))
    absent = [path for path in images if not path.is_file()]
    if absent:
        raise MissingDataError(
            f"found {len(absent)} of {len(images)} images missing, the first is {absent[0]}; unpack the images there"
        )
    task.check()
    return chosen


def _num_answered(folder: Path) -> int:
    """Return the number of items answered by earlier calls."""
    return sum(part.read_bytes().count(b"\n") for part in folder.glob("part-*.jsonl"))


def _resample(task_scores: TaskScores, images: Sequence[str], name: str, config: EvalConfig) -> Resampled:
    """Return the bootstrap scores."""
    seed = seed_for(config.seed, name)
    samples = (
        bootstrap(task_scores.fractions, images, seed=seed, resamples=config.resamples) if config.resamples else {}
    )
    return Resampled(samples=samples, num_images=len(set(images)), resamples=config.resamples, seed=seed)


def _choose(
    task: Task[Any, Any], records: Sequence[Any], task_scores: TaskScores, images: Sequence[str], number: int
) -> list[ResultExample]:
    """Return the examples for the report: by rank if items have a mask score, otherwise evenly spaced."""
    pairs = list(zip(task.items, records, strict=True))
    score = next((task_scores.fractions[name] for name in RANKED_BY if name in task_scores.fractions), None)
    if score is None:
        return [task.example(item, record) for item, record in spread(pairs, number)]
    chosen = ranked(score.per_item(), images, number)
    return [replace(task.example(*pairs[index]), rank=rank) for rank, index in chosen]


def _report(
    output: Path,
    config: EvalConfig,
    folder: Path,
    plan: EvalPlan,
    rows: Mapping[str, ResultRow],
    examples: Mapping[str, Sequence[ResultExample]],
) -> None:
    """Write the report of this call."""
    results: dict[str, Scores] = {name: row["scores"] for name, row in rows.items()}
    kinds: dict[str, dict[str, Scores]] = {}
    for name, row in rows.items():
        kinds.setdefault(row["kind"], {})[name] = row["scores"]
    intervals = {name: row["intervals"] for name, row in rows.items()}
    weights = next(iter(rows.values()))["weights_sha256"]
    write_html_report(
        output,
        title=f"Evaluation: {folder}",
        facts=_facts(config, plan, weights),
        tables=[
            *paper_tables(results, prompt=config.predict.prompt, limit=config.max_images),
            *(scores_table(kind[0].upper() + kind[1:], table, intervals) for kind, table in kinds.items()),
        ],
        examples=examples,
    )


def _facts(config: EvalConfig, plan: EvalPlan, weights: str) -> list[str]:
    """Return the facts printed with the scores."""
    facts = [
        f"weights {weights[:12]}, code {code_version()}, {config.precision} on {dist.world_size()} x {device_name()}",
        f"prompt {config.predict.prompt}, mask {config.predict.mask}, answer {config.predict.answer}",
        "Scores named paper_... follow the protocol `paper`: computed as in the released scripts, including their "
        "errors. All others follow the protocol `standard`, where a missing prediction counts as an empty mask.",
    ]
    if config.resamples:
        facts.append(
            f"In brackets: 95 % interval of {config.resamples} bootstrap resamples of images. Scores that are not sums "
            "over items have none."
        )
    if config.max_images:
        facts.append(f"Only the first {config.max_images} images of each eval were scored.")
    return facts + [f"Skipped: {name}: {reason}" for name, reason in plan.skipped.items()]


def checkpoint_folder(name: str) -> Path:
    """Return the exported folder of a checkpoint given as that folder or as its run folder."""
    for folder in (Path(name), Path(name) / EXPORT):
        if holds_model(folder):
            return folder
    raise ConfigError(
        f"checkpoint {name}: neither it nor its {EXPORT}/ contains config.json and model.safetensors (or "
        "model.safetensors.index.json and the files that it lists); "
        "use a run folder whose training finished, or an exported folder"
    )

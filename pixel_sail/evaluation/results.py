"""Rows of `results.jsonl`: the scores of one eval with their intervals and provenance.

`run.py` scores an eval -> `result_row` -> `append_row`. The report, `tools/compare_runs.py` and the quickstart read
them back. A row, shortened:

    {"eval": "refcoco_val", "kind": "referring segmentation", "scores": {"ciou": 0.81, "paper_ciou": 0.8, ...},
     "intervals": {"ciou": [0.803, 0.818], ...}, "resampled": {"by": "image", "images": 1500, "resamples": 1000, ...},
     "protocols": {"standard": ["ciou", ...], "paper": ["paper_ciou", "paper_giou"]}, "prompt": "paper",
     "count": 10834, "missing": 3, "weights_sha256": ..., "model_sha256": ..., "config_sha256": ...,
     "questions_sha256": ..., "code": ..., "precision": "bf16", "device": "NVIDIA H100", "world_size": 8,
     "seconds": {"asking": 301.2, "scoring": 4.0}, ...}

"limit_images" is present only if not every image was scored. A later row of the same eval replaces an earlier one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixel_sail.evaluation.confidence import LEVEL, Interval, interval
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, Scores, TaskScores, Values
from pixel_sail.files import Fields, append_line, read_json_lines
from pixel_sail.metrics.visual_referring import perbench_overall
from pixel_sail.provenance import machine
from pixel_sail.types import DataError

EVALUATION = "evaluation"
"""Default evaluation folder inside a run folder."""
RESULTS_FILE = "results.jsonl"

PERBENCH_EVALS = ("perbench_caption", "perbench_choice", "perbench_visual_referring")
"""Evals whose mean is PerBench's overall score, by their names in `configs/evals/`."""
PERBENCH_OVERALL = "perbench_overall"

ResultRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Resamples of an eval, from which its intervals are computed."""

    samples: Mapping[str, Values]
    """Every score of every resample, see `confidence.py`."""
    num_images: int
    resamples: int
    seed: int

    def intervals(self) -> dict[str, Interval]:
        """Return the interval of every score that has one."""
        found = {name: interval(values) for name, values in self.samples.items()}
        return {name: ends for name, ends in found.items() if ends is not None}

    def row(self) -> ResultRow:
        """Return a description of the resampling."""
        how = {"by": "image", "images": self.num_images, "resamples": self.resamples, "seed": self.seed}
        return {**how, "level": LEVEL}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Statistics of this call."""

    asked: int
    """Number of items answered in this call. Others were answered before the evaluation was resumed."""
    asking_s: float
    scoring_s: float


def result_row(
    name: str, kind: str, task_scores: TaskScores, resampled: Resampled, cost: Cost, protocol: ResultRow
) -> ResultRow:
    """Return the row of one eval. `protocol`: content of its `protocol.json`."""
    limit = protocol["eval"]["max_images"]
    return {
        "eval": name,
        "kind": kind,
        "scores": task_scores.scores,
        "intervals": resampled.intervals(),
        "resampled": resampled.row(),
        "protocols": by_protocol(task_scores.scores),
        "count": task_scores.scores["count"],
        "missing": task_scores.scores.get("missing", 0),
        **({"limit_images": limit} if limit else {}),
        "prompt": protocol["predict"]["prompt"],
        **{
            key: protocol[key]
            for key in ("checkpoint", "weights_sha256", "model_sha256", "questions_sha256", "precision")
        },
        "config_sha256": config_sha256(protocol),
        **machine(),
        "asked": cost.asked,
        "seconds": {"asking": round(cost.asking_s, 2), "scoring": round(cost.scoring_s, 2)},
        "protocol": protocol,
    }


def by_protocol(scores: Scores) -> dict[str, list[str]]:
    """Return the names of the scores of each protocol. Counts belong to none."""
    names = [name for name, value in scores.items() if not isinstance(value, int)]
    paper = [name for name in names if name.startswith(PAPER_PREFIX)]
    found = {"standard": [name for name in names if name not in paper], "paper": paper}
    return {protocol: members for protocol, members in found.items() if members}


def config_sha256(protocol: ResultRow) -> str:
    """Return a hash of everything the predictions depend on, see `protocol.json`."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def perbench_row(rows: Mapping[str, ResultRow], resampled: Mapping[str, Resampled]) -> ResultRow | None:
    """Return PerBench's overall score as a separate row, None unless all three parts were scored.

    The parts have different items and are resampled independently. If a part has no interval, the overall score has
    none.
    """
    overall = perbench_overall_of({name: row["scores"] for name, row in rows.items()})
    if not overall:
        return None
    parts = {name: rows[name] for name in PERBENCH_EVALS}
    samples = {}
    for prefix in ("", PAPER_PREFIX):
        values = _perbench_values({name: resampled[name].samples for name in PERBENCH_EVALS}, prefix)
        if values is not None and f"{prefix}overall" in overall:
            meteor, accuracy, ciou, giou = values
            samples[f"{prefix}overall"] = (meteor + accuracy + (ciou + giou) / 2) / 3
    first = parts[PERBENCH_EVALS[0]]
    merged = Resampled(
        samples=samples,
        num_images=sum(resampled[name].num_images for name in PERBENCH_EVALS),
        resamples=resampled[PERBENCH_EVALS[0]].resamples,
        seed=resampled[PERBENCH_EVALS[0]].seed,
    )
    shared = ("prompt", "checkpoint", "weights_sha256", "model_sha256", "precision", "limit_images")
    return {
        "eval": PERBENCH_OVERALL,
        "kind": "PerBench",
        "scores": overall,
        "intervals": merged.intervals(),
        "resampled": merged.row(),
        "protocols": by_protocol(overall),
        "count": sum(row["count"] for row in parts.values()),
        "missing": sum(row["missing"] for row in parts.values()),
        **{key: first[key] for key in shared if key in first},
        "config_sha256": {name: row["config_sha256"] for name, row in parts.items()},
        "questions_sha256": {name: row["questions_sha256"] for name, row in parts.items()},
        **machine(),
    }


def perbench_overall_of(results: Mapping[str, Scores]) -> dict[str, float | int]:
    """Return PerBench's overall score in each protocol in which all three of its parts were scored."""
    overall: dict[str, float | int] = {}
    for prefix in ("", PAPER_PREFIX):
        values = _perbench_values({name: results.get(name, {}) for name in PERBENCH_EVALS}, prefix)
        if values is not None:
            meteor, accuracy, ciou, giou = values
            score = perbench_overall(meteor=meteor, accuracy=accuracy, ciou=ciou, giou=giou)
            overall[f"{prefix}overall"] = score
    return overall


def _perbench_values(parts: Mapping[str, Mapping[str, Any]], prefix: str) -> tuple[Any, Any, Any, Any] | None:
    """Return METEOR, accuracy, cIoU and gIoU of the three parts, None unless all exist."""
    places = zip((*PERBENCH_EVALS, PERBENCH_EVALS[-1]), ("meteor", "accuracy", "ciou", "giou"), strict=True)
    found = [parts[name].get(prefix + score) for name, score in places]
    if any(value is None for value in found):
        return None
    meteor, accuracy, ciou, giou = found
    return meteor, accuracy, ciou, giou


_NAMED: dict[str, type] = {"eval": str}
SCORED: dict[str, type] = {"eval": str, "scores": dict}
"""Required fields of a row."""


def append_row(folder: Path, row: ResultRow) -> None:
    """Append a row to the results of a folder. Incomplete rows are ignored by readers. Raises: WriteError."""
    append_line(folder / RESULTS_FILE, json.dumps(row))


def read_rows(folder: Path, *, fields: Fields = _NAMED) -> dict[str, ResultRow]:
    """Return the last row of every eval of a folder, each with these fields. Raises: DataError."""
    file = folder / RESULTS_FILE
    expected = (
        "expected the JSON lines of an evaluation; use the folder that scripts/evaluate.py wrote, or run it again"
    )
    try:
        rows = read_json_lines(file, fields, fail=DataError, remedy="fix or delete that line")
    except DataError as error:
        raise DataError(f"{file}: found no readable results ({error}), {expected}") from error
    if not rows:
        raise DataError(f"{file}: found no readable results, {expected}")
    return {row["eval"]: row for row in rows}

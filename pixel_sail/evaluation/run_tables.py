"""The paper's Tables 1-4 and its component ablation, with rows of several runs.

`tools/make_tables.py` reads `results.jsonl` of every run, and lmms-eval's results for Table 4. This module makes tables
with the columns of `paper_tables.json`. An example with one run and one protocol:

    | | METEOR |
    |---|---:|
    | mine (standard) | 15.8 |
    | Pixel-SAIL 0.5B | 16.0 |

Cells without a score are marked as not run. The paper's missing numbers are a dash.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixel_sail.evaluation.paper_tables import FILE
from pixel_sail.evaluation.results import EVALUATION, PERBENCH_OVERALL, SCORED, perbench_overall_of, read_rows
from pixel_sail.evaluation.tables import Table
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, Scores
from pixel_sail.types import DataError

NOT_RUN = "not run"
NOT_PRINTED = "-"
SCORE_PREFIXES = {"paper": PAPER_PREFIX, "standard": ""}

Runs = Mapping[str, Mapping[str, Scores]]
"""Run -> eval -> scores."""


def scores_of(folder: Path) -> dict[str, Scores]:
    """Return the scores of every eval of an evaluation folder, or of a run folder's `evaluation`. Raises: DataError."""
    inner = folder / EVALUATION
    scores = {
        name: row["scores"] for name, row in read_rows(inner if inner.is_dir() else folder, fields=SCORED).items()
    }
    overall = perbench_overall_of(scores)
    return scores | ({PERBENCH_OVERALL: overall} if overall else {})


def scores_of_vqa(file: Path) -> dict[str, Scores]:
    """Return the scores in a results file of lmms-eval, task by task; "average,none" becomes "average".

    Raises: DataError.
    """
    try:
        results = json.loads(file.read_text())["results"]
        return {
            task: {
                name.partition(",")[0]: float(value) for name, value in scores.items() if type(value) in (int, float)
            }
            for task, scores in results.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: found no results ({error!r}), expected the *_results.json that lmms-eval writes"
        ) from error


def tables_of_runs(runs: Runs, protocols: Sequence[str] = tuple(SCORE_PREFIXES)) -> list[Table]:
    """Return all four tables, then that of the components, each with a row for every run and protocol."""
    content = json.loads(FILE.read_text())
    tables = [
        _table(f"The paper's Table {one['number']}: {one['title']}", one, runs, protocols, content["source"])
        for one in content["tables"]
    ]
    ablation = content["unverified_ablation"]
    heading = f"The paper's ablation, {ablation['title']}"
    return [*tables, _table(heading, ablation, runs, protocols, f"{content['source']}, {ablation['note']}")]


def _table(heading: str, table: dict[str, Any], runs: Runs, protocols: Sequence[str], source: str) -> Table:
    columns = table["columns"]
    own = []
    for run, results in runs.items():
        # lmms-eval has no protocols and would give two equal rows, so one row is enough.
        has_both = any(PAPER_PREFIX + c["score"] in results.get(c["eval"], {}) for c in columns)
        for protocol in protocols if has_both else protocols[-1:]:
            values = [results.get(c["eval"], {}).get(SCORE_PREFIXES[protocol] + c["score"]) for c in columns]
            cells = tuple(
                NOT_RUN if value is None else f"{value * column['scale']:.{column['decimals']}f}"
                for value, column in zip(values, columns, strict=True)
            )
            own.append((f"{run} ({protocol})" if has_both else run, cells))
    printed = [
        (
            name,
            tuple(
                NOT_PRINTED if value is None else f"{value:.{column['decimals']}f}"
                for value, column in zip(values, columns, strict=True)
            ),
        )
        for name, *values in table["rows"]
    ]
    return Table(
        heading=heading,
        columns=tuple(column["name"] for column in columns),
        rows=(*own, *printed),
        note=f"Bold: these runs. Other rows: {source}.",
        num_own=len(own),
    )

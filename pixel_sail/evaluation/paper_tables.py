"""The paper's Tables 1-4 with a checkpoint's scores as their first rows.

Scores of a run -> here, with the numbers of `paper_tables.json` -> `Table` -> the report. The file holds the paper's
numbers and the eval and score of each column:

    {"number": 2, "title": "region captions of RefCOCOg, METEOR in percent",
     "columns": [{"name": "METEOR", "eval": "refcocog_region_caption", "score": "meteor", "scale": 100, "decimals": 1}],
     "rows": [["Pixel-SAIL 0.5B", 16.0], ...]}                      null: the paper has no number there

The checkpoint has one row per protocol. Cells without a score are empty, and tables without any score are omitted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixel_sail.evaluation.tables import Table
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, Scores

FILE = Path(__file__).parent / "paper_tables.json"

OWN_ROWS = {PAPER_PREFIX: "this checkpoint (paper)", "": "this checkpoint (standard)"}
"""By the prefix of the scores."""


def paper_tables(results: Mapping[str, Scores], *, prompt: str, limit: int) -> list[Table]:
    """Return the paper's tables for which `results`, by eval, has a score.

    prompt: `predict.prompt`. limit: number of scored images per eval, 0 for all. The heading shows both.
    """
    content = json.loads(FILE.read_text())
    tables = [_table(table, results, content["source"], prompt, limit) for table in content["tables"]]
    return [table for table in tables if table.num_own]


def _table(table: dict[str, Any], results: Mapping[str, Scores], source: str, prompt: str, limit: int) -> Table:
    columns = table["columns"]
    own = []
    for prefix, name in OWN_ROWS.items():
        cells = tuple(_own_cell(column, results, prefix) for column in columns)
        if any(cells):
            own.append((name, cells))
    printed = [(name, tuple(map(_shown, values, columns))) for name, *values in table["rows"]]
    part = f", only the first {limit} images of each benchmark" if limit else ""
    return Table(
        heading=f"The paper's Table {table['number']} (protocols paper and standard{part}): {table['title']}",
        columns=tuple(column["name"] for column in columns),
        rows=(*own, *printed),
        note=f"This checkpoint in each protocol, asked with predict.prompt={prompt}; other rows: {source}.",
        num_own=len(own),
    )


def _own_cell(column: dict[str, Any], results: Mapping[str, Scores], prefix: str) -> str:
    value = results.get(column["eval"], {}).get(prefix + column["score"])
    return _shown(None if value is None else value * column["scale"], column)


def _shown(value: float | None, column: dict[str, Any]) -> str:
    return "" if value is None else f"{value:.{column['decimals']}f}"

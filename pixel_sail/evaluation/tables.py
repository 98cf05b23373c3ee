"""Tables of a report, as Markdown and as HTML.

Scores of a run -> `scores_table`, the paper's rows -> `paper_tables.py` -> `Table` -> `report.py`. A row of scores with
intervals:

    ("refshapes_val", ("0.659 (0.631-0.688)", "0.727 (0.703-0.751)", "1229"))
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixel_sail.evaluation.confidence import Interval
from pixel_sail.evaluation.task_scores import Scores

COLUMNS = ("ciou", "giou", "p50", "p70", "p90", "n_acc", "t_acc")
"""Scores in the first columns of a table. Others follow, except the excluded ones."""
LAST_COLUMNS = ("count", "missing")
HIDDEN_COLUMNS = ("p60", "p80", *(f"{prefix}bleu{order}" for prefix in ("", "paper_") for order in (1, 2, 3)))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report with formatted cells."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and cells."""
    note: str = ""
    num_own: int = 0
    """Number of first rows in bold: those of this run."""

    def markdown(self) -> list[str]:
        """Return the lines of the table with its heading."""
        lines = ["| | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        for index, (name, cells) in enumerate(self.rows):
            shown = [f"**{cell}**" if cell and index < self.num_own else cell for cell in (name, *cells)]
            lines.append("| " + " | ".join(shown) + " |")
        return [f"## {self.heading}", "", *([self.note, ""] if self.note else []), *lines]

    def html(self) -> list[str]:
        """Return the table with its heading as HTML."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        lines = [f"<h2>{html.escape(self.heading)}</h2>"]
        if self.note:
            lines.append(f"<p class=dim>{html.escape(self.note)}</p>")
        lines += ["<div class=wide><table>", f"<tr><th></th>{head}</tr>"]
        for index, (name, cells) in enumerate(self.rows):
            own = " class=own" if index < self.num_own else ""
            body = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells))
            lines.append(f"<tr{own}>{body}</tr>")
        return [*lines, "</table></div>"]


def scores_table(
    heading: str, rows: Mapping[str, Scores], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> Table:
    """Return a table of the scores of all rows, main scores first. `intervals`: by row and score."""
    found = dict.fromkeys(name for scores in rows.values() for name in scores)
    others = [name for name in found if name not in (*COLUMNS, *LAST_COLUMNS, *HIDDEN_COLUMNS)]
    columns = tuple(name for name in (*COLUMNS, *others, *LAST_COLUMNS) if name in found)
    known = intervals if intervals is not None else {}
    return Table(
        heading=heading,
        columns=columns,
        rows=tuple(
            (row, tuple(_cell(scores.get(name), known.get(row, {}).get(name)) for name in columns))
            for row, scores in rows.items()
        ),
    )


def guesses_table(
    heading: str, rows: Mapping[str, Scores], guesses: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Table:
    """Return cIoU and gIoU of every row next to those of trivial guesses about the same items (chance level).

    guesses: {row: {"every object": {"ciou": 0.25, "giou": 0.26}, ...}, ...}, the same names for every row.
    """
    names = list(dict.fromkeys(name for own in guesses.values() for name in own))
    return Table(
        heading=heading,
        columns=("count", "ciou", "giou", *names),
        rows=tuple(
            (row, (*(_cell(scores[key], None) for key in ("count", "ciou", "giou")), *_pairs(guesses[row], names)))
            for row, scores in rows.items()
        ),
        note="Guesses are cIoU / gIoU of marking what the column names, independent of the question.",
    )


def _pairs(guesses: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[str]:
    return [f"{guesses[name]['ciou']:.3f} / {guesses[name]['giou']:.3f}" for name in names]


def _cell(value: float | int | None, interval: Interval | None) -> str:
    """Return a number with its interval."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" + ("" if interval is None else f" ({interval[0]:.3f}-{interval[1]:.3f})")

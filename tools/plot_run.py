"""Plot the logs of training runs: losses, losses by source, learning rate, gradient norm, speed, validation scores.

    python tools/plot_run.py runs/quickstart                            -> runs/quickstart/curves.png
    python tools/plot_run.py runs/a runs/b --out compare.png            one color per run
    python tools/plot_run.py runs/a --keys loss/total,refshapes/bce,*/dice --smooth 9

Reads only `log.jsonl`, also of a running run. `--keys` takes names from the log; a pattern, for example `*/bce`, makes
one panel with a curve for every source or eval. Runs that did not log a metric have no curve in its panel. Losses,
gradient norm and padding in a line are those of its step; losses by source are means since the previous line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pixel_sail.config import LOG_GROUPS
from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import COLORS, Curve, Panel, save_panels
from pixel_sail.files import whole_lines
from pixel_sail.renamed import current_log_line
from pixel_sail.training.log import LOG_FILE
from pixel_sail.types import DataError

DEFAULT_KEYS = (
    *("loss/total", "loss/text", "loss/bce", "loss/dice", "loss/distill/*"),
    *("*/text", "*/bce", "*/dice", "*/distill/*", "optim/lr", "optim/grad_norm"),
    *("perf/tokens_per_s", "time/data_s", "perf/mfu", "perf/memory_gb", "*/ciou", "*/giou"),
)
"""Plotted by default, if logged."""

TITLES = {
    "total": "total loss",
    "text": "text loss",
    "bce": "mask BCE",
    "dice": "mask Dice",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "data_s": "waiting for data, s per step",
    "mfu": "MFU",
    "memory_gb": "peak memory, GB",
    "ciou": "validation cIoU",
    "giou": "validation gIoU",
}
"""Axis labels of metrics, by the last part of the name."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The metrics of one run."""

    label: str
    series: dict[str, dict[int, float]]
    """Name -> step -> value, in the order of the log."""
    scores: frozenset[str]
    """Names of metrics in validation lines."""


def read_run(path: Path, label: str) -> LoggedRun:
    """Return the metrics of a run folder or a log file.

    An unfinished last line is skipped. If a line has a step smaller than the previous one, the run was resumed there,
    and what the previous session logged from that step on is dropped.
    Raises: DataError, with file and line.
    """
    file = path / LOG_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected a run folder that contains {LOG_FILE}, or such a file")
    records: list[dict[str, float]] = []
    lines = whole_lines(file.read_bytes()).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = parse_line(line, f"{file}:{number}")
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    series: dict[str, dict[int, float]] = {}
    scores = set()
    for record in records:
        for name, value in record.items():
            if name != "step":
                series.setdefault(name, {})[int(record["step"])] = value
                if "loss/total" not in record and "/" in name:
                    scores.add(name)
    if not series:
        raise DataError(f"{file}: no finished line, expected at least one; the run has logged nothing yet")
    return LoggedRun(label=label, series=series, scores=frozenset(scores))


def parse_line(line: str, where: str) -> dict[str, float]:
    """Return the metrics of a line. Raises: DataError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: found no JSON ({error}), expected one object per line as training writes it"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(f"{where}: found {line.strip()[:80]}, expected an object with a whole number under 'step'")
    record = current_log_line(record)
    # Messages about metrics outside their bounds, see training/metric_bounds.py.
    record.pop("metric_bounds", None)
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"{where}: {name} is {value!r}, expected a number")
    return record


def split_name(name: str) -> tuple[str, str]:
    """Split a key into source or eval ("" for none) and the rest: refshapes/bce -> refshapes, bce."""
    group, _, rest = name.partition("/")
    return ("", name) if not rest or group in LOG_GROUPS else (group, rest)


def make_panels(runs: Sequence[LoggedRun], keys: Sequence[str], *, smooth: int, must_exist: bool) -> list[Panel]:
    """Return one panel for each key, and for each metric that a pattern matches.

    Raises: DataError for a key that no run has, unless such keys are to be skipped.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    panels = []
    for key in keys:
        names = [name for name in known if name == key or ("*" in key and fits(name, key))]
        if not names and must_exist:
            raise DataError(f"--keys: no run logged {key!r}, expected some of {', '.join(known)}, or a pattern")
        grouped: dict[str, list[str]] = {}
        for name in names:
            # Sources of one run share a panel; those of several runs only if there is a color for each curve.
            is_shared = "*" in key and (len(runs) == 1 or len(names) * len(runs) <= len(COLORS))
            grouped.setdefault(split_name(name)[1] if is_shared else name, []).append(name)
        panels += [make_panel(runs, members, smooth=smooth) for members in grouped.values()]
    return panels


def fits(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name. A star matches one part of the name; as the first part, a source or an
    eval."""
    parts, wanted = name.split("/"), pattern.split("/")
    is_source = parts[0] not in LOG_GROUPS or wanted[0] == parts[0]
    return is_source and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def make_panel(runs: Sequence[LoggedRun], names: Sequence[str], *, smooth: int) -> Panel:
    """Return a panel of one metric: a color for each run, or, with several sources or evals, a color for each of these
    and a dash pattern for each run."""
    curves = []
    is_split = len(names) > 1
    for index, run in enumerate(runs):
        for name in names:
            points = run.series.get(name, {})
            order = color_order(runs, name).index(split_name(name)[0]) if is_split else index
            # More curves than colors: colors repeat with dashes.
            pattern = index if is_split and len(runs) > 1 else order // len(COLORS)
            parts = [*([split_name(name)[0]] if is_split else []), *([run.label] if len(runs) > 1 else [])]
            if points:
                curves.append(
                    Curve(
                        label=", ".join(parts),
                        xs=tuple(points),
                        ys=tuple(points.values()),
                        color=order,
                        pattern=pattern,
                        smooth=1 if name in run.scores or name == "optim/lr" else smooth,
                    )
                )
    group, number = split_name(names[0])
    title = TITLES.get(number.rpartition("/")[2], number)
    if group and not is_split:
        title += f", {group}"
    elif group and not any(names[0] in run.scores for run in runs):
        title += " by source"
    return Panel(title=title, curves=tuple(curves))


def color_order(runs: Sequence[LoggedRun], name: str) -> list[str]:
    """Return all sources, or all evals if `name` is a score, so that each has the same color in every panel."""
    is_score = any(name in run.scores for run in runs)
    names = dict.fromkeys(other for run in runs for other in run.series if is_score == (other in run.scores))
    return list(dict.fromkeys(group for group, _ in map(split_name, names) if group))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return the folder names of runs, or full paths if names repeat."""
    folders = [path.parent if path.is_file() else path for path in paths]
    names = [folder.resolve().name for folder in folders]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Plot; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"run folder or {LOG_FILE}")
    parser.add_argument("--keys", help="names of metrics, separated by commas (default: the usual ones)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="running mean over N log lines; N is odd")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="output file (default: curves.png in the folder of the first run)"
    )
    options = parser.parse_args(arguments)
    if options.smooth < 1 or options.smooth % 2 == 0:
        raise DataError(
            f"--smooth is {options.smooth}, expected an odd number, as the mean is centered; use 1, 3, 5, ..."
        )
    runs = [read_run(path, label) for path, label in zip(options.runs, labels_of(options.runs), strict=True)]
    keys = list(current_log_line(dict.fromkeys(options.keys.split(",")))) if options.keys else DEFAULT_KEYS
    panels = make_panels(runs, keys, smooth=options.smooth, must_exist=options.keys is not None)
    if not panels:
        raise DataError(
            f"{options.runs[0]}: found none of {', '.join(DEFAULT_KEYS)}; set --keys to metrics that it logged"
        )
    title = " / ".join(run.label for run in runs) + (f", mean of {options.smooth} lines" if options.smooth > 1 else "")
    first = options.runs[0]
    out = options.out or (first if first.is_dir() else first.parent) / "curves.png"
    save_panels(out, panels, title)
    print(f"{len(panels)} panels of {len(runs)} run(s) -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

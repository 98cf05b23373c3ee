"""Compare two evaluations item by item and test whether scores differ significantly.

Use after two runs of `scripts/evaluate.py` on the same evals; needs neither model nor images. Example (made-up
numbers):

    python tools/compare_runs.py runs/a/evaluation runs/b/evaluation --json difference.json

    refcoco_val (A 1a2b3c4d5e6f, B 6f5e4d3c2b1a)
    score         A        B      B - A   95 % interval        A better   B better   equal
    ciou     0.7102   0.7311    +0.0209   +0.0121 .. +0.0293        310        402     517

Answers are rescored, and the paired bootstrap resamples the same images of both runs. Runs with different items,
question templates or max_images are rejected with exit status 2.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixel_sail.entry import one_message
from pixel_sail.evaluation.comparison import Difference, compare
from pixel_sail.evaluation.confidence import LEVEL, RESAMPLES
from pixel_sail.evaluation.loaders import LOADER_HELP
from pixel_sail.evaluation.results import read_rows
from pixel_sail.evaluation.stored import read_protocol, stored_evals
from pixel_sail.files import replace_text
from pixel_sail.types import DataError

SCORE_HEAD = (
    f"{'score':<16}{'A':>9}{'B':>9}{'B - A':>10}   {'95 % interval':<20}{'A better':>9}{'B better':>10}{'equal':>8}"
)


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and return 0; if the runs are not comparable, write the reason to stderr and return 2."""
    options = _parse(arguments)
    names = _common(options.run_a, options.run_b, options.evals)
    rows = [read_rows(folder) for folder in (options.run_a, options.run_b)]
    report: dict[str, Any] = {}
    for name in names:
        folders = [folder / name for folder in (options.run_a, options.run_b)]
        differences = compare(*folders, seed=options.seed, resamples=options.resamples, loaders=options.loader)
        weights = [read_protocol(folder)["weights_sha256"] for folder in folders]
        print(f"{name} (A {weights[0][:12]}, B {weights[1][:12]})\n{SCORE_HEAD}")
        print("\n".join(map(_line, differences)) + "\n")
        report[name] = {
            "weights_sha256": weights,
            "code": [row[name]["code"] if name in row else None for row in rows],
            "scores": [asdict(difference) | {"difference": _difference(difference)} for difference in differences],
        }
    if options.json is not None:
        settings = {"level": LEVEL, "resamples": options.resamples, "seed": options.seed}
        runs = {"a": str(options.run_a), "b": str(options.run_b)}
        replace_text(options.json, json.dumps({**runs, **settings, "evals": report}, indent=1) + "\n")
    return 0


def _common(first: Path, second: Path, wanted: Sequence[str] | None) -> list[str]:
    """Return the evals to compare: the requested ones, or all that both runs have. Raises: DataError."""
    found = [stored_evals(folder) for folder in (first, second)]
    common = [name for name in found[0] if name in found[1]]
    names = list(wanted) if wanted else common
    if not names or not set(names) <= set(common):
        raise DataError(
            f"found evals {found[0]} in {first} and {found[1]} in {second}, expected "
            f"{sorted(set(names) - set(common)) or 'one at least'} in both; evaluate both runs on it"
        )
    for folder, own in zip((first, second), found, strict=True):
        if not wanted and (alone := [name for name in own if name not in common]):
            print(f"only in {folder}, not compared: {', '.join(alone)}\n")
    return names


def _difference(difference: Difference) -> float:
    return difference.b - difference.a


def _line(difference: Difference) -> str:
    """Return one row of the table; cells that do not apply to a score that is not a sum over items are empty."""
    ends = "" if difference.interval is None else "{:+.4f} .. {:+.4f}".format(*difference.interval)
    counts = (difference.a_better, difference.b_better, difference.equal)
    shown = ["" if count is None else str(count) for count in counts]
    return (
        f"{difference.score:<16}{difference.a:>9.4f}{difference.b:>9.4f}{_difference(difference):>+10.4f}   "
        f"{ends:<20}{shown[0]:>9}{shown[1]:>10}{shown[2]:>8}".rstrip()
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare two evaluations of the same items.")
    parser.add_argument("run_a", type=Path, help="folder that scripts/evaluate.py wrote: results.jsonl, <eval>/...")
    parser.add_argument("run_b", type=Path, help="folder of the second evaluation; differences are B - A")
    parser.add_argument("--evals", nargs="+", help="evals to compare (default: all that both have)")
    parser.add_argument("--json", type=Path, help="also write the comparison to this file")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--loader", action="append", default=[], metavar="NAME", help=LOADER_HELP)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

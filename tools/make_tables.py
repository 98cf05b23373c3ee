"""Print Tables 1-4 of the paper with rows of our runs, or tables of a sweep, as Markdown.

    python tools/make_tables.py mine=runs/a other=runs/b/evaluation --vqa mine=runs/a/vqa/x_results.json
    python tools/make_tables.py --sweep runs/sweeps/refshapes_ladder --baseline ladder_1_baseline --plot ladder.png

A run is a folder with the results.jsonl of scripts/evaluate.py, or a run folder with such a folder `evaluation`.
Without runs, only the paper's rows are printed. `--sweep` takes the folder of tools/sweep.py and prints mean and spread
over seeds, and differences to the group `--baseline` (default: the first) with paired bootstrap intervals over images.
`--plot` plots the scores of every job by group.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.config import ConfigError
from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import Curve, Panel, save_panels
from pixel_sail.evaluation.loaders import LOADER_HELP
from pixel_sail.evaluation.run_tables import SCORE_PREFIXES, scores_of, scores_of_vqa, tables_of_runs
from pixel_sail.evaluation.sweep_tables import MAIN_SCORES, SeedGroup, differences_table, read_groups, scores_table_of
from pixel_sail.evaluation.task_scores import Scores
from pixel_sail.files import replace_text


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; wrong input ends with one message and exit status 2."""
    options = _parse(arguments)
    if options.sweep is not None:
        groups = read_groups(options.sweep)
        tables = [
            scores_table_of(groups),
            differences_table(_baseline(groups, options.baseline), groups, loaders=options.loader),
        ]
        if options.plot is not None:
            save_panels(options.plot, panels(groups), title=options.sweep.name)
    else:
        tables = tables_of_runs(read_runs(options.runs, options.vqa), options.protocols)
    text = "\n\n".join("\n".join(table.markdown()) for table in tables) + "\n"
    print(text, end="")
    if options.out is not None:
        replace_text(options.out, text)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--vqa", action="append", default=[], metavar="NAME=FILE", help="lmms-eval results of a run")
    parser.add_argument("--protocols", nargs="+", choices=tuple(SCORE_PREFIXES), default=list(SCORE_PREFIXES))
    parser.add_argument("--sweep", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--baseline",
        metavar="TEXT",
        help="reference group of the differences: its name, a value, or a substring of these",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the sweep's scores")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument("--loader", action="append", default=[], metavar="NAME", help=LOADER_HELP)
    return parser.parse_args(arguments)


def read_runs(runs: Sequence[str], vqa: Sequence[str]) -> dict[str, dict[str, Scores]]:
    """Return run -> eval -> scores. Raises: ConfigError for an argument that is not NAME=PATH, DataError."""
    found: dict[str, dict[str, Scores]] = {}
    for arguments, read in ((runs, scores_of), (vqa, scores_of_vqa)):
        for argument in arguments:
            name, separator, path = argument.partition("=")
            if not separator or not name or not path:
                raise ConfigError(f"found {argument!r}, expected NAME=PATH, for example mine=runs/mine")
            found.setdefault(name, {}).update(read(Path(path)))
    return found


def _baseline(groups: Sequence[SeedGroup], text: str | None) -> SeedGroup:
    """Return the reference group: the group with that name, else with that value, else whose name contains the
    text. Raises: ConfigError unless it is exactly one.

    For example "a" is `x=a` of the groups `x=a` and `x=ab`, "b" is `x=ab`.
    """
    if text is None:
        return groups[0]
    named = [group for group in groups if text == group.name]
    named = named or [group for group in groups if text in _settings(group)]
    named = named or [group for group in groups if text in group.name]
    if len(named) != 1:
        fitting = [group.name for group in named or groups]
        raise ConfigError(
            f"--baseline {text!r} fits {len(named)} of the {len(groups)} groups, expected one; give one of the names "
            f"{fitting}"
        )
    return named[0]


def _settings(group: SeedGroup) -> list[str]:
    """Return the swept settings of a group, as key=value and as value alone."""
    settings = group.name.split(", ")
    return [*settings, *(setting.partition("=")[2] for setting in settings)]


def panels(groups: Sequence[SeedGroup]) -> list[Panel]:
    """Return one panel per eval and score: one curve per seed over the groups, numbered from 1."""
    results = [group.results() for group in groups]
    names = dict.fromkeys(
        (name, score)
        for by_seed in results
        for evals in by_seed.values()
        for name, scores in evals.items()
        for score in MAIN_SCORES
        if score in scores
    )
    seeds = list(dict.fromkeys(seed for group in groups for seed in group.folders))
    found = []
    for name, score in names:
        curves = []
        for color, seed in enumerate(seeds):
            values = [by_seed.get(seed, {}).get(name, {}).get(score, float("nan")) for by_seed in results]
            xs = tuple(float(number) for number in range(1, len(groups) + 1))
            curves.append(Curve(label=f"seed {seed}", xs=xs, ys=tuple(map(float, values)), color=color))
        labels = tuple(group.name.rpartition("=")[2] for group in groups)
        found.append(Panel(title=f"{name} {score}", curves=tuple(curves), x_label="", x_names=labels, y_label=score))
    return found


if __name__ == "__main__":
    sys.exit(main())

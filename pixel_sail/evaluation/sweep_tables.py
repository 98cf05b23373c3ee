"""Tables of a sweep: mean and standard deviation over seeds, and paired differences to a baseline.

`sweep.json` and the evaluation folders of its jobs -> `SeedGroup`s, jobs that differ in the seed only ->
`scores_of_groups` and `differences` -> `tools/make_tables.py --sweep`. An example, cIoU of two groups with two seeds:

    | | refshapes_val ciou |
    |---|---:|
    | ablation=stride_8 | 0.571 +- 0.012 (2) |
    | ablation=stride_4 | 0.598 +- 0.004 (2) |

The difference of two groups pairs jobs by seed. Its interval comes from resampling images, the same for all jobs of
both groups, and averaging over seeds each time. It quantifies the uncertainty for these weights on other images. The
differences by seed are listed next to it.
"""

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixel_sail.evaluation.comparison import check_same_questions, check_same_targets
from pixel_sail.evaluation.confidence import RESAMPLES, Interval, bootstrap, interval, seed_for
from pixel_sail.evaluation.results import EVALUATION, SCORED, read_rows
from pixel_sail.evaluation.results import RESULTS_FILE as RESULTS_NAME
from pixel_sail.evaluation.stored import read_stored
from pixel_sail.evaluation.tables import Table
from pixel_sail.evaluation.task_scores import Scores
from pixel_sail.types import DataError

SWEEP_NAME = "sweep.json"
SEED_KEY = "seed"
MAIN_SCORES = ("ciou", "giou", "boundary_iou", "accuracy", "meteor", "cider", "overall")
"""Scores in a sweep's table, if an eval has them."""
NOTHING = "not run"


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Jobs that differ in their seed only."""

    name: str
    """Values of the other swept settings."""
    folders: dict[str, Path]
    """Seed -> run folder, finished or not."""

    def results(self) -> dict[str, dict[str, Scores]]:
        """Return seed -> eval -> scores of the evaluated jobs. Raises: DataError."""
        found = {}
        for seed, folder in self.folders.items():
            if (folder / EVALUATION / RESULTS_NAME).is_file():
                found[seed] = {
                    name: row["scores"] for name, row in read_rows(folder / EVALUATION, fields=SCORED).items()
                }
        return found


def read_groups(sweep: Path) -> list[SeedGroup]:
    """Return the groups of a sweep's folder in the order of its jobs. Raises: DataError."""
    file = sweep / SWEEP_NAME
    try:
        jobs = json.loads(file.read_text())["jobs"]
        swept = {name: dict(job["swept"]) for name, job in jobs.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: found no sweep ({error!r}), expected the folder that tools/sweep.py names") from error
    folders: dict[str, dict[str, Path]] = {}
    for name, values in swept.items():
        seed = values.pop(SEED_KEY, "0")
        group = ", ".join(f"{key}={value}" for key, value in values.items()) or "all"
        folders.setdefault(group, {})[seed] = sweep / name
    return [SeedGroup(name=name, folders=own) for name, own in folders.items()]


def scores_table_of(groups: Sequence[SeedGroup]) -> Table:
    """Return mean, standard deviation and number of seeds of every main score."""
    results = {group.name: group.results() for group in groups}
    columns = list(
        dict.fromkeys(
            (name, score)
            for by_seed in results.values()
            for evals in by_seed.values()
            for name, scores in evals.items()
            for score in MAIN_SCORES
            if score in scores
        )
    )
    rows = []
    for group in groups:
        by_seed = results[group.name]
        cells = []
        for name, score in columns:
            values = [float(evals[name][score]) for evals in by_seed.values() if score in evals.get(name, {})]
            cells.append(mean_and_spread(values))
        rows.append((group.name, tuple(cells)))
    return Table(
        heading="Mean over seeds",
        columns=tuple(f"{name} {score}" for name, score in columns),
        rows=tuple(rows),
        note="Standard deviation over seeds after +-, number of seeds in brackets.",
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """Return a cell such as 0.571 +- 0.012 (2)."""
    if not values:
        return NOTHING
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"


@dataclass(frozen=True, kw_only=True)
class GroupDifference:
    """One score of one eval, a group minus the baseline."""

    eval: str
    score: str
    by_seed: dict[str, float]
    interval: Interval | None
    """95 % interval of the mean over seeds, over other images."""

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return statistics.mean(self.by_seed.values())


def differences(
    baseline: SeedGroup, group: SeedGroup, *, seed: int = 0, resamples: int = RESAMPLES, loaders: Collection[str] = ()
) -> list[GroupDifference]:
    """Return the differences of all main scores over the seeds of both groups. `loaders`: see `read_stored`.

    Raises: DataError if jobs have different questions.
    """
    first, second = baseline.results(), group.results()
    seeds = [own for own in first if own in second]
    names = list(dict.fromkeys(name for own in seeds for name in first[own] if name in second[own]))
    found = []
    for name in names:
        shared = [own for own in seeds if name in first[own] and name in second[own]]
        found += _differences(name, baseline, group, shared, seed=seed, resamples=resamples, loaders=loaders)
    return found


def _differences(
    name: str,
    baseline: SeedGroup,
    group: SeedGroup,
    seeds: Sequence[str],
    *,
    seed: int,
    resamples: int,
    loaders: Collection[str],
) -> list[GroupDifference]:
    """Return the differences of one eval. All jobs use the same resampled images."""
    folders = {(side.name, own): side.folders[own] / EVALUATION / name for own in seeds for side in (baseline, group)}
    reference = next(iter(folders.values()))
    stored = {}
    for place, folder in folders.items():
        check_same_questions(reference, folder)
        stored[place] = read_stored(folder, loaders)
    one = next(iter(stored.values()))
    measured = {}
    for place, evaluation in stored.items():
        check_same_targets(one, evaluation)
        measured[place] = evaluation.measure()
    scores = [score for score in MAIN_SCORES if all(score in own.scores for own in measured.values())]
    with_items = [score for score in scores if all(score in own.fractions for own in measured.values())]
    fractions = {
        f"{side}/{own}/{score}": measured[side, own].fractions[score] for side, own in measured for score in with_items
    }
    samples = bootstrap(fractions, one.images(), seed=seed_for(seed, name), resamples=resamples)
    found = []
    for score in scores:
        by_seed = {
            own: float(measured[group.name, own].scores[score]) - float(measured[baseline.name, own].scores[score])
            for own in seeds
        }
        ends = None
        if score in with_items:
            resampled = [
                samples[f"{group.name}/{own}/{score}"] - samples[f"{baseline.name}/{own}/{score}"] for own in seeds
            ]
            ends = interval(np.mean(resampled, axis=0))
        found.append(GroupDifference(eval=name, score=score, by_seed=by_seed, interval=ends))
    return found


def differences_table(
    baseline: SeedGroup, groups: Sequence[SeedGroup], *, resamples: int = RESAMPLES, loaders: Collection[str] = ()
) -> Table:
    """Return the differences of all groups to the baseline, a row for each eval and score."""
    rows = []
    for group in groups:
        if group.name == baseline.name:
            continue
        for one in differences(baseline, group, resamples=resamples, loaders=loaders):
            ends = "" if one.interval is None else f"{one.interval[0]:+.4f} .. {one.interval[1]:+.4f}"
            seeds = ", ".join(f"{value:+.4f}" for value in one.by_seed.values())
            rows.append((f"{group.name}: {one.eval} {one.score}", (f"{one.mean:+.4f}", ends, seeds)))
    return Table(
        heading=f"Differences to {baseline.name}",
        columns=("mean", "95 % interval over images", "by seed"),
        rows=tuple(rows),
        note="Jobs of one seed are paired; every resample samples the same images for all of them.",
    )

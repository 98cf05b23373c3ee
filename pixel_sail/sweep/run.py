"""The command line of sweeps: expands the grid, runs the jobs locally or through Slurm, and prints a summary.

`scripts/train.py -m` and `tools/sweep.py` call `main`. An example, two jobs at a time:

    python scripts/train.py -m --jobs 2 --evaluate "evals=[refshapes_val] predict.prompt=short" \
        experiment=refshapes_student deepspeed=none ablation=stride_4,stride_8 seed=1,2,3

The same command again skips finished jobs, resumes interrupted ones and retries failed ones. `sweep.json` in the
sweep's folder lists the values of every job; `tools/make_tables.py --sweep FOLDER` reads it.
"""

import argparse
import json
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.sweep.checks import check_evaluation, checked_config
from pixel_sail.sweep.grid import Job, expand
from pixel_sail.sweep.jobs import SAVED_STATUS, Outcome, Settings, Stop, read_record, run_job
from pixel_sail.sweep.slurm import run_through_slurm
from pixel_sail.types import DataError

logger = logging.getLogger("sweep")

SWEEP_FILE = "sweep.json"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the sweep, and the overrides."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-m", "--multirun", action="store_true", help="optional here")
    parser.add_argument("--folder", type=Path, help="sweep folder; default: <paths.runs>/sweeps/<name of the run>")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="concurrent jobs on this machine")
    parser.add_argument(
        "--launcher", default="", help='training launcher, such as "torchrun --standalone --nproc-per-node=8"'
    )
    parser.add_argument(
        "--evaluate", default="", metavar="OVERRIDES", help="evaluate every job with scripts/evaluate.py"
    )
    parser.add_argument(
        "--slurm", metavar="SETTINGS", help='submit with submitit: "slurm_partition=gpu timeout_min=600"'
    )
    parser.add_argument("--list", action="store_true", help="print the jobs and start nothing")
    options, overrides = parser.parse_known_args(list(arguments))
    unknown = [argument for argument in overrides if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"sweep: found {unknown}, expected options that --help lists, and key=value")
    if options.jobs < 1:
        raise ConfigError(f"sweep: --jobs is {options.jobs}, expected 1 or more")
    return options, overrides


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep; return 0 if every job finished, 1 if one failed, 85 if it was interrupted, 2 for wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    jobs = expand(overrides)
    # Check all of them before the first job starts.
    configs = [checked_config(job) for job in jobs]
    named = load_config("train", TrainConfig, [*jobs[0].overrides, *_default_name(jobs[0])]).name
    folder = options.folder or Path(configs[0].paths.runs) / "sweeps" / named
    launcher = tuple(shlex.split(options.launcher)) or (sys.executable,)
    settings = Settings(folder=folder.resolve(), launcher=launcher, evaluate=tuple(shlex.split(options.evaluate)))
    if settings.evaluate:
        check_evaluation(settings.evaluate)
    if options.list:
        print("\n".join(f"{job.name}: {' '.join(job.overrides)}" for job in jobs))
        return 0
    _check_records(jobs, settings)
    _note(jobs, settings)
    if options.slurm is not None:
        outcomes = run_through_slurm(jobs, settings, shlex.split(options.slurm))
    else:
        outcomes = run_here(jobs, settings, num_at_once=options.jobs)
    print(summary(outcomes, settings.folder))
    if any(outcome.status in ("interrupted", "not started") for outcome in outcomes):
        return SAVED_STATUS
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _default_name(job: Job) -> list[str]:
    """Return a name if no experiment sets one."""
    return [] if any(override.startswith("experiment=") for override in job.overrides) else ["name=sweep"]


def _check_records(jobs: Sequence[Job], settings: Settings) -> None:
    """Raise ConfigError if a job's folder belongs to other overrides."""
    for job in jobs:
        # A record that cannot be read or written is a failure of its job, which `run_job` reports.
        with suppress(OSError, DataError):
            read_record(job, settings)


def _note(jobs: Sequence[Job], settings: Settings) -> None:
    """Write the values of every job; jobs of an earlier call with the same folder are kept.

    Raises: ConfigError if the file is damaged or cannot be written.
    """
    file = settings.folder / SWEEP_FILE
    try:
        known = dict(json.loads(file.read_text())["jobs"]) if file.is_file() else {}
        known |= {job.name: {"swept": job.swept, "overrides": list(job.overrides)} for job in jobs}
        replace_text(file, json.dumps({"jobs": known}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read and written ({error}), expected a writable folder with free space; use another "
            "--folder"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: found no list of jobs ({error!r}), expected the file of a sweep; move it away, the sweep writes "
            "a new one with the jobs of this call"
        ) from error


def run_here(jobs: Sequence[Job], settings: Settings, *, num_at_once: int) -> list[Outcome]:
    """Run jobs on this machine. After SIGTERM or Ctrl-C running jobs save and exit, and no other job starts."""
    stop = Stop()

    def run_one(job: Job) -> Outcome:
        if stop.is_set:
            return Outcome(name=job.name, status="not started")
        logger.info("%s starts", job.name)
        outcome = run_job(job, settings, stop)
        logger.info("%s: %s after %.0f s%s", *(job.name, outcome.status, outcome.seconds, _behind(outcome.detail)))
        return outcome

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not in the handler itself, which may interrupt the thread that holds the lock.
        threading.Thread(target=stop.stop).start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(num_at_once) as pool:
            return list(pool.map(run_one, jobs))
    finally:
        stop.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _behind(detail: str) -> str:
    return f" ({detail})" if detail else ""


def summary(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Return one line per job, and the counts."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [
        f"{outcome.name:{width}}  {outcome.status:<11} {outcome.seconds:7.0f} s  {outcome.detail}".rstrip()
        for outcome in outcomes
    ]
    kinds = ("finished", "skipped", "failed", "interrupted", "not started")
    counts = {kind: sum(outcome.status == kind for outcome in outcomes) for kind in kinds}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return "\n".join([*lines, f"{len(outcomes)} jobs in {folder}: {said}"])

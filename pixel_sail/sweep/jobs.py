"""One job of a sweep: training, then evaluation. Each is a command that resumes where it stopped.

`run.py` calls `run_job` for every job of the grid, on this machine or on a node of a cluster. The folder of a sweep:

    sweep.json                                  the values of every job, see run.py
    jobs/ablation-stride_4__seed-2.json         {"overrides": [...], "evaluate": [...], "done": ["train"]}
    jobs/ablation-stride_4__seed-2.log          output of its commands
    ablation-stride_4__seed-2/                  its run folder: log.jsonl, checkpoints/, export/, evaluation/

Completed stages are skipped. Interrupted training resumes from its last checkpoint, evaluation from its existing
answers.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixel_sail.config import ConfigError
from pixel_sail.files import replace_text
from pixel_sail.overrides import quoted
from pixel_sail.paths import root_folder
from pixel_sail.sweep.grid import Job
from pixel_sail.types import DataError

DATA = "paths.data="
SCRIPTS = root_folder() / "scripts"

SAVED_STATUS = 85
"""Exit status of a training that saved and requests a restart."""
MAX_STARTS = 20
"""Maximum starts of a training that keeps requesting a restart; then it counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all jobs of a sweep."""

    folder: Path
    launcher: tuple[str, ...] = (sys.executable,)
    """Command that starts the training script: this Python, or torchrun with its arguments."""
    evaluate: tuple[str, ...] = ()
    """Overrides of scripts/evaluate.py; empty: no evaluation."""

    def file(self, job: Job, suffix: str) -> Path:
        """Return the record (json) or the output (log) of a job."""
        return self.folder / "jobs" / f"{job.name}.{suffix}"

    def run_dir(self, job: Job) -> Path:
        """Return the run folder of a job."""
        return self.folder / job.name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a job."""

    name: str
    status: str
    """finished, skipped (already finished), failed, interrupted or not started."""
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Stop:
    """Terminates running commands and prevents others from starting."""

    is_set: bool = False
    running: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Reentrant, as a signal handler may interrupt the same thread in `stop`."""

    def stop(self) -> None:
        """Send every command SIGTERM, so that it saves and exits."""
        with self.lock:
            self.is_set = True
            for process in self.running:
                process.terminate()

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes] | None":
        """Start a command, or return None after `stop`."""
        with self.lock:
            if self.is_set:
                return None
            process = subprocess.Popen(command, start_new_session=True, **options)
            self.running.add(process)
            return process

    def ended(self, process: "subprocess.Popen[bytes]") -> None:
        """Forget a command that has ended."""
        with self.lock:
            self.running.discard(process)


def run_job(job: Job, settings: Settings, stop: Stop) -> Outcome:
    """Run the remaining stages of a job. Failures are reported in the outcome, not raised, so other jobs continue."""
    started = time.monotonic()
    try:
        status, detail = _run_stages(job, settings, stop)
    except (OSError, ValueError) as error:
        # A launcher that does not exist, a full disk, a damaged record.
        status, detail = "failed", f"{type(error).__name__}: {error}"
    return Outcome(name=job.name, status=status, seconds=time.monotonic() - started, detail=detail)


def _run_stages(job: Job, settings: Settings, stop: Stop) -> tuple[str, str]:
    """Return status and detail of the outcome. Raises: OSError, DataError and ConfigError, see `read_record`."""
    record = read_record(job, settings)
    commands = {"train": train_command(job, settings)}
    if settings.evaluate:
        commands["evaluate"] = evaluate_command(job, settings)
    left = [stage for stage in commands if stage not in record["done"]]
    if not left:
        return "skipped", ""
    for stage in left:
        status = _run_command(commands[stage], settings.file(job, "log"), stop)
        if stop.is_set and status != 0:
            return "interrupted", stage
        if status != 0:
            return "failed", f"{stage} ended with status {status}, see {settings.file(job, 'log')}"
        record["done"].append(stage)
        replace_text(settings.file(job, "json"), json.dumps(record, indent=1) + "\n")
    return "finished", ""


def read_record(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the record of a job. If the evaluation's overrides changed, it counts as not done.

    Raises: ConfigError if the job's folder belongs to other overrides, DataError for a damaged record, OSError.
    """
    file = settings.file(job, "json")
    asked = {"overrides": list(job.overrides), "evaluate": list(settings.evaluate), "done": []}
    if not file.is_file():
        replace_text(file, json.dumps(asked, indent=1) + "\n")
        return asked
    try:
        content = json.loads(file.read_text())
        record: dict[str, Any] = {key: list(content[key]) for key in asked}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: found no record of a job ({error!r}), expected lists of {sorted(asked)}; delete it, and the "
            "job resumes from its last checkpoint"
        ) from error
    if record["overrides"] != asked["overrides"]:
        raise ConfigError(
            f"{file}: found a job with overrides {record['overrides']}, expected {asked['overrides']}; use another "
            "--folder, or move this one away"
        )
    if record["evaluate"] != asked["evaluate"]:
        record |= {"evaluate": asked["evaluate"], "done": [stage for stage in record["done"] if stage == "train"]}
    return record


def train_command(job: Job, settings: Settings) -> list[str]:
    """Return the command that trains a job, or resumes its training."""
    own = [f"run_dir={quoted(str(settings.run_dir(job)))}", f"name={quoted(job.name)}"]
    return [*settings.launcher, str(SCRIPTS / "train.py"), *job.overrides, *own]


def evaluate_command(job: Job, settings: Settings) -> list[str]:
    """Return the command that evaluates a job's export with one process, by default with the job's `paths.data`."""
    data = [override for override in job.overrides if override.startswith(DATA)]
    return [
        *(sys.executable, str(SCRIPTS / "evaluate.py"), f"checkpoint={quoted(str(settings.run_dir(job)))}"),
        *(() if any(override.startswith(DATA) for override in settings.evaluate) else data),
        *settings.evaluate,
    ]


def _run_command(command: Sequence[str], log: Path, stop: Stop) -> int:
    """Return the exit status of a command whose output is appended to a file; it is restarted if it requests that."""
    log.parent.mkdir(parents=True, exist_ok=True)
    status = SAVED_STATUS
    for _ in range(MAX_STARTS):
        with log.open("ab") as output:
            output.write(f"\n$ {' '.join(command)}\n".encode())
            output.flush()
            process = stop.start(command, stdout=output, stderr=subprocess.STDOUT)
            if process is None:
                break
            try:
                status = process.wait()
            finally:
                stop.ended(process)
        if status != SAVED_STATUS or stop.is_set:
            break
    return status

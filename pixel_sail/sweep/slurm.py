"""Submits the jobs of a sweep to Slurm with the optional package submitit.

`run.py` calls `run_through_slurm` instead of `run_here`. Settings are those of submitit's `update_parameters`, for
example `slurm_partition=gpu timeout_min=600 gpus_per_node=8 cpus_per_task=64`; `cluster=local` and `cluster=debug` run
without Slurm. The folder must be accessible from all nodes.
"""

import importlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pixel_sail.config import ConfigError
from pixel_sail.sweep.grid import Job
from pixel_sail.sweep.jobs import Outcome, Settings, Stop, run_job

logger = logging.getLogger("sweep")


class SlurmJob:
    """The function a node runs. Before the time limit submitit calls `checkpoint` and submits what that returns."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.job = job
        self.settings = settings
        # Created on the node, as neither can be pickled.
        self.stop: Stop | None = None
        self.outcome: Future[Outcome] | None = None

    def __call__(self) -> Outcome:
        """Run the remaining stages of the job.

        This uses a second thread, because submitit calls `checkpoint` in a signal handler, which interrupts the main
        thread anywhere. Within `Popen.wait` the main thread would hold a lock that `checkpoint` waits for.
        """
        self.stop = stop = Stop()
        with ThreadPoolExecutor(1) as pool:
            self.outcome = pool.submit(run_job, self.job, self.settings, stop)
            try:
                return self.outcome.result()
            finally:
                stop.stop()

    def checkpoint(self) -> Any:
        """Let the training save and exit, and return the job to resubmit."""
        if self.stop is not None:
            self.stop.stop()
        if self.outcome is not None:
            # Waits for the end. The main thread may be in `result`, whose lock is reentrant.
            self.outcome.exception()
        return importlib.import_module("submitit").helpers.DelayedSubmission(SlurmJob(self.job, self.settings))


def run_through_slurm(jobs: Sequence[Job], settings: Settings, parameters: Sequence[str]) -> list[Outcome]:
    """Submit every job and wait for all. A job that Slurm lost counts as failed.

    Raises: ConfigError if submitit is not installed, or for parameters that are not key=value.
    """
    try:
        submitit: Any = importlib.import_module("submitit")
    except ImportError as error:
        raise ConfigError(
            "sweep: --slurm needs the package submitit, which is not installed; pip install submitit, or omit --slurm "
            "to run on this machine"
        ) from error
    chosen: dict[str, Any] = {}
    for parameter in parameters:
        key, separator, value = parameter.partition("=")
        if not separator:
            raise ConfigError(f"sweep: --slurm has {parameter!r}, expected key=value")
        chosen[key] = int(value) if value.isdigit() else value
    executor = submitit.AutoExecutor(folder=settings.folder / "slurm", cluster=chosen.pop("cluster", "slurm"))
    executor.update_parameters(**chosen)
    submitted = [executor.submit(SlurmJob(job, settings)) for job in jobs]
    logger.info("submitted %s", ", ".join(str(one.job_id) for one in submitted))
    outcomes = []
    for job, one in zip(jobs, submitted, strict=True):
        try:
            outcomes.append(one.result())
        except Exception as error:
            # Wait for the other jobs even if one fails.
            outcomes.append(Outcome(name=job.name, status="failed", detail=f"Slurm job {one.job_id}: {error}"))
    return outcomes

"""Benchmark data-parallel scaling: the same run on 1, 2, ... processes with one thread or GPU each.

Starts `scripts/train.py` through torchrun and reads the `log.jsonl` of the runs. Efficiency is the throughput on n
processes divided by n times the throughput on one. All runs take the same steps on the same data, so their losses are
compared, too.

    python tools/bench_ranks.py experiment=quickstart                      1 and 2 processes, 60 steps, two rounds
    python tools/bench_ranks.py --ranks 1 2 4 8 --steps 200 experiment=pixel_sail_0_5b name=bench
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.paths import root_folder
from pixel_sail.provenance import code_version
from pixel_sail.renamed import current_log_line

WARM_UP_FRACTION = 0.25
LOG_EVERY = 5
LAUNCHERS_WORDS = '\nTraceback (most recent call last):\n  File "<frozen runpy>"'


def run(ranks: int, steps: int, overrides: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the log of one run. Raises: SystemExit with the end of its output if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    own = [
        *(f"optim.steps={steps}", f"log.every={LOG_EVERY}", f"run_dir={folder}", "evals=[]"),
        *("log.tensorboard=false", "log.progress=false", "validation.every=0"),
    ]
    command = [*launcher, str(root_folder() / "scripts" / "train.py"), *overrides, *own]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        # The launcher's own traceback comes last and does not contain the cause.
        said = done.stderr.partition(LAUNCHERS_WORDS)[0]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{said[-3000:]}")
    return [current_log_line(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def rate(log: Sequence[dict[str, Any]]) -> float:
    """Return samples per second after the warm-up."""
    return statistics.median(line["perf/samples_per_s"] for line in log[int(WARM_UP_FRACTION * len(log)) :])


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print rates and efficiencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2, help="runs per number of processes, interleaved")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="+", help="of scripts/train.py")
    options = parser.parse_args(arguments)
    rates: dict[int, list[float]] = {ranks: [] for ranks in options.ranks}
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench_ranks_") as work:
        for number in range(options.rounds):
            for ranks in options.ranks:
                log = run(ranks, options.steps, options.overrides, Path(work) / f"{ranks}_{number}")
                rates[ranks].append(rate(log))
                losses[ranks] = log[-1]["loss/total"]
    first = options.ranks[0]
    one = statistics.median(rates[first]) / first
    found = {}
    for ranks, own in rates.items():
        middle = statistics.median(own)
        found[ranks] = {"samples_per_s": own, "efficiency": middle / (ranks * one), "last_loss": losses[ranks]}
        print(
            f"{ranks:3d} processes   {middle:8.1f} samples/s ({min(own):.1f} .. {max(own):.1f})   "
            f"efficiency {found[ranks]['efficiency']:.2f}   loss of the last step {losses[ranks]:.6f}"
        )
    if options.json:
        replace_text(options.json, json.dumps({"code": code_version(), "ranks": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

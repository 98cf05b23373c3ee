"""Train a model: `scripts/train.py experiment=quickstart optim.lr=1e-3`, with python, torchrun, accelerate or
deepspeed.

--dry-run takes one step, prints what the run would do, and writes nothing. -m runs a sweep: one run for every value of
`key=a,b,c`, see pixel_sail/sweep/run.py.
"""

import logging
import sys
from pathlib import Path

from pixel_sail import dist
from pixel_sail.cli import script_help, wants_help
from pixel_sail.config import TrainConfig, build, command_line_overrides, load_config
from pixel_sail.data.loader import is_lost_worker
from pixel_sail.entry import one_message
from pixel_sail.evaluation.validation import validation_for
from pixel_sail.sweep import run as sweep
from pixel_sail.training.dry_run import dry_run
from pixel_sail.training.loop import train
from pixel_sail.training.preemption import LostPeer, LostWorker, RequeueRun

DRY_RUN = "--dry-run"
MULTIRUN = ("-m", "--multirun")


@one_message
def main() -> int:
    """Run training and return the exit status.

    Exit status: 2 and one message for wrong input, 85 for a signal, after saving a checkpoint, 86 for a lost process.
    """
    if wants_help(sys.argv[1:]):
        print(script_help(Path(__file__), "TrainConfig"))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    dist.ensure_launch_environment()
    overrides = [argument for argument in command_line_overrides() if argument != DRY_RUN]
    config = load_config("train", TrainConfig, overrides)
    evals = {name: build(node, f"evals.{name}") for name, node in config.evals.items()}
    evaluate = validation_for(evals, config.predict, config.validation, config.log) if evals else None
    try:
        if DRY_RUN in sys.argv:
            lines = dry_run(config)
            if dist.rank() == 0:
                print("\n".join(lines))
        else:
            train(config, evaluate)
    except RequeueRun:
        dist.shutdown()
        raise
    except RuntimeError as error:
        if is_lost_worker(error):
            raise LostWorker(
                f"rank {dist.rank()} of {dist.world_size()}: {error}. The usual cause is a lack of memory (see "
                "dmesg) or, for a bus error, of shared memory. Lower data.num_workers, or enlarge /dev/shm. Run the "
                "same command again to resume from the last complete checkpoint"
            ) from error
        if "EADDRINUSE" in str(error):
            raise dist.LaunchError(
                f"the address of the process group is in use ({error}); set MASTER_PORT to another port, or launch "
                "with torchrun --standalone"
            ) from error
        if dist.is_lost_peer(error):
            raise LostPeer(
                f"rank {dist.rank()} of {dist.world_size()} lost another process, or timed out waiting for it "
                f"(watchdog.peer_timeout_s): {error}. Look for the first error of the other processes and for nodes "
                "that are down. Run the same command again to resume from the last complete checkpoint"
            ) from error
        raise
    dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(sweep.main() if set(MULTIRUN) & set(sys.argv) else main())

"""Run scripts/train.py with an injected fault, for tests of how a run handles it.

    faulty_run.py FAULT RANK STEP OVERRIDE...

FAULT at that rank's step (counted from 1): `stuck` - sleeps forever before it computes; `gradient` - a gradient
that is NaN from a loss that is finite; `loss` - a loss that is NaN; `disk` - from then on no file can grow beyond
100,000 bytes; `item` - STEP is the number of an item of the source refshapes that sleeps forever when it
is read.
"""

import itertools
import os
import resource
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixel_sail.data.mixture import Mixture
from pixel_sail.training import step, watchdog

ROOT = Path(__file__).resolve().parent.parent
FOR_EVER_S = 3600
DISK_BYTES = 100_000


def main() -> None:
    fault, rank, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.argv[1:4] = []
    watchdog.GRACE_S = 1.0
    if os.environ.get("RANK", "0") == rank:
        if fault == "item":
            stick_at_item(when)
        else:
            spoil_step(fault, when)
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def stick_at_item(number: int) -> None:
    item = Mixture.item

    def item_or_sleep(self, position):
        place = self.stream_item(position)
        if (place.source_name, place.item) == ("refshapes", number):
            time.sleep(FOR_EVER_S)
        return item(self, position)

    Mixture.item = item_or_sleep


def spoil_step(fault: str, when: int) -> None:
    """Corrupt the loss of the first micro-batch of a step; with SMALL a step has two on one process, one on two."""
    combine, calls = step.combine, itertools.count(1)
    first_call = (when - 1) * (2 // int(os.environ.get("WORLD_SIZE", "1"))) + 1

    def spoiled(sums, *rest):
        loss = combine(sums, *rest)
        if next(calls) != first_call:
            return loss
        if fault == "stuck":
            time.sleep(FOR_EVER_S)
        if fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, DISK_BYTES))
            return loss
        if fault == "loss":
            sums.text_S.data[...] = float("nan")
        # 0 in value; the square root of 0 has an infinite slope, times 0 is NaN.
        return loss + 0.0 * (0.0 * loss).sqrt()

    step.combine = spoiled


if __name__ == "__main__":
    main()

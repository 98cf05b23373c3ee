"""Run scripts/train.py while every rank records the samples of each step in `<run_dir>/batches/<start>_<rank>.jsonl`.

One line per step, one entry per micro-batch; `start` is the number of steps the run had when this session began.

    [{"samples": ["shapes/train/image=3"], "images": 1, "prompts": 0, "masks": 2}, ...]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixel_sail import dist
from pixel_sail.training import loop
from pixel_sail.types import Batch
from scripts import train

step = loop.optimizer_step


def contents(batch: Batch) -> dict:
    """Return the counts of images, prompts and masks of a micro-batch."""
    prompts = int((batch.prompt_ids_BT >= 0).any())
    return {
        "samples": list(batch.sample_ids),
        "images": len(batch.grids),
        "prompts": prompts,
        "masks": len(batch.masks),
    }


def recorded(model, optimizer, batches: Sequence[Batch], *arguments, **named):
    """Record the batches, then run the step."""
    if recorded.file is None:
        run_dir = Path(next(item for item in sys.argv if item.startswith("run_dir=")).removeprefix("run_dir="))
        log = run_dir / "log.jsonl"
        start = log.read_text().count('"loss/total"') if log.is_file() else 0
        recorded.file = run_dir / "batches" / f"{start:04d}_{dist.rank()}.jsonl"
        recorded.file.parent.mkdir(parents=True, exist_ok=True)
    with recorded.file.open("a") as file:
        file.write(json.dumps([contents(batch) for batch in batches]) + "\n")
    return step(model, optimizer, batches, *arguments, **named)


recorded.file = None
loop.optimizer_step = recorded

if __name__ == "__main__":
    sys.exit(train.main())

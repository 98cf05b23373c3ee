"""Evaluate a checkpoint: `scripts/evaluate.py checkpoint=runs/quickstart evals=[refshapes_val,refshapes_testA]`."""

import json
import logging
import sys
from pathlib import Path

from pixel_sail import dist
from pixel_sail.cli import script_help, wants_help
from pixel_sail.config import EvalConfig, command_line_overrides, load_config
from pixel_sail.entry import one_message
from pixel_sail.evaluation.run import run_evals


@one_message
def main() -> int:
    """Run the configured evals and print their scores; wrong input ends with one message and exit status 2."""
    if wants_help(sys.argv[1:]):
        print(script_help(Path(__file__), "EvalConfig"))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    dist.ensure_launch_environment()
    config = load_config("evaluate", EvalConfig, command_line_overrides())
    dist.start_group()
    results = run_evals(config)
    if dist.rank() == 0:
        print(json.dumps(results, indent=1))
    dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

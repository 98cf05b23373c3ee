"""Run a grid of trainings, as `scripts/train.py -m` does; see pixel_sail/sweep/run.py and docs/ablations.md."""

import sys

from pixel_sail.sweep.run import main

if __name__ == "__main__":
    sys.exit(main())

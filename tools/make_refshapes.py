"""Render the RefShapes benchmark: images, and annotations in every file format the project reads.

Run once before training on RefShapes; see `pixel_sail.refshapes`. Example:

    python tools/make_refshapes.py --out data/refshapes --seed 0 --train 12000 --eval 150 --workers 2
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pixel_sail.entry import one_message
from pixel_sail.refshapes import RefShapesSpec, write_refshapes


@one_message
def main() -> int:
    """Read the command line, render the dataset, and return the exit status."""
    parser = argparse.ArgumentParser(description="Render the RefShapes benchmark.")
    parser.add_argument("--out", type=Path, default=Path("data/refshapes"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=RefShapesSpec.num_train, help="number of training images")
    parser.add_argument("--eval", type=int, default=RefShapesSpec.num_eval, help="number of images in each other split")
    parser.add_argument("--workers", type=int, default=2, help="worker processes; the result does not depend on it")
    options = parser.parse_args()
    spec = RefShapesSpec(seed=options.seed, num_train=options.train, num_eval=options.eval)
    with tqdm(total=len(spec.jobs()), unit="image") as bar:
        is_new = write_refshapes(options.out, spec, num_workers=options.workers, on_image=bar.update)
    print(f"{options.out}: {'written' if is_new else 'already contains exactly this dataset, reused'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

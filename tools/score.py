"""Score a file of predictions against referring annotations: prints one JSON object.

Place in the flow: the last step of an evaluation, needing neither model nor photos. Example:

    python tools/score.py --predictions runs/a/refcoco_val.jsonl --refer-root data/ref_seg --dataset refcoco --split val
    {"ciou": 0.791, "giou": 0.802, "p50": 0.911, ..., "count": 10834, "missing": 3}
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.evaluation.predictions import read_predictions, score_predictions
from pixel_sail.types import DataError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores and return 0; on wrong data write the reason to stderr and return 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    options = _parse(arguments)
    try:
        annotations = load_refer(
            options.refer_root, options.dataset, options.split, split_by=options.split_by, image_dir=options.image_dir
        )
        sums = score_predictions(expressions(annotations), read_predictions(options.predictions))
        print(json.dumps(sums.summary()))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score referring segmentation predictions.")
    parser.add_argument("--predictions", type=Path, required=True, help="JSON lines written by the evaluation")
    parser.add_argument("--refer-root", type=Path, required=True, help="folder that holds the dataset folders")
    parser.add_argument("--dataset", required=True, help="folder name, for example refcoco+")
    parser.add_argument("--split", required=True, help="exact split name, for example testA")
    parser.add_argument("--split-by", help="part in brackets of refs(...).p, needed where there are several files")
    parser.add_argument("--image-dir", type=Path, help="photos; not opened, only named")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

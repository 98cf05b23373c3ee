"""Score a prediction file against referring annotations and print one JSON object.

Needs neither model nor images. Example:

    python tools/score.py --predictions runs/a/refcoco_val.jsonl --refer-root data/ref_seg --dataset refcoco --split val
    {"ciou": 0.791, "giou": 0.802, "p50": 0.911, ..., "count": 10834, "missing": 3, "paper_ciou": 0.79, ...}

Names with the prefix paper_ are scores as computed by the released scripts; the others are standard scores. Use
`--evaluated runs/a/evaluation/reasonseg_val` to rescore the output of scripts/evaluate.py for any benchmark.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.entry import one_message
from pixel_sail.evaluation.loaders import LOADER_HELP
from pixel_sail.evaluation.predictions import measure_predictions, read_predictions
from pixel_sail.evaluation.stored import read_stored
from pixel_sail.evaluation.task_scores import Scores


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores and return 0; on wrong data write the reason to stderr and return 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    options = _parse(arguments)
    print(json.dumps(_score(options)))
    return 0


def _score(options: argparse.Namespace) -> Scores:
    """Return the requested scores. Raises: DataError."""
    if options.evaluated is not None:
        return read_stored(options.evaluated, options.loader).measure().scores
    annotations = load_refer(
        options.refer_root, options.dataset, options.split, split_by=options.split_by, image_dir=options.image_dir
    )
    return measure_predictions(expressions(annotations), read_predictions(options.predictions)).scores


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score predictions.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--evaluated", type=Path, help="folder of one eval of an evaluation; needs no other option")
    what.add_argument("--predictions", type=Path, help="predictions of referring segmentation as JSON lines")
    parser.add_argument("--refer-root", type=Path, help="folder that contains the dataset folders")
    parser.add_argument("--dataset", help="folder name, for example refcoco+")
    parser.add_argument("--split", help="exact split name, for example testA")
    parser.add_argument("--split-by", help="the part in brackets of refs(...).p, required if there are several files")
    parser.add_argument("--image-dir", type=Path, help="folder of images; only their names are used")
    parser.add_argument("--loader", action="append", default=[], metavar="NAME", help=LOADER_HELP)
    options = parser.parse_args(arguments)
    if options.predictions is not None and None in (options.refer_root, options.dataset, options.split):
        parser.error("--predictions needs --refer-root, --dataset and --split")
    return options


if __name__ == "__main__":
    sys.exit(main())

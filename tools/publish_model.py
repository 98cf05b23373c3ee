"""Write a model card into the exported folder of a run and, with --push, upload both to the Hugging Face hub.

    python tools/publish_model.py runs/mine --license apache-2.0                       runs/mine/export/README.md
    python tools/publish_model.py runs/mine --license apache-2.0 --push owner/name     uploads as private

The card is generated from the records of the run and its evaluation: data, recipe, code, scores of these weights,
limits. --license is the licence of the weights. It depends on the data and the initial weights, so it has no default.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.entry import one_message
from pixel_sail.model_card import push_model, write_card


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card and upload; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--license", required=True, help="licence identifier of the hub, for example apache-2.0, cc-by-nc-4.0, other"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this model repository")
    parser.add_argument("--public", action="store_true", help="create a new repository as public")
    options = parser.parse_args(arguments)
    card = write_card(options.run, name=options.push or options.run.resolve().name, license_name=options.license)
    print(card)
    if options.push:
        commit = push_model(card.parent, options.push, public=options.public)
        print(f'Predictor.from_pretrained("{options.push}", revision="{commit}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())

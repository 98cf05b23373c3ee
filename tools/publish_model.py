"""Write the card of a trained model into its exported folder, and on request upload both to the Hugging Face hub.

    python tools/publish_model.py runs/mine --license apache-2.0                       runs/mine/export/README.md
    python tools/publish_model.py runs/mine --license apache-2.0 --push owner/name     and the upload, private

The card says what the run and its evaluation wrote down: data, recipe, code, scores of these very weights, limits. The
licence is that of the weights, which hangs on the data and the weights started from; nobody else can know it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.entry import one_message
from pixel_sail.model_card import push_model, write_card


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Write and upload; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run whose training finished")
    parser.add_argument(
        "--license", required=True, help="as the hub writes it, such as apache-2.0, cc-by-nc-4.0, other"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this model on the hub")
    parser.add_argument("--public", action="store_true", help="make it visible to all, if it is new there")
    options = parser.parse_args(arguments)
    card = write_card(options.run, name=options.push or options.run.resolve().name, license_name=options.license)
    print(card)
    if options.push:
        commit = push_model(card.parent, options.push, public=options.public)
        print(f'Predictor.from_pretrained("{options.push}", revision="{commit}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())

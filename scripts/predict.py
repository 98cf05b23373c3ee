"""Ask a checkpoint about an image or a folder of images.

    scripts/predict.py checkpoint=runs/quickstart image=photo.jpg question="Please segment the red star in this image."
    scripts/predict.py checkpoint=... image=photo.jpg question="What is <Prompt0>?" "boxes=[[10,20,200,180]]"

Writes <output>/<image>.json (answer, masks as COCO RLE, scores) and <image>.png (the masks over the image).
"""

import logging
import sys

from pixel_sail.ask_files import ask_files
from pixel_sail.config import AskConfig, ConfigError, command_line_overrides, load_config
from pixel_sail.types import DataError


def main() -> int:
    """Answer for every image; wrong input ends with one message and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        for path, result in ask_files(load_config("predict", AskConfig, command_line_overrides())):
            print(f"{path}: {result.answer}")
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Answer a question about an image or a folder of images with a checkpoint.

    scripts/predict.py checkpoint=runs/quickstart image=image.jpg question="Please segment the red star in this image."
    scripts/predict.py --checkpoint FOLDER --image 'image (1).jpg' --question 'What is <Prompt0>?' --box 10,20,200,180

Writes <output>/<image>.json (answer, masks as COCO RLE, scores) and <image>.png (masks overlaid on the image).
--checkpoint, --image, --question and --output set the settings of these names to the literal text, ${...} included.
--box X0,Y0,X1,Y1 and --point X,Y may be repeated. Options and settings may be in any order.
"""

import io
import logging
import sys
from pathlib import Path

from pixel_sail.cli import script_help, wants_help
from pixel_sail.config import command_line_overrides
from pixel_sail.entry import one_message
from pixel_sail.predict_files import image_files, predict_command_config, predict_files
from pixel_sail.types import DataError


@one_message
def main() -> int:
    """Answer for every image; exit status 1 if some of several images are unusable, 2 for other wrong input."""
    if wants_help(sys.argv[1:]):
        print(script_help(Path(__file__), "PredictCommandConfig"))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and answers may contain characters outside the terminal's encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    config = predict_command_config(command_line_overrides())
    count, unused = len(image_files(Path(config.image))), 0
    for number, (path, result) in enumerate(predict_files(config), start=1):
        unused += isinstance(result, DataError)
        said = f"{type(result).__name__}: {result}" if isinstance(result, DataError) else result.answer
        # Flush every line, also into a pipe: a folder can take hours.
        print(f"{number}/{count} {path}: {said}" if count > 1 else f"{path}: {said}", flush=True)
    if unused:
        print(f"{unused} of {count} images could not be used, see above", file=sys.stderr)
    return int(unused > 0)


if __name__ == "__main__":
    sys.exit(main())

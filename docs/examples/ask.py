"""Ask a model about a picture from Python: one question about an object, one about a marked region.

Place in the flow: exported folder -> `Predictor` -> `Reply` with text, masks at image size and their scores. Give
`RUN/export` of a trained model instead of the random one to see sense.

    python docs/examples/ask.py [FOLDER]
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tiny import export_model, work_folder

from pixel_sail.config import PredictConfig
from pixel_sail.data.images import load_image
from pixel_sail.evaluation.predict import Predictor, Reply
from pixel_sail.types import VisualPrompt


def main(folder: Path) -> list[Reply]:
    """Ask, write the first mask as a PNG, and return the replies."""
    config = PredictConfig(answer="forced")  # Random weights never say [SEG]: it is put into their mouth.
    predictor = Predictor.from_pretrained(export_model(folder), config=config)
    photo = sorted((folder / "data" / "refshapes" / "images" / "train2014").glob("*.jpg"))[0]
    image = load_image(photo, where=f"example {photo.name}")
    height, width = image.height, image.width

    # Several questions about one image: it is encoded once.
    replies = predictor.ask(image, ["Please segment the red star in this image.", "Please segment the box."])

    # A region is marked by a mask at image size; the question calls it by its token.
    box = np.zeros((height, width), dtype=bool)
    box[height // 4 : height // 2, width // 4 : width // 2] = True
    marked = (VisualPrompt(prompt_id=0, mask=box),)
    replies += predictor.ask(image, ["Please segment what is left of <Prompt0>."], prompts=marked)

    mask = replies[0].merged("union")
    assert mask is not None
    Image.fromarray(mask).save(folder / "mask.png")
    for reply in replies:
        print(f"{reply.text!r}: {len(reply.masks_NHW)} mask(s) of {(height, width)}, scores {reply.scores}")
    return replies


if __name__ == "__main__":
    main(work_folder())

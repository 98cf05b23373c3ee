"""Ask a model about an image from Python: about an object, about a marked region, and on and on about one image.

Exported folder -> `Predictor` -> `PredictorOutput` with text, masks at image size, scores and boxes. Give `RUN/export`
of a trained model instead of the random one to see sense.

    python docs/examples/ask.py [FOLDER]
"""

from pathlib import Path

from PIL import Image
from tiny import export_model, work_folder

from pixel_sail import Box, Predictor, PredictorOutput
from pixel_sail.config import PredictConfig


def main(folder: Path) -> list[PredictorOutput]:
    """Ask, write the first mask as a PNG, and return the answers."""
    config = PredictConfig(answer="forced")  # Random weights never say [SEG]: it is put into their mouth.
    predictor = Predictor.from_pretrained(export_model(folder), config=config)
    image = sorted((folder / "data" / "refshapes" / "images" / "train2014").glob("*.jpg"))[0]

    # An object, named by words: "Please segment the red star in this image."
    results = [predictor.segment(image, "the red star")]

    # A region, marked by a box, a point or a mask; the question calls it by its name.
    chat = predictor.chat(image, [Box(24, 24, 48, 48)])
    results.append(chat.ask("Please segment what is left of <Prompt0>."))
    # A second question about the same image knows the first; the image is not encoded again.
    results.append(chat.ask("Please segment what is above it."))

    mask = results[0].mask
    assert mask is not None
    Image.fromarray(mask).save(folder / "mask.png")
    for result in results:
        print(f"{result.answer!r}: boxes {result.boxes}, scores {result.scores}, {result.timing}")
    return results


if __name__ == "__main__":
    main(work_folder())

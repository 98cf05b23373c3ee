"""Query a model from Python: segment a named object, refer to a marked region, and ask a follow-up question.

Exported folder -> `Predictor` -> `PredictorOutput` with text, masks at image size, scores and boxes. The model has
random weights; use `RUN/export` of a trained one for meaningful masks.

    python docs/examples/ask.py [FOLDER]
"""

from pathlib import Path

from PIL import Image
from tiny import export_model, work_folder

from pixel_sail import Box, Predictor, PredictorOutput
from pixel_sail.config import PredictConfig


def main(folder: Path) -> list[PredictorOutput]:
    """Query the model, write the first mask as a PNG, and return the outputs."""
    config = PredictConfig(answer="forced")  # Prefill the answer: random weights do not generate [SEG].
    predictor = Predictor.from_pretrained(export_model(folder), config=config)
    image = sorted((folder / "data" / "refshapes" / "images" / "train2014").glob("*.jpg"))[0]

    # An object, named by words: "Please segment the red star in this image."
    results = [predictor.segment(image, "the red star")]

    # A region, marked by a box, a point or a mask; the question refers to it by its token.
    chat = predictor.chat(image, [Box(24, 24, 48, 48)])
    results.append(chat.ask("Please segment what is left of <Prompt0>."))
    # The second question has the first as context; the image is not encoded again.
    results.append(chat.ask("Please segment what is above it."))

    mask = results[0].mask
    assert mask is not None
    Image.fromarray(mask).save(folder / "mask.png")
    for result in results:
        print(f"{result.answer!r}: boxes {result.boxes}, scores {result.scores}, {result.timing}")
    return results


if __name__ == "__main__":
    main(work_folder())

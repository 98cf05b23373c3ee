"""Scoring during training, and the pictures that go with it.

Place in the flow: `scripts/train.py` gives `validation_for(...)` to the training loop, which knows nothing of
evaluation. A validation logs one line of scores of every eval on its first `max_images` images, and a few overlays.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixel_sail.config import LogConfig, PredictConfig, ValidationConfig
from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation.overlay import PREDICTED_COLOR, TRUE_COLOR, Picture, paint
from pixel_sail.evaluation.predict import Predictor
from pixel_sail.evaluation.refer_seg import first_images, score_in_memory
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.training.log import RunLog
from pixel_sail.types import Expression, Prediction


def validation_for(
    evals: Mapping[str, Sequence[Expression]], predict: PredictConfig, config: ValidationConfig, log_config: LogConfig
) -> Callable[[PixelSailForSegmentation, PixelSailProcessor, int, RunLog], None]:
    """Return the function the training loop calls to score the model after a step."""
    chosen = {name: first_images(items, config.max_images) for name, items in evals.items()}

    def evaluate(model: PixelSailForSegmentation, processor: PixelSailProcessor, step: int, log: RunLog) -> None:
        predictor = Predictor(model, processor, predict)
        for name, items in chosen.items():
            sums, predictions = score_in_memory(predictor, items)
            log.scalars(step, {f"{name}/{key}": value for key, value in sums.summary().items()})
            log.overlays(step, name, overlays(items, predictions[: log_config.overlays]))

    return evaluate


def overlays(items: Sequence[Expression], predictions: Sequence[Prediction]) -> list[tuple[str, Picture]]:
    """Return (caption, picture [H, W, 3]) of each prediction, the true mask left and the predicted one right."""
    by_id = {(item.ref_id, item.sent_id): item for item in items}
    pictures = []
    for prediction in predictions:
        item = by_id[(prediction.ref_id, prediction.sent_id)]
        image = load_image(item.image_path, where=f"image {item.image_id}", expected_hw=item.image_hw)
        empty = np.zeros(item.image_hw, dtype=bool)
        true = decode_rle(item.target) if item.target is not None else empty
        predicted = decode_rle(prediction.segmentation) if prediction.segmentation is not None else empty
        sides = (paint(image, true, TRUE_COLOR), paint(image, predicted, PREDICTED_COLOR))
        pictures.append((f"{item.text} -> {prediction.answer}", np.concatenate(sides, axis=1)))
    return pictures

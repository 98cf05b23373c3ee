"""Validation during training.

`scripts/train.py` passes `validation_for(...)` to the training loop, which does not import evaluation. A validation
logs the scores of every eval on its first `max_images` images, and a few overlays.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixel_sail.config import ConfigError, LogConfig, PredictConfig, ValidationConfig
from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation.overlay import PREDICTED_COLOR, TRUE_COLOR, ImageArray, tint_mask
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.predictions import prediction_key
from pixel_sail.evaluation.refer_seg import KIND, ReferTask, as_task, score_in_memory
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.training.log import RunLog
from pixel_sail.types import Expression, Prediction


def validation_for(
    evals: Mapping[str, Sequence[Expression] | ReferTask],
    predict: PredictConfig,
    config: ValidationConfig,
    log_config: LogConfig,
) -> Callable[[PixelSailForSegmentation, PixelSailProcessor, int, RunLog], None]:
    """Return the validation function of the training loop.

    Raises: ConfigError for an eval that is not referring segmentation.
    """
    tasks = {name: _refer_task(built, f"evals.{name}") for name, built in evals.items()}
    chosen = {name: task.first_images(config.max_images, predict.prompt) for name, task in tasks.items()}

    def evaluate(model: PixelSailForSegmentation, processor: PixelSailProcessor, step: int, log: RunLog) -> None:
        predictor = BatchPredictor(model, processor, predict)
        for name, task in chosen.items():
            sums, predictions = score_in_memory(predictor, task)
            log.scalars(step, {f"{name}/{key}": value for key, value in sums.summary().items()})
            log.overlays(step, name, overlays(task, predictions[: log_config.overlays]))

    return evaluate


def _refer_task(built: Sequence[Expression] | ReferTask, where: str) -> ReferTask:
    """Return the task of an eval. Raises: ConfigError for other tasks, whose scores do not add up over ranks."""
    task: ReferTask = as_task(built, where)
    if task.kind != KIND:
        raise ConfigError(
            f"{where}: found {task.kind}, but training scores {KIND} only; score it with scripts/evaluate.py"
        )
    return task


def overlays(task: ReferTask, predictions: Sequence[Prediction]) -> list[tuple[str, ImageArray]]:
    """Return (caption, image [H, W, 3]) of each prediction: target mask left, predicted mask right."""
    by_id = {prediction_key(item): item for item in task.items}
    images = []
    for prediction in predictions:
        item = by_id[prediction_key(prediction)]
        image = task.example(item, prediction).source_image.open(f"image {item.image_id}")
        empty = np.zeros(item.image_hw, dtype=bool)
        true = decode_rle(item.target) if item.target is not None else empty
        predicted = decode_rle(prediction.segmentation) if prediction.segmentation is not None else empty
        sides = (tint_mask(image, true, TRUE_COLOR), tint_mask(image, predicted, PREDICTED_COLOR))
        images.append((f"{item.text} -> {prediction.answer}", np.concatenate(sides, axis=1)))
    return images

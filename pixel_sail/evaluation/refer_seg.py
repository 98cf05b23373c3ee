"""The task of referring segmentation: one mask per expression, compared with the union of its targets.

Expressions of a split -> here -> `Task`, which `run.py` and validation evaluate. An eval in a config:

    {_target_: pixel_sail.evaluation.refer_seg.load, root: ..., dataset: refcoco, split: val}

`predictions.py` describes a line of its predictions. Other targets that return expressions (`coco_semantic`) are
evaluated in the same way. ReasonSeg has whole questions, which are used unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixel_sail import dist
from pixel_sail.config import ConfigError
from pixel_sail.data.sources import reasonseg
from pixel_sail.data.sources.blind_baseline import make_blind
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.data.templates.referring import PAPER_REFER_PROMPT, SHORT_REFER_PROMPT, STANDARD_REFER_PROMPT
from pixel_sail.evaluation.engine import answer_image, answer_own
from pixel_sail.evaluation.predict import SHORT_ANSWER_TOKENS, BatchPredictor
from pixel_sail.evaluation.predictions import (
    PREDICTIONS,
    measure_boundaries,
    measure_predictions,
    prediction_key,
    score_predictions,
)
from pixel_sail.evaluation.result_examples import expression_example
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import ItemRequest, Task, by_image, prompt_template
from pixel_sail.metrics.iou import IoUSums
from pixel_sail.predictor_io import PredictorOutput
from pixel_sail.rle import encode_mask
from pixel_sail.types import Expression, Prediction

__all__ = ["as_task", "by_image", "load", "load_reasonseg", "predict_image", "score_in_memory"]

KIND = "referring segmentation"

PROMPTS = {"standard": STANDARD_REFER_PROMPT, "paper": PAPER_REFER_PROMPT, "short": SHORT_REFER_PROMPT}

WHOLE_QUESTION = {"standard": "{sent}", "paper": "{sent}"}
"""Template for expressions that are questions already."""

ReferTask = Task[Expression, Prediction]


def load(
    *,
    root: str | Path,
    dataset: str | Sequence[str],
    split: str,
    split_by: str | None = None,
    image_dir: str | Path | None = None,
    text_field: str = "sent",
    blind_baseline: str = "none",
) -> list[Expression]:
    """Return the expressions of one split: the `_target_` of an eval. `blind_baseline` hides text or image from the
    model."""
    annotations = load_refer(root, dataset, split, split_by=split_by, image_dir=image_dir)
    return expressions(make_blind(annotations, blind_baseline), text_field=text_field)


def load_with_boundaries(
    *,
    root: str | Path,
    dataset: str | Sequence[str],
    split: str,
    split_by: str | None = None,
    image_dir: str | Path | None = None,
    text_field: str = "sent",
) -> ReferTask:
    """Like `load`, with boundary IoU as an additional score: 6 ms per expression at 480 x 640."""
    items = load(root=root, dataset=dataset, split=split, split_by=split_by, image_dir=image_dir, text_field=text_field)
    return replace(task_of(items), measure=measure_boundaries)


def load_reasonseg(
    *, root: str | Path, split: str, query: str = "all", sentences: str = "first", upright: bool = True
) -> ReferTask:
    """Return one split of ReasonSeg: the `_target_` of an eval. The arguments are those of `reasonseg.expressions`.

    The released script excludes questions without a predicted mask from cIoU, and does not apply EXIF orientation,
    like `upright: false`. With `upright: true` the `paper_` scores compare with the released target, but the answer
    is about the upright image, rotated back.
    Raises: DataError; ValueError on an unknown query or sentences.
    """
    items = reasonseg.expressions(root=root, split=split, query=query, sentences=sentences, upright=upright)
    return task_of(items, prompts=WHOLE_QUESTION, is_upright=upright, missing_as_released="skipped")


def task_of(
    items: Sequence[Expression],
    *,
    prompts: dict[str, str] = PROMPTS,
    is_upright: bool = False,
    missing_as_released: str = "empty",
) -> ReferTask:
    """Return the task of these expressions.

    prompts: template of each `predict.prompt`, with {sent}. is_upright: masks refer to images in EXIF orientation.
    missing_as_released: `empty` or `skipped`, treatment of an answer without a mask in the released script.
    """
    return Task(
        kind=KIND,
        items=items,
        request=partial(_request, prompts=prompts, is_upright=is_upright),
        record=_record,
        format=PREDICTIONS,
        measure=partial(measure_predictions, missing_as_released=missing_as_released),
        example=partial(expression_example, is_upright=is_upright),
        max_new_tokens=SHORT_ANSWER_TOKENS,
    )


def as_task(built: Any, where: str) -> Task[Any, Any]:
    """Return a task from the result of an eval's target. Raises: ConfigError unless it is a task or expressions."""
    if isinstance(built, Task):
        return built
    if isinstance(built, Sequence) and all(isinstance(item, Expression) for item in built):
        return task_of(built)
    raise ConfigError(
        f"{where}: found a {type(built).__name__}, expected a target that returns a Task or a list of Expression"
    )


def predict_image(predictor: BatchPredictor, group: Sequence[Expression]) -> list[Prediction]:
    """Answer all expressions about one image."""
    return answer_image(predictor, task_of(group), group)


def score_in_memory(predictor: BatchPredictor, task: ReferTask) -> tuple[IoUSums, list[Prediction]]:
    """Return the scores over all ranks and this rank's predictions without writing files, for validation."""
    items, predictions = answer_own(predictor, task)
    return sum_ious_over_ranks(score_predictions(items, predictions) if items else IoUSums()), predictions


def sum_ious_over_ranks(sums: IoUSums) -> IoUSums:
    """Return the sums over all ranks."""
    integers = torch.tensor(sums.integers(), dtype=torch.int64, device=dist.local_device())
    ratios = torch.tensor([sums.iou_sum], dtype=torch.float64, device=dist.local_device())
    return IoUSums.from_integers(dist.sum_over_ranks(integers).tolist(), iou_sum=float(dist.sum_over_ranks(ratios)[0]))


def _request(
    expression: Expression, prompt: str, *, prompts: dict[str, str], is_upright: bool
) -> ItemRequest[Expression]:
    return ItemRequest(
        item=expression,
        key=prediction_key(expression),
        image_id=expression.image_id,
        source_image=SourceImage(path=expression.image_path, size_hw=expression.image_hw, is_upright=is_upright),
        text=prompt_template(prompts, prompt, KIND).format(sent=expression.text),
    )


def _record(request: ItemRequest[Expression], output: PredictorOutput, mask_rule: str) -> Prediction:
    expression, mask, first = request.item, output.merged_mask(mask_rule), output.merged_mask("first")
    if mask is not None and first is not None and np.array_equal(mask, first):
        first = None
    return Prediction(
        ref_id=expression.ref_id,
        sent_id=expression.sent_id,
        image_id=expression.image_id,
        text=expression.text,
        segmentation=None if mask is None else encode_mask(mask),
        answer=output.answer,
        first_segmentation=None if first is None else encode_mask(first),
    )

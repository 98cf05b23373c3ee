"""Referring segmentation: every expression asks for one mask, which is compared with the union of its targets.

Expressions of a split -> here -> `Task`, which `run.py` and validation ask. An eval in a config is

    {_target_: pixel_sail.evaluation.refer_seg.load, root: ..., dataset: refcoco, split: val}

A line of its predictions is in `predictions.py`. Any other target that returns expressions (`coco_semantic`) is asked
in the same way; ReasonSeg brings whole questions, which nothing is added to.
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
"""For expressions that are questions already."""

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
    """Return the expressions of one split: the `_target_` of an eval; `blind_baseline` takes text or image from
    the model."""
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
    """Return one split as `load` does, scored by boundary IoU as well: 6 ms per expression at 480 x 640."""
    items = load(root=root, dataset=dataset, split=split, split_by=split_by, image_dir=image_dir, text_field=text_field)
    return replace(task_of(items), measure=measure_boundaries)


def load_reasonseg(
    *, root: str | Path, split: str, query: str = "all", sentences: str = "first", upright: bool = True
) -> ReferTask:
    """Return one split of ReasonSeg: the `_target_` of an eval; the arguments are those of `reasonseg.expressions`.

    In the released script a question whose answer has no mask has no part in cIoU. There the model also sees an image
    with an EXIF turn as it is stored: `upright: false` asks so. With `upright: true` the `paper_` scores compare with
    the released target, but the answer is that about the upright image, turned back.
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
    """Return the task of asking for these expressions.

    prompts: template of each `predict.prompt`, with {sent}. is_upright: masks count pixels of images turned upright.
    missing_as_released: `empty` or `skipped`, what the released script makes of an answer without a mask.
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
    """Return what an eval's target returned as a task. Raises: ConfigError unless it is one, or expressions."""
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
    """Return the scores over all ranks and this rank's predictions, without files: validation during training."""
    items, predictions = answer_own(predictor, task)
    return sum_ious_over_ranks(score_predictions(items, predictions) if items else IoUSums()), predictions


def sum_ious_over_ranks(sums: IoUSums) -> IoUSums:
    """Return the sums of all ranks."""
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

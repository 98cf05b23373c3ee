"""The task of PerBench's visual-text referring segmentation: masks for questions that mention marked regions.

`data/sources/perbench.py` -> here -> `Task`, scored by `metrics/visual_referring.py`. An eval in a config is
`{_target_: pixel_sail.evaluation.visual_referring.load, annotations: ..., image_dir: ...}`.

As in the release, an answer without a mask is retried with the prefilled answer "It is [SEG]." and recorded as
`is_retry`. `ciou`, `giou`, ... compare the union of the masks with that of the targets and count a retry as missing;
`each_giou` compares mask by mask; `paper_ciou`, `paper_giou` compare the first mask with the first target, retries
included.
"""

from collections.abc import Sequence
from pathlib import Path

from pixel_sail.data.sources import perbench
from pixel_sail.evaluation.item_predictions import ITEM_PREDICTIONS, ItemPrediction, item_prediction, regions_request
from pixel_sail.evaluation.overlay import PREDICTED_COLOR, TRUE_COLOR
from pixel_sail.evaluation.result_examples import ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import LONG_ANSWER_TOKENS, ItemRequest, Task, prompt_template
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, TaskScores, measure, merge_scores
from pixel_sail.metrics.visual_referring import score_each, score_first_as_released, score_union
from pixel_sail.types import RLE, VisualReferring

KIND = "visual referring"

PROMPTS = {"standard": "{question}", "paper": "{question}"}
"""The question of the file, unchanged as in the release."""


def load(*, annotations: str | Path, image_dir: str | Path) -> Task[VisualReferring, ItemPrediction]:
    """Return PerBench's questions from the files of `perbench.load_visual_referring`. Raises: DataError."""
    return Task(
        kind=KIND,
        items=perbench.load_visual_referring(annotations, image_dir=image_dir),
        request=_request,
        record=item_prediction,
        format=ITEM_PREDICTIONS,
        measure=_measure,
        example=_example,
        max_new_tokens=LONG_ANSWER_TOKENS,
        retries_without_mask=True,
    )


def _request(item: VisualReferring, prompt: str) -> ItemRequest[VisualReferring]:
    text = prompt_template(PROMPTS, prompt, KIND).format(question=item.question)
    return regions_request(item, text, regions=item.regions, prompt_ids=item.prompt_ids)


def _own_masks(answer: ItemPrediction) -> tuple[RLE, ...]:
    """Return the masks of an answer that is not a retry."""
    return () if answer.is_retry else answer.masks


def _example(item: VisualReferring, answer: ItemPrediction) -> ResultExample:
    return ResultExample(
        text=item.question,
        answer=answer.answer,
        source_image=SourceImage(path=item.image_path, size_hw=item.image_hw),
        panels=(
            tuple((rle, PREDICTED_COLOR) for rle in answer.masks),
            tuple((rle, TRUE_COLOR) for rle in item.targets),
        ),
        expected=item.answer,
        iou=score_union(_own_masks(answer), item.targets, where=item.item_id).iou_sum,
    )


def _measure(items: Sequence[VisualReferring], answers: Sequence[ItemPrediction]) -> TaskScores:
    triples = [(_own_masks(answer), answer, item) for item, answer in zip(items, answers, strict=True)]
    union = [score_union(own, item.targets, where=item.item_id) for own, _, item in triples]
    each = [score_each(own, item.targets, where=item.item_id) for own, _, item in triples]
    released = [score_first_as_released(answer.masks, item.targets, where=item.item_id) for _, answer, item in triples]
    return merge_scores(
        measure(union),
        measure(each, prefix="each_", names=("giou",)),
        measure(released, prefix=PAPER_PREFIX),
        retried=sum(answer.is_retry for answer in answers),
    )

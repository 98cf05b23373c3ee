"""Prediction files of all tasks except referring segmentation.

Predictor -> engine -> `<output>/<eval>/predictions.jsonl` -> the scorer of the task. Answers are written unprocessed,
so that one file can be scored in several ways:

    {"item_id": "sa_1.jpg/0.0", "question": "Can you provide ... <Prompt0>?", "answer": "<Prompt0>: a red cup.",
     "masks": [], "is_retry": false}

"masks" has one RLE per [SEG] of the answer, in order. "is_retry" means that the answer had none, and the masks come
from a retry with a forced answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pixel_sail.data.masks import check_rle
from pixel_sail.evaluation.record_files import RecordFormat, check_kinds, check_line_fields
from pixel_sail.evaluation.result_examples import ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import LONG_ANSWER_TOKENS, ItemRequest, Task
from pixel_sail.evaluation.task_scores import TaskScores
from pixel_sail.predictor_io import PredictorOutput
from pixel_sail.rle import encode_mask
from pixel_sail.types import RLE, DataError, Json, RegionCaption, RegionChoice, VisualReferring

Item = TypeVar("Item")

AboutRegion = TypeVar("AboutRegion", RegionCaption, RegionChoice)
"""Items about one marked region."""
AboutRegions = TypeVar("AboutRegions", RegionCaption, RegionChoice, VisualReferring)
"""Items about any number of marked regions."""

_FIELDS = ("item_id", "question", "answer", "masks", "is_retry")
_KINDS: dict[str, type] = {"item_id": str, "question": str, "answer": str, "masks": list, "is_retry": bool}


@dataclass(frozen=True, kw_only=True)
class ItemPrediction:
    """The answer about one item, as it is scored."""

    item_id: str
    question: str
    answer: str
    """With special tokens, without the end token."""
    masks: tuple[RLE, ...] = ()
    is_retry: bool = False


def _to_json(answer: ItemPrediction, where: str) -> Json:
    for index, mask in enumerate(answer.masks):
        check_rle(mask, None, f"{where} {answer.item_id}, mask {index}")
    return asdict(answer)


def _from_json(line: Json, where: str) -> ItemPrediction:
    check_line_fields(line, _FIELDS, (), where)
    check_kinds(line, _KINDS, where)
    masks = tuple(check_rle(mask, None, f"{where}: mask {index}") for index, mask in enumerate(line["masks"]))
    return ItemPrediction(**{**line, "masks": masks})


def answer_key(answer: ItemPrediction) -> str:
    """Return the key of an item within its benchmark."""
    return answer.item_id


ITEM_PREDICTIONS: RecordFormat[ItemPrediction, str] = RecordFormat(
    to_json=_to_json, from_json=_from_json, key=answer_key, key_name="item_id"
)


def in_order(item_ids: Sequence[str], answers: Sequence[ItemPrediction]) -> list[ItemPrediction]:
    """Return the answers in the order of the items.

    Raises: DataError for an item that occurs twice, has no answer, or for an answer to no item.
    """
    by_id: dict[str, ItemPrediction] = {}
    for answer in answers:
        ITEM_PREDICTIONS.add_unique(by_id, answer, "answers")
    unknown, unanswered = by_id.keys() - set(item_ids), set(item_ids) - by_id.keys()
    if unknown or unanswered or len(set(item_ids)) != len(item_ids):
        raise DataError(
            f"answers: found {len(answers)} to {len(item_ids)} items ({len(set(item_ids))} different), "
            f"{len(unknown)} to none of them, first {min(unknown, default=None)}, and {len(unanswered)} items without "
            f"an answer, first {min(unanswered, default=None)}; expected one each. Is it the file of this benchmark?"
        )
    return [by_id[item_id] for item_id in item_ids]


def long_answer_task(
    *,
    kind: str,
    items: Sequence[Item],
    request: Callable[[Item, str], ItemRequest[Item]],
    measure: Callable[[Sequence[Item], Sequence[ItemPrediction]], TaskScores],
    example: Callable[[Item, ItemPrediction], ResultExample],
    check: Callable[[], None],
) -> Task[Item, ItemPrediction]:
    """Return a task with long answers, one per item. The arguments are the fields of `Task`."""
    return Task(
        kind=kind,
        items=items,
        request=request,
        record=item_prediction,
        format=ITEM_PREDICTIONS,
        measure=measure,
        example=example,
        max_new_tokens=LONG_ANSWER_TOKENS,
        check=check,
    )


def region_request(item: AboutRegion, text: str) -> ItemRequest[AboutRegion]:
    """Return a question about the region of an item, which is <Prompt0>."""
    return regions_request(item, text, regions=(item.region,), prompt_ids=(0,))


def regions_request(
    item: AboutRegions, text: str, *, regions: tuple[RLE, ...], prompt_ids: tuple[int, ...]
) -> ItemRequest[AboutRegions]:
    """Return a question about regions of an item; `prompt_ids`: the <Prompt{k}> of each."""
    return ItemRequest(
        item=item,
        key=item.item_id,
        image_id=str(item.image_path),
        source_image=SourceImage(path=item.image_path, size_hw=item.image_hw),
        text=text,
        regions=regions,
        prompt_ids=prompt_ids,
    )


def item_prediction(request: ItemRequest[Any], output: PredictorOutput, mask_rule: str) -> ItemPrediction:
    """Return the record of an item with all masks, independent of `mask_rule`."""
    return ItemPrediction(
        item_id=request.key,
        question=request.text,
        answer=output.answer,
        masks=tuple(encode_mask(mask) for mask in output.masks_NHW),
        is_retry=output.is_retry,
    )

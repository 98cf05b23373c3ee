"""What a benchmark says about itself: its items, what is asked of each, what is written about each, how that is scored.

`refer_seg.py`, `region_caption.py`, `region_choice.py`, `visual_referring.py` and `grounded_caption.py` return a
`Task`, the target of an eval in a config; `engine.py` asks it. An item of PerBench's detailed captions becomes

    ItemRequest(item=RegionCaption(...), key="sa_1.jpg/0.0", image_id="images/sa_1.jpg",
                source_image=SourceImage(path=..., ...),
                text="Can you provide me with a detailed ... <Prompt0>? ...", regions=(rle,), prompt_ids=(0,))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

from pixel_sail.config import ConfigError
from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation.record_files import Record, RecordFormat
from pixel_sail.evaluation.result_examples import ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task_scores import Scores, TaskScores
from pixel_sail.predictor_io import PredictorOutput
from pixel_sail.types import RLE, VisualPrompt

LONG_ANSWER_TOKENS = 512
"""Longest answer of a task whose answer is text. Source: release."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ItemRequest(Generic[Item]):
    """An item with what is asked about it. RLEs are decoded only while its image is worked on."""

    item: Item
    key: Any
    """Names the item within its benchmark, as the key of its record does."""
    image_id: int | str
    """Items with the same one are about the same image; images are asked in the order of their ids."""
    source_image: SourceImage
    text: str
    regions: tuple[RLE, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    """Which `<Prompt{k}>` each region is."""

    def prompts(self) -> tuple[VisualPrompt, ...]:
        """Return the visual prompts."""
        pairs = zip(self.prompt_ids, self.regions, strict=True)
        return tuple(VisualPrompt(prompt_id=prompt_id, mask=decode_rle(rle)) for prompt_id, rle in pairs)

    def overlay_key(self) -> tuple[Any, ...]:
        """Return what is equal for requests about one image that see the same prompts on it."""
        return (self.prompt_ids, tuple(rle["counts"] for rle in self.regions))


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Item, Record]):
    """One benchmark, ready to be asked."""

    kind: str
    """Tasks of one kind share a table of scores."""
    items: Sequence[Item]
    request: Callable[[Item, str], ItemRequest[Item]]
    """(item, `predict.prompt`) -> what is asked. Raises: ConfigError for a prompt the task does not have."""
    record: Callable[[ItemRequest[Item], PredictorOutput, str], Record]
    """(request, output, `predict.mask`) -> what is written."""
    format: RecordFormat[Record, Any]
    measure: Callable[[Sequence[Item], Sequence[Record]], TaskScores]
    """(items, their records in the same order) -> scores by name, and what each item adds to them."""
    example: Callable[[Item, Record], ResultExample]
    """(item, record) -> an image for the report."""
    max_new_tokens: int
    """Longest answer where `predict.max_new_tokens` does not say."""
    retries_without_mask: bool = False
    """An answer without a mask is asked again with "It is [SEG]." put into the model's mouth (release)."""
    check: Callable[[], None] = lambda: None
    """Called before anything is asked. Raises: DataError when scores could not be computed, say for want of Java."""

    def score(self, items: Sequence[Item], records: Sequence[Record]) -> Scores:
        """Return the scores of items by name; `records` are in their order."""
        return self.measure(items, records).scores

    def requests(self, prompt: str) -> list[ItemRequest[Item]]:
        """Return what is asked of every item, in order. Raises: ConfigError for a prompt the task does not have."""
        return [self.request(item, prompt) for item in self.items]

    def first_images(self, max_images: int, prompt: str) -> "Task[Item, Record]":
        """Return the task with the items of its first images only, with all where `max_images` is 0."""
        if max_images == 0:
            return self
        groups = by_image(self.requests(prompt))
        return replace(self, items=[request.item for group in groups[:max_images] for request in group])


class HasImage(Protocol):
    """Something about one image."""

    @property
    def image_id(self) -> Any:
        """Return which."""


AboutImage = TypeVar("AboutImage", bound=HasImage)


def by_image(things: Sequence[AboutImage]) -> list[list[AboutImage]]:
    """Return things grouped by image, images in the order of their ids, the things of one in the order they come."""
    ordered = sorted(things, key=lambda thing: thing.image_id)
    return [list(group) for _, group in groupby(ordered, key=lambda thing: thing.image_id)]


def prompt_template(prompts: Mapping[str, str], name: str, kind: str) -> str:
    """Return the template of `predict.prompt`. Raises: ConfigError when the task does not have it."""
    if name not in prompts:
        raise ConfigError(f"predict.prompt is {name!r}, but {kind} is asked for with one of {sorted(prompts)}")
    return prompts[name]

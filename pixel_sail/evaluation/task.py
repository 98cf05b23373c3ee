"""The interface of a benchmark: its items, their requests, records and scores.

`refer_seg.py`, `region_caption.py`, `region_choice.py`, `visual_referring.py` and `grounded_caption.py` return a
`Task`, the target of an eval in a config. `engine.py` runs it. An item of PerBench's detailed captions becomes

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
"""Maximum answer length of text tasks. Source: release."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ItemRequest(Generic[Item]):
    """An item with its question. RLEs are decoded only while its image is processed."""

    item: Item
    key: Any
    """Identifies the item within its benchmark. Equal to the key of its record."""
    image_id: int | str
    """Items with the same id are about the same image. Images are processed in the order of their ids."""
    source_image: SourceImage
    text: str
    regions: tuple[RLE, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    """Index k of the `<Prompt{k}>` of each region."""

    def prompts(self) -> tuple[VisualPrompt, ...]:
        """Return the visual prompts."""
        pairs = zip(self.prompt_ids, self.regions, strict=True)
        return tuple(VisualPrompt(prompt_id=prompt_id, mask=decode_rle(rle)) for prompt_id, rle in pairs)

    def overlay_key(self) -> tuple[Any, ...]:
        """Return a key that is equal for requests about one image with the same visual prompts."""
        return (self.prompt_ids, tuple(rle["counts"] for rle in self.regions))


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Item, Record]):
    """One benchmark with its items."""

    kind: str
    """Tasks of one kind share a table of scores."""
    items: Sequence[Item]
    request: Callable[[Item, str], ItemRequest[Item]]
    """(item, `predict.prompt`) -> request. Raises: ConfigError for an unknown prompt."""
    record: Callable[[ItemRequest[Item], PredictorOutput, str], Record]
    """(request, output, `predict.mask`) -> record."""
    format: RecordFormat[Record, Any]
    measure: Callable[[Sequence[Item], Sequence[Record]], TaskScores]
    """(items, their records in the same order) -> scores by name, and the contribution of each item."""
    example: Callable[[Item, Record], ResultExample]
    """(item, record) -> an image for the report."""
    max_new_tokens: int
    """Maximum answer length unless `predict.max_new_tokens` is set."""
    retries_without_mask: bool = False
    """Whether an answer without a mask is retried with "It is [SEG]." as the prefilled answer (release)."""
    check: Callable[[], None] = lambda: None
    """Called before inference. Raises: DataError if scores cannot be computed, for example without Java."""

    def score(self, items: Sequence[Item], records: Sequence[Record]) -> Scores:
        """Return the scores of items by name. `records` are in the same order."""
        return self.measure(items, records).scores

    def requests(self, prompt: str) -> list[ItemRequest[Item]]:
        """Return the request of every item, in order. Raises: ConfigError for an unknown prompt."""
        return [self.request(item, prompt) for item in self.items]

    def first_images(self, max_images: int, prompt: str) -> "Task[Item, Record]":
        """Return the task restricted to the items of its first `max_images` images, 0 for all."""
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
    """Return elements grouped by image, sorted by image id, in their order within an image."""
    ordered = sorted(things, key=lambda thing: thing.image_id)
    return [list(group) for _, group in groupby(ordered, key=lambda thing: thing.image_id)]


def prompt_template(prompts: Mapping[str, str], name: str, kind: str) -> str:
    """Return the template of `predict.prompt`. Raises: ConfigError if the task does not have it."""
    if name not in prompts:
        raise ConfigError(f"predict.prompt is {name!r}, expected one of {sorted(prompts)} for {kind}")
    return prompts[name]

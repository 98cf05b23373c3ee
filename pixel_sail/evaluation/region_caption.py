"""The task of region captions: RefCOCOg's and PerBench's detailed ones.

`data/sources/region_caption.py` and `perbench.py` -> here -> `Task`, scored by `metrics/captions.py`. Evals in a
config:

    {_target_: pixel_sail.evaluation.region_caption.load_refcocog, annotations: ..., image_dir: ...}
    {_target_: pixel_sail.evaluation.region_caption.load_perbench, annotations: ..., image_dir: ...}

Scores: METEOR, CIDEr, BLEU and ROUGE-L of the answer without marks. With prefix `paper_`: as in the release, of the
text cleaned by its scripts and, for PerBench, with reference and answer exchanged. `protocols` selects them. Both need
Java, PerBench's `paper` also WordNet; these are checked before inference. With `protocols: []` captions are written
without scores.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pixel_sail.config import ConfigError
from pixel_sail.data.sources import perbench, region_caption
from pixel_sail.data.templates.region import PERBENCH_CAPTION_PROMPT, REGION_CAPTION_PROMPT
from pixel_sail.evaluation.item_predictions import ItemPrediction, long_answer_task, region_request
from pixel_sail.evaluation.overlay import TRUE_COLOR
from pixel_sail.evaluation.result_examples import ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import ItemRequest, Task, prompt_template
from pixel_sail.evaluation.task_scores import ItemFractions, TaskScores
from pixel_sail.metrics.answer_text import object_caption_as_released, plain_description, region_caption_as_released
from pixel_sail.metrics.captions import check_caption_tools, check_references, score_captions
from pixel_sail.metrics.java_tools import CaptionTools
from pixel_sail.types import RegionCaption

KIND = "region captions"

CaptionTask = Task[RegionCaption, ItemPrediction]


@dataclass(frozen=True, kw_only=True)
class CaptionProtocol:
    """Scoring protocol of a caption."""

    clean: Callable[[str], str]
    """Answer -> scored text."""
    scoring: str
    """Protocol of `metrics/captions.py`."""


STANDARD = CaptionProtocol(clean=plain_description, scoring="standard")

REFCOCOG_PROTOCOLS = {
    "standard": STANDARD,
    "paper": CaptionProtocol(clean=region_caption_as_released, scoring="standard"),
}
PERBENCH_PROTOCOLS = {
    "standard": STANDARD,
    "paper": CaptionProtocol(clean=object_caption_as_released, scoring="paper"),
}


def load_refcocog(
    *,
    annotations: str | Path,
    image_dir: str | Path,
    captions: str | Path | None = None,
    protocols: Sequence[str] = ("standard", "paper"),
) -> CaptionTask:
    """Return RefCOCOg's region captions from the files of `region_caption.load_region_captions`.

    Raises: DataError; ConfigError for an unknown protocol.
    """
    items = region_caption.load_region_captions(annotations, image_dir=image_dir, captions=captions)
    return _task(items, prompt=REGION_CAPTION_PROMPT, chosen=_choose(REFCOCOG_PROTOCOLS, protocols))


def load_perbench(
    *, annotations: str | Path, image_dir: str | Path, protocols: Sequence[str] = ("standard", "paper")
) -> CaptionTask:
    """Return PerBench's detailed captions from the files of `perbench.load_captions`.

    Raises: DataError; ConfigError for an unknown protocol.
    """
    items = perbench.load_captions(annotations, image_dir=image_dir)
    return _task(items, prompt=PERBENCH_CAPTION_PROMPT, chosen=_choose(PERBENCH_PROTOCOLS, protocols))


def _choose(known: dict[str, CaptionProtocol], names: Sequence[str]) -> dict[str, CaptionProtocol]:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"{KIND}: found protocols {list(names)}, expected some of {sorted(known)}")
    return {name: known[name] for name in names}


def _task(items: Sequence[RegionCaption], *, prompt: str, chosen: dict[str, CaptionProtocol]) -> CaptionTask:
    return long_answer_task(
        kind=KIND,
        items=items,
        request=partial(_request, text=prompt),
        measure=partial(_measure, chosen=chosen),
        example=_example,
        check=partial(_check, items, chosen),
    )


def _request(item: RegionCaption, prompt: str, *, text: str) -> ItemRequest[RegionCaption]:
    """Return the released question. It has no stray blanks to remove."""
    return region_request(item, prompt_template({"standard": text, "paper": text}, prompt, KIND))


def _example(item: RegionCaption, answer: ItemPrediction) -> ResultExample:
    source_image = SourceImage(path=item.image_path, size_hw=item.image_hw)
    shown = " / ".join(item.references)
    panels = (((item.region, TRUE_COLOR),),)
    return ResultExample(
        text=answer.question, answer=answer.answer, source_image=source_image, panels=panels, expected=shown
    )


def _check(items: Sequence[RegionCaption], chosen: dict[str, CaptionProtocol]) -> None:
    """Check before inference that captions can be scored. Raises: DataError."""
    for protocol in chosen.values():
        check_caption_tools(protocol.scoring)
        check_references({item.item_id: item.references for item in items}, protocol.scoring)


def _measure(
    items: Sequence[RegionCaption], answers: Sequence[ItemPrediction], *, chosen: dict[str, CaptionProtocol]
) -> TaskScores:
    scores: dict[str, float | int] = {}
    fractions: dict[str, ItemFractions] = {}
    references = {item.item_id: item.references for item in items}
    with CaptionTools() if chosen else nullcontext() as tools:
        for name, protocol in chosen.items():
            cleaned = {answer.item_id: protocol.clean(answer.answer) for answer in answers}
            result = score_captions(references, cleaned, protocol=protocol.scoring, tools=tools)
            prefix = "" if name == "standard" else f"{name}_"
            scores |= {f"{prefix}{key}": value for key, value in result.summary().items() if key != "count"}
            for key, values in result.item_means().items():
                fractions[f"{prefix}{key}"] = ItemFractions.of((values[item.item_id], 1) for item in items)
    return TaskScores(scores=scores | {"count": len(items)}, fractions=fractions)

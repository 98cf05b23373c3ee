"""The task of grounded captions: image descriptions with a mask for every visible phrase.

`data/sources/gcg_benchmark.py` -> here -> `Task`, scored by `metrics/captions.py` and `metrics/grounded_caption.py`. An
eval in a config:

    {_target_: pixel_sail.evaluation.grounded_caption.load, root: ..., split: val, image_dir: ...}

An answer `<p> A man </p> [SEG] holds <p> a cup </p> [SEG].` with two masks is the caption "A man holds a cup." with the
phrases "A man" and "a cup". Scores: meteor, cider, ... of the caption (they need Java; `score_text: false` disables
them), ap50, miou and recall of masks and phrases; with prefix `paper_` as the release computes them. Recall compares
phrases with a text encoder, `similarity_model`. Without one it is `word_recall`, by common words. `paper_recall` exists
only for bert-base-uncased, as in the release, because scores of other encoders are not comparable with published ones.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pixel_sail.data.fields import ImageFolders
from pixel_sail.data.sources import gcg_benchmark
from pixel_sail.data.templates.grounded_caption import PAPER_CAPTION_PROMPT, STANDARD_CAPTION_PROMPT
from pixel_sail.evaluation.item_predictions import ItemPrediction, long_answer_task
from pixel_sail.evaluation.overlay import PALETTE
from pixel_sail.evaluation.phrase_similarity import EncoderSimilarity
from pixel_sail.evaluation.result_examples import ColoredMasks, ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import ItemRequest, Task, prompt_template
from pixel_sail.evaluation.task_scores import ItemFractions, TaskScores
from pixel_sail.metrics.answer_text import GroundedText, grounded_text, grounded_text_as_released
from pixel_sail.metrics.captions import check_caption_tools, check_references, score_captions
from pixel_sail.metrics.grounded_caption import GroundedCaptionScores, Similarity, score_image, word_overlap
from pixel_sail.metrics.java_tools import CaptionTools
from pixel_sail.types import RLE, GroundedCaption

logger = logging.getLogger(__name__)

KIND = "grounded captions"

PROMPTS = {"standard": STANDARD_CAPTION_PROMPT, "paper": PAPER_CAPTION_PROMPT}

READERS = {"standard": grounded_text, "paper": grounded_text_as_released}
"""Extraction of caption and phrases from an answer, by protocol."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Settings of the scores."""

    similarity_model: Path | None
    score_text: bool

    def similarity(self) -> "Comparison":
        """Return the phrase similarity. Raises: DataError if the model does not exist."""
        if self.similarity_model is None:
            return Comparison(compare=word_overlap, name="word_recall", is_released=False)
        encoder = EncoderSimilarity(self.similarity_model)
        return Comparison(compare=encoder, name="recall", is_released=encoder.is_released)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A phrase similarity, and the name of the recall based on it."""

    compare: Similarity
    name: str
    is_released: bool
    """Whether it is the release's similarity, so that protocol `paper` has a recall."""


def load(
    *,
    root: str | Path,
    split: str,
    image_dir: ImageFolders,
    refuse_unpaired: bool = True,
    similarity_model: str | Path | None = None,
    score_text: bool = True,
) -> Task[GroundedCaption, ItemPrediction]:
    """Return one split. root, split, image_dir and refuse_unpaired: see `gcg_benchmark.load`.

    similarity_model: folder of a Hugging Face text encoder, bert-base-uncased for the released recall. None: phrases
    are compared by common words, without a released recall. Raises: DataError.
    """
    items = gcg_benchmark.load(root=root, split=split, image_dir=image_dir, refuse_unpaired=refuse_unpaired)
    model = None if similarity_model is None else Path(similarity_model)
    scoring = Scoring(similarity_model=model, score_text=score_text)
    return long_answer_task(
        kind=KIND,
        items=items,
        request=_request,
        measure=partial(_measure, scoring=scoring),
        example=_example,
        check=partial(_check, items, scoring),
    )


def _request(item: GroundedCaption, prompt: str) -> ItemRequest[GroundedCaption]:
    return ItemRequest(
        item=item,
        key=item.image_id,
        image_id=item.image_id,
        source_image=SourceImage(path=item.image_path, size_hw=item.image_hw),
        text=prompt_template(PROMPTS, prompt, KIND),
    )


def _example(item: GroundedCaption, answer: ItemPrediction) -> ResultExample:
    source_image = SourceImage(path=item.image_path, size_hw=item.image_hw)
    panels = (_panel(answer.masks), _panel(item.masks))
    return ResultExample(
        text=item.image_id, answer=answer.answer, source_image=source_image, panels=panels, expected=item.captions[0]
    )


def _panel(masks: Sequence[RLE]) -> ColoredMasks:
    """Return masks with cyclic colors."""
    return tuple((rle, PALETTE[index % len(PALETTE)]) for index, rle in enumerate(masks))


def _check(items: Sequence[GroundedCaption], scoring: Scoring) -> None:
    """Check before inference that answers can be scored. Raises: DataError."""
    comparison = scoring.similarity()
    # Detect an unreadable model now, not after inference.
    comparison.compare(("a man",), ("a man",))
    if not comparison.is_released:
        found = "null" if scoring.similarity_model is None else str(scoring.similarity_model)
        logger.warning(
            "%s: similarity_model is %s, expected the folder of bert-base-uncased for the released recall; there will "
            "be no paper_recall (docs/evaluation.md says where to get it)",
            *(KIND, found),
        )
    if scoring.score_text:
        check_caption_tools("standard")
        check_references({item.image_id: item.captions for item in items}, "standard")


def _measure(items: Sequence[GroundedCaption], answers: Sequence[ItemPrediction], *, scoring: Scoring) -> TaskScores:
    scores: dict[str, float | int] = {}
    fractions: dict[str, ItemFractions] = {}
    comparison = scoring.similarity()
    references = {item.image_id: item.captions for item in items}
    with CaptionTools() if scoring.score_text else nullcontext() as tools:
        for protocol, read in READERS.items():
            prefix = "" if protocol == "standard" else f"{protocol}_"
            texts = {answer.item_id: read(answer.answer) for answer in answers}
            masks = _score_masks(items, answers, texts, comparison.compare, protocol)
            summary = masks.summary()
            found = summary.pop("recall")
            each = masks.fractions()
            fractions[f"{prefix}miou"] = ItemFractions.of(image["miou"] for image in each)
            if protocol == "standard" or comparison.is_released:
                summary[comparison.name] = found
                fractions[f"{prefix}{comparison.name}"] = ItemFractions.of(image["recall"] for image in each)
            if tools is not None:
                captions = {image_id: text.caption for image_id, text in texts.items()}
                result = score_captions(references, captions, protocol="standard", tools=tools)
                summary |= result.summary()
                for key, values in result.item_means().items():
                    fractions[f"{prefix}{key}"] = ItemFractions.of((values[item.image_id], 1) for item in items)
            scores |= {f"{prefix}{key}": value for key, value in summary.items() if key not in ("count", "targets")}
    counts = {"targets": sum(len(item.masks) for item in items), "count": len(items)}
    return TaskScores(scores=scores | counts, fractions=fractions)


def _score_masks(
    items: Sequence[GroundedCaption],
    answers: Sequence[ItemPrediction],
    texts: Mapping[str, GroundedText],
    similarity: Similarity,
    protocol: str,
) -> GroundedCaptionScores:
    """Return the scores of masks and phrases in one protocol, images in the order of the items."""
    images = [
        score_image(
            item.image_id,
            predicted=answer.masks,
            predicted_phrases=texts[item.image_id].phrases,
            targets=item.masks,
            target_phrases=item.phrases,
            similarity=similarity,
            protocol=protocol,
        )
        for item, answer in zip(items, answers, strict=True)
    ]
    merged = tuple(image for scores in images for image in scores.images)
    return GroundedCaptionScores(protocol=protocol, images=merged)

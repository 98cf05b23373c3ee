"""Reads referring segmentation as training samples and as expressions to score.

Takes the `ReferAnnotations` of `data/refer_annotations.py`, which describes the file layouts, and returns a `Sample`
(training: one per image, several expressions as turns) or an `Expression` (evaluation: every sentence once). Serves
RefCOCO, RefCOCO+, RefCOCOg, RefShapes and gRefCOCO.

The released loader differs. It fixes one sentence per object at construction (most are never seen), samples five
objects with replacement (a conversation may ask the same question twice), and sums polygons and instances instead of
uniting them (masks contain 2s where they overlap). Here sentences are resampled in every epoch, without repeats unless
`expression_sampling=released`.

Example: the ref {"ref_id": 8, "image_id": 519404, "ann_id": 1241542, "split": "val", "sentences": [{"sent_id": 2,
"sent": "the tie of the standing man", "raw": "The tie of the standing man."}]} becomes
Expression(ref_id=8, sent_id=2, image_id=519404, text="the tie of the standing man", target={"size": ...}, ...).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.masks import decode_segmentation, merge_to_rle, summed_as_released, union_masks
from pixel_sail.data.refer_annotations import Ref, ReferAnnotations, Sentence, load_refer
from pixel_sail.data.sources.blind_baseline import make_blind
from pixel_sail.data.templates.referring import QUESTION_STYLES, referring_turn
from pixel_sail.rle import encode_mask
from pixel_sail.types import RLE, BoolMask, DataError, Expression, Sample, Source

__all__ = ["TEXT_FIELDS", "ReferAnnotations", "ReferSource", "expressions", "load", "load_refer"]

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("raw", "sent")
"""`raw` as typed by the annotator; `sent` lower-cased, without punctuation (used by the released evaluation)."""


def load(
    *,
    root: str | Path,
    dataset: str | Sequence[str],
    split: str = "train",
    split_by: str | None = None,
    image_dir: str | Path | None = None,
    name: str | None = None,
    expressions_per_image: int = 5,
    text_field: str = "raw",
    question_style: str = "varied",
    blind_baseline: str = "none",
    expression_sampling: str = OURS,
) -> Source:
    """Return one split as a training source: the `_target_` of `configs/source/refcoco.yaml` and similar configs.

    root: folder with the dataset folders and the images. dataset: folder name, for example `refcoco+`, or a list of
    alternatives, of which the first that exists is read. split: exact name in the file. split_by: the part in
    parentheses, `unc` or `umd`; needed if there are several files. image_dir: image folder, needed if the images are in
    none of COCO_TRAIN_FOLDERS. name: source name in logs, the dataset by default. expressions_per_image: maximum turns
    per sample. text_field: `raw` or `sent`. question_style: `varied` or `fixed`. blind_baseline: language or image.
    expression_sampling: with `ours`, no expression occurs twice in a sample; with `released`, a sample has exactly
    `expressions_per_image` turns about objects sampled with replacement, and each object is queried with one of its
    sentences only (of its last ref if it has several). Raises: DataError.
    """
    annotations = load_refer(root, dataset, split, split_by=split_by, image_dir=image_dir)
    return ReferSource(
        make_blind(annotations, blind_baseline),
        name=name if name is not None else annotations.dataset,
        expressions_per_image=expressions_per_image,
        text_field=text_field,
        question_style=question_style,
        expression_sampling=expression_sampling,
    )


def expressions(annotations: ReferAnnotations, *, text_field: str = "sent") -> list[Expression]:
    """Return every sentence of every ref exactly once, sorted by (image_id, ref_id, sent_id).

    The target is the union of the ref's instances, crowds included, and None for a no-target ref. `released_target` is
    the target of the released scripts if it differs. Raises: DataError.
    """
    _check_text_field(text_field)
    result = []
    for image_id, refs in annotations.refs_by_image.items():
        image = annotations.images[image_id]
        for ref in refs:
            target, released = _target_rle(ref, annotations), _released_target(ref, annotations)
            result += [
                Expression(
                    ref_id=ref.ref_id,
                    sent_id=sentence.sent_id,
                    image_id=image_id,
                    image_path=image.path,
                    image_hw=image.size_hw,
                    text=getattr(sentence, text_field),
                    target=target,
                    released_target=released,
                )
                for sentence in ref.sentences
            ]
    return result


class ReferSource:
    """Training samples of referring segmentation: one item per image, several of its expressions as turns.

    A no-target expression is answered with `No target [SEG].` and an all-False mask, as in the released training, so
    that the mask head learns to predict an empty mask. Sentences without text are skipped, counted and logged.
    """

    def __init__(
        self,
        annotations: ReferAnnotations,
        *,
        name: str,
        expressions_per_image: int = 5,
        text_field: str = "raw",
        question_style: str = "varied",
        expression_sampling: str = OURS,
    ) -> None:
        """Check the settings. Raises: DataError."""
        _check_text_field(text_field)
        if question_style not in QUESTION_STYLES:
            raise DataError(
                f"source {name}: found question_style {question_style!r}, expected one of {QUESTION_STYLES}; "
                "correct the config"
            )
        if expressions_per_image < 1:
            raise DataError(
                f"source {name}: found expressions_per_image {expressions_per_image}, expected at least 1; "
                "correct the config"
            )
        self.name = name
        self._annotations = annotations
        self._expressions_per_image = expressions_per_image
        self._text_field = text_field
        self._question_style = question_style
        self._samples_as_released = is_released(name, "expression_sampling", expression_sampling)
        self._image_ids = self._usable_image_ids()

    def __len__(self) -> int:
        """Return the number of images with at least one expression."""
        return len(self._image_ids)

    def image_path(self, index: int) -> Path:
        """Return the image path of an item."""
        return self._annotations.images[self._image_ids[index]].path

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with up to `expressions_per_image` different expressions, in random order.

        Every ref of the image is queried once before any ref is queried with a second sentence, and no text occurs
        twice, unless `expression_sampling=released`. Masks are decoded here and not cached. Raises: DataError.
        """
        image_id = self._image_ids[index]
        image = self._annotations.images[image_id]
        masks: dict[tuple[int, ...], BoolMask] = {}
        turns = []
        for ref, text in self._sample_expressions(self._annotations.refs_by_image[image_id], rng):
            if ref.ann_ids not in masks:
                masks[ref.ann_ids] = _target_mask(ref, self._annotations)
            turn = referring_turn(
                text, masks[ref.ann_ids], rng, style=self._question_style, has_target=bool(ref.ann_ids)
            )
            turns.append(turn)
        return Sample(
            sample_id=f"{self.name}/{self._annotations.split}/image={image_id}",
            source=self.name,
            image_path=image.path,
            image_hw=image.size_hw,
            turns=tuple(turns),
        )

    def _sample_expressions(self, refs: tuple[Ref, ...], rng: np.random.Generator) -> list[tuple[Ref, str]]:
        """Return the (ref, text) pairs of one sample."""
        if self._samples_as_released:
            return self._sample_as_released(refs, rng)
        queues = []
        for ref in refs:
            texts = [text for sentence in ref.sentences if (text := self._text(sentence))]
            queues.append((ref, [texts[i] for i in rng.permutation(len(texts))]))
        sampled: dict[str, Ref] = {}
        while any(texts for _, texts in queues):
            for i in rng.permutation(len(queues)):
                ref, texts = queues[i]
                while texts and texts[-1] in sampled:
                    texts.pop()
                if texts:
                    sampled[texts.pop()] = ref
                if len(sampled) == self._expressions_per_image:
                    return [(ref, text) for text, ref in sampled.items()]
        return [(ref, text) for text, ref in sampled.items()]

    def _sample_as_released(self, refs: tuple[Ref, ...], rng: np.random.Generator) -> list[tuple[Ref, str]]:
        """Return exactly `expressions_per_image` pairs: objects sampled with replacement, with one sentence each.

        The release samples the sentences once per run and repeat; in a run of one epoch that is the same.
        """
        objects: dict[object, tuple[Ref, list[str]]] = {}
        for ref in refs:
            if texts := [text for sentence in ref.sentences if (text := self._text(sentence))]:
                # gRefCOCO identifies objects by ref, the other datasets by annotation.
                key = ref.ref_id if self._annotations.refs_file.name.startswith("grefs(") else ref.ann_ids
                objects[key] = (ref, texts)
        asked = [(ref, texts[rng.integers(len(texts))]) for ref, texts in objects.values()]
        return [asked[i] for i in rng.integers(len(asked), size=self._expressions_per_image)]

    def _text(self, sentence: Sentence) -> str:
        """Return the sentence in lower case, without one final period; "" if nothing is left."""
        text: str = getattr(sentence, self._text_field)
        return text.lower().strip().removesuffix(".").strip()

    def _usable_image_ids(self) -> tuple[int, ...]:
        usable = []
        num_empty = 0
        for image_id, refs in self._annotations.refs_by_image.items():
            texts = [self._text(sentence) for ref in refs for sentence in ref.sentences]
            num_empty += texts.count("")
            if any(texts):
                usable.append(image_id)
        if num_empty:
            logger.warning("source %s: skipped %d sentences without text", self.name, num_empty)
        return tuple(usable)


def _target_rle(ref: Ref, annotations: ReferAnnotations) -> RLE | None:
    if not ref.ann_ids:
        return None
    segmentations = [annotations.segmentations[ann_id] for ann_id in ref.ann_ids]
    where = f"{annotations.refs_file}: ref_id {ref.ref_id}, ann_id {list(ref.ann_ids)}"
    size_hw = annotations.images[ref.image_id].size_hw
    return merge_to_rle(segmentations, size_hw, where, annotations.segmentations.shows_pixels)


def _released_target(ref: Ref, annotations: ReferAnnotations) -> RLE | None:
    """Return the target of the released evaluation if it differs: gRefCOCO's excludes crowds."""
    if not ref.ann_ids:
        return None
    where = f"{annotations.refs_file}: ref_id {ref.ref_id}, ann_id {list(ref.ann_ids)}"
    size_hw = annotations.images[ref.image_id].size_hw
    is_gref = annotations.refs_file.name.startswith("grefs(")
    stored = annotations.segmentations
    kept = [ann_id for ann_id in ref.ann_ids if not (is_gref and stored.is_crowd(ann_id))]
    segmentations = [stored[ann_id] for ann_id in kept]
    summed = summed_as_released(segmentations, size_hw, where, stored.shows_pixels)
    if summed is not None or len(kept) == len(ref.ann_ids):
        return summed
    if not kept:
        return encode_mask(np.zeros(size_hw, dtype=np.bool_))
    return merge_to_rle(segmentations, size_hw, where, stored.shows_pixels)


def _target_mask(ref: Ref, annotations: ReferAnnotations) -> BoolMask:
    size_hw = annotations.images[ref.image_id].size_hw
    where = f"{annotations.refs_file}: ref_id {ref.ref_id}"
    segmentations = annotations.segmentations
    masks = [
        decode_segmentation(segmentations[ann_id], size_hw, f"{where}, ann_id {ann_id}", segmentations.shows_pixels)
        for ann_id in ref.ann_ids
    ]
    return union_masks(masks, size_hw)


def _check_text_field(text_field: str) -> None:
    if text_field not in TEXT_FIELDS:
        raise DataError(f"text_field: found {text_field!r}, expected one of {TEXT_FIELDS}; correct the config")

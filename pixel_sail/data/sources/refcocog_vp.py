"""Referring expressions reversed: the question marks an object, the answer is its expression.

Builds a `Sample` with visual prompts from `data/refer_annotations.py` through `data/regions.py`. Reads the same files
as `refer.py`: RefCOCOg for the released fine-tuning on region captions, also RefCOCO, RefCOCO+ or RefShapes.

Example: the ref with the sentence "The tie of the standing man." becomes

    Turn(question="Describe <Prompt4> in a few words.", answer="<Prompt4>: the tie of the standing man")

Differences from the released loader:
- It sampled one sentence per object at construction and never used the others. Here each sample resamples it.
- It kept only the last of several refs of one object. Here their sentences form one list.
- Its file could not be imported.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.masks import decode_segmentation, union_masks
from pixel_sail.data.prompts import MASK_ONLY
from pixel_sail.data.refer_annotations import Ref, ReferAnnotations, load_refer
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.templates.region import REGION_ANSWER, released_short_question, short_question
from pixel_sail.types import BoolMask, DataError, Sample, Source

logger = logging.getLogger(__name__)

Objects = dict[tuple[int, ...], tuple[str, ...]]
"""Sentences by annotation ids, of one image."""


def load(
    *,
    root: str | Path,
    dataset: str = "refcocog",
    split: str = "train",
    split_by: str | None = None,
    image_dir: str | Path | None = None,
    name: str = "refcocog_vp",
    regions_per_sample: int = 5,
    prompt_fractions: Mapping[str, float] = MASK_ONLY,
    num_prompts: int = 15,
    absent_fraction: float = 0.05,
    templates: str = OURS,
) -> Source:
    """Return one split as a training source.

    root, dataset, split, split_by, image_dir: as in `refer.load`. regions_per_sample: maximum regions per sample.
    prompt_fractions, num_prompts, absent_fraction: see `RegionSettings`. templates: `ours` samples one of several short
    questions; `released` uses one question. Raises: DataError, ValueError.
    """
    question = released_short_question if is_released(name, "templates", templates) else short_question
    settings = RegionSettings(
        num_prompts=num_prompts, fractions=dict(prompt_fractions), absent_fraction=absent_fraction
    )
    settings.check_count(name, regions_per_sample)
    annotations = load_refer(root, dataset, split, split_by=split_by, image_dir=image_dir)
    return ReferRegionSource(annotations, settings, name=name, regions_per_sample=regions_per_sample, question=question)


class ReferRegionSource:
    """One item per image with a referred object."""

    def __init__(
        self,
        annotations: ReferAnnotations,
        settings: RegionSettings,
        *,
        name: str,
        regions_per_sample: int = 5,
        question: Callable[[np.random.Generator], str] = short_question,
    ) -> None:
        """Collect the sentences of every object; those without text are skipped and counted."""
        self.name = name
        self._annotations = annotations
        self._settings = settings
        self._regions_per_sample = regions_per_sample
        self._question = question
        objects = {image_id: _objects(refs) for image_id, refs in annotations.refs_by_image.items()}
        self._objects = {image_id: found for image_id, found in objects.items() if found}
        self._image_ids = tuple(self._objects)
        num_sentences = sum(len(ref.sentences) for refs in annotations.refs_by_image.values() for ref in refs)
        num_used = sum(len(texts) for found in self._objects.values() for texts in found.values())
        if num_used < num_sentences:
            logger.warning(
                "source %s: skipped %d of %d sentences, they have no text, repeat another one of the object or refer "
                "to nothing",
                *(name, num_sentences - num_used, num_sentences),
            )

    def __len__(self) -> int:
        """Return the number of images with an object."""
        return len(self._image_ids)

    def image_path(self, index: int) -> Path:
        """Return the image of an item."""
        return self._annotations.images[self._image_ids[index]].path

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with 1 .. `regions_per_sample` objects and a sentence of each, sampled from `rng`.

        Raises: DataError.
        """
        image_id = self._image_ids[index]
        image = self._annotations.images[image_id]
        objects = list(self._objects[image_id].items())
        count = int(rng.integers(1, self._regions_per_sample + 1))
        sampled = [objects[i] for i in rng.permutation(len(objects))[:count]]
        turns = [
            RegionTurn(
                question=self._question(rng), answer=REGION_ANSWER + texts[rng.integers(len(texts))], region=number
            )
            for number, (_, texts) in enumerate(sampled)
        ]
        return region_sample(
            turns,
            [self._mask(ann_ids, image_id) for ann_ids, _ in sampled],
            rng,
            self._settings,
            sample_id=f"{self.name}/{self._annotations.split}/image={image_id}",
            source=self.name,
            image_path=image.path,
            image_hw=image.size_hw,
            absent_question=self._question,
        )

    def _mask(self, ann_ids: tuple[int, ...], image_id: int) -> BoolMask:
        size_hw = self._annotations.images[image_id].size_hw
        where = f"{self._annotations.refs_file}: image_id {image_id}, ann_id {list(ann_ids)}"
        stored = self._annotations.segmentations
        parts = [decode_segmentation(stored[ann_id], size_hw, where, stored.shows_pixels) for ann_id in ann_ids]
        mask = union_masks(parts, size_hw)
        if not mask.any():
            raise DataError(f"{where}: found a segmentation without pixels, expected at least one; repair the file")
        return mask


def _objects(refs: tuple[Ref, ...]) -> Objects:
    """Return the distinct sentences of every object in file order."""
    found: dict[tuple[int, ...], dict[str, None]] = {}
    for ref in refs:
        for sentence in ref.sentences:
            text = sentence.raw.lower().strip().removesuffix(".").strip()
            if ref.ann_ids and text:
                found.setdefault(tuple(sorted(ref.ann_ids)), {})[text] = None
    return {ann_ids: tuple(texts) for ann_ids, texts in found.items()}

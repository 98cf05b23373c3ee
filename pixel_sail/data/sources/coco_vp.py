"""COCO panoptic segments as marked regions whose class is chosen among candidates.

Builds a `Sample` with visual prompts and one turn per region from `data/panoptic.py`, `data/regions.py` and
`data/templates/region_class.py`.

Example:

    Turn(question="Name the class of <Prompt4>. The candidate categories: rug, dog, truck, others.",
         answer="<Prompt4>: dog")

Sometimes the correct name is missing and the answer is `<Prompt4>: others.`

Differences from the released loader:
- It added the correct name to ten sampled ones, so a list of ten instead of eleven revealed "others". Here every list
  has `num_candidates` names, with or without the correct one, unless `candidates=released`.
- A sample that used all prompt tokens failed, as none was left for the question about an absent region. Here that
  question is then omitted.
- For its caches and random replacements see `coco_panoptic.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.panoptic import PanopticFile, PanopticImage, Segment, open_panoptic
from pixel_sail.data.panoptic_source import PanopticSource, check_at_least
from pixel_sail.data.prompts import MASK_ONLY
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.sources.coco_panoptic import CocoClasses
from pixel_sail.data.templates.region_class import OTHERS, class_answer, class_question
from pixel_sail.types import DataError, Sample, Source


def load(
    *,
    root: str | Path,
    split: str = "train2017",
    annotations: str | Path | None = None,
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    name: str = "coco_vp",
    regions_per_sample: int = 5,
    num_candidates: int = 10,
    others_fraction: float = 0.05,
    class_file: str | Path | None = None,
    prompt_fractions: Mapping[str, float] = MASK_ONLY,
    num_prompts: int = 15,
    absent_fraction: float = 0.05,
    class_names: str = OURS,
    candidates: str = OURS,
) -> Source:
    """Return one split as a training source; all numbers are the released ones.

    root, split, annotations, png_dir, image_dir, class_file, class_names: as in `coco_panoptic.load`.
    regions_per_sample: maximum turns per sample. num_candidates: names listed in a question besides "others".
    others_fraction: fraction of questions without the correct name. candidates: `ours` lists exactly num_candidates
    names; `released` lists that many sampled names plus the correct one, or minus it if the answer is "others".
    prompt_fractions, num_prompts, absent_fraction: see `RegionSettings`. Raises: DataError, ValueError.
    """
    file = open_panoptic(root, split, annotations=annotations, png_dir=png_dir, image_dir=image_dir)
    return CocoRegionSource(
        file,
        CocoClasses(file, class_file, released_names=is_released(name, "class_names", class_names)),
        RegionSettings(num_prompts=num_prompts, fractions=dict(prompt_fractions), absent_fraction=absent_fraction),
        name=name,
        split=split,
        regions_per_sample=regions_per_sample,
        num_candidates=num_candidates,
        others_fraction=others_fraction,
        adds_right_name=is_released(name, "candidates", candidates),
    )


class CocoRegionSource(PanopticSource):
    """One item per image with a segment that is not a crowd."""

    def __init__(
        self,
        file: PanopticFile,
        classes: CocoClasses,
        settings: RegionSettings,
        *,
        name: str,
        split: str,
        regions_per_sample: int = 5,
        num_candidates: int = 10,
        others_fraction: float = 0.05,
        adds_right_name: bool = False,
    ) -> None:
        """Check the settings and the file. Raises: DataError."""
        check_at_least(name, 1, num_candidates=num_candidates)
        settings.check_count(name, regions_per_sample)
        if not 0.0 <= others_fraction <= 1.0:
            raise DataError(
                f"source {name}: found others_fraction {others_fraction}, expected 0 .. 1; correct the config"
            )
        self._classes = classes
        self._settings = settings
        self._regions_per_sample = regions_per_sample
        self._num_candidates = num_candidates
        self._others_fraction = others_fraction
        self._adds_right_name = adds_right_name
        super().__init__(
            file,
            name=name,
            split=split,
            has_content=lambda segments: any(not segment.is_crowd for segment in segments),
            content="a segment that is not a crowd",
        )

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with up to `regions_per_sample` regions sampled from `rng`. Raises: DataError."""
        image = self._image(index)
        masks = self._file.masks(image)
        sampled = self._sample_segments(image, rng)
        turns = [self._turn(number, segment.category_id, rng) for number, segment in enumerate(sampled)]
        return region_sample(
            turns,
            [masks[segment.segment_id] for segment in sampled],
            rng,
            self._settings,
            sample_id=self._sample_id(image),
            source=self.name,
            image_path=image.image_path,
            image_hw=image.image_hw,
            absent_question=class_question,
        )

    def _sample_segments(self, image: PanopticImage, rng: np.random.Generator) -> list[Segment]:
        """Return the segments of one sample, all of known categories."""
        regions = [segment for group in self._classes.of(image).values() for segment in group if not segment.is_crowd]
        return [regions[i] for i in rng.permutation(len(regions))[: self._regions_per_sample]]

    def _turn(self, region: int, category_id: int, rng: np.random.Generator) -> RegionTurn:
        """Return the question about one region with its candidates."""
        has_right_one = rng.random() >= self._others_fraction
        wrong = [name for other, name in self._classes.names.items() if other != category_id]
        num_wrong = self._num_wrong(has_right_one, rng)
        candidates = [wrong[i] for i in rng.permutation(len(wrong))[:num_wrong]]
        if has_right_one:
            candidates.insert(int(rng.integers(len(candidates) + 1)), self._classes.names[category_id])
        answer = class_answer(self._classes.names[category_id] if has_right_one else f"{OTHERS}.")
        return RegionTurn(question=class_question(rng, [*candidates, OTHERS]), answer=answer, region=region)

    def _num_wrong(self, has_right_one: bool, rng: np.random.Generator) -> int:
        """Return how many wrong names are listed."""
        if self._adds_right_name:
            # Sampled from all names. The correct name may be among them and then counts as one of them.
            num_names = len(self._classes.names)
            is_sampled = rng.random() * num_names < self._num_candidates
            return self._num_candidates - 1 if is_sampled else self._num_candidates
        return self._num_candidates - 1 if has_right_one else self._num_candidates

"""Pix2Cap-COCO as region description: the question marks a segment, the answer is its description.

Builds a `Sample` with visual prompts and one turn per region from `data/panoptic.py`, `data/regions.py` and
`data/templates/region_class.py`. The file is described in `pix2cap_seg.py`.

Example:

    Turn(question="Describe <Prompt9> in detail.", answer="<Prompt9>: A blue bowl of rice behind the plate of fruit.")
    with VisualPrompt(prompt_id=9, mask=<the bowl, its box, a point or a scribble on it>)

Differences from the released loader: a sample that used all prompt tokens failed when it needed one for an absent
region; here that question is omitted. For its caches and random replacements see `coco_panoptic.py`. Points and boxes
come from the same source through `prompt_fractions` instead of from a second class.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixel_sail.data.panoptic import PanopticFile, open_panoptic
from pixel_sail.data.panoptic_source import PanopticSource, check_at_least
from pixel_sail.data.prompts import MASK_ONLY
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.sources.pix2cap_seg import described
from pixel_sail.data.templates.region_class import describe_answer, detail_question
from pixel_sail.types import Sample, Source


def load(
    *,
    file: str | Path,
    root: str | Path,
    split: str = "train2017",
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    name: str = "pix2cap_vp",
    regions_per_sample: int = 5,
    min_description_chars: int = 6,
    prompt_fractions: Mapping[str, float] = MASK_ONLY,
    num_prompts: int = 15,
    absent_fraction: float = 0.05,
) -> Source:
    """Return Pix2Cap's file as a training source; all defaults are the released values.

    file, root, split, png_dir, image_dir, min_description_chars: as in `pix2cap_seg.load`. regions_per_sample: maximum
    regions per sample; the number is uniform from 1. prompt_fractions, num_prompts, absent_fraction: see
    `RegionSettings`. Raises: DataError, ValueError.
    """
    opened = open_panoptic(root, split, annotations=file, png_dir=png_dir, image_dir=image_dir, lists_all=False)
    return Pix2CapRegionSource(
        opened,
        RegionSettings(num_prompts=num_prompts, fractions=dict(prompt_fractions), absent_fraction=absent_fraction),
        name=name,
        split=split,
        regions_per_sample=regions_per_sample,
        min_description_chars=min_description_chars,
    )


class Pix2CapRegionSource(PanopticSource):
    """One item per image with a description."""

    def __init__(
        self,
        file: PanopticFile,
        settings: RegionSettings,
        *,
        name: str,
        split: str,
        regions_per_sample: int = 5,
        min_description_chars: int = 6,
    ) -> None:
        """Check the settings and the file. Raises: ValueError, DataError."""
        check_at_least(name, 1, min_description_chars=min_description_chars)
        settings.check_count(name, regions_per_sample)
        self._settings = settings
        self._regions_per_sample = regions_per_sample
        self._min_chars = min_description_chars
        super().__init__(
            file,
            name=name,
            split=split,
            has_content=lambda segments: bool(described(segments, min_description_chars)),
            content="a description",
        )

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with 1 .. `regions_per_sample` regions, number and choice sampled from `rng`.

        Raises: DataError.
        """
        image = self._image(index)
        masks = self._file.masks(image)
        segments = described(image.segments, self._min_chars)
        count = int(rng.integers(1, self._regions_per_sample + 1))
        sampled = [segments[i] for i in rng.permutation(len(segments))[:count]]
        turns = [
            RegionTurn(question=detail_question(rng), answer=describe_answer(segment.description), region=number)
            for number, segment in enumerate(sampled)
        ]
        return region_sample(
            turns,
            [masks[segment.segment_id] for segment in sampled],
            rng,
            self._settings,
            sample_id=self._sample_id(image),
            source=self.name,
            image_path=image.image_path,
            image_hw=image.image_hw,
            absent_question=detail_question,
        )

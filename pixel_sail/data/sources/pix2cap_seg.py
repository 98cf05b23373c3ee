"""Pix2Cap-COCO as segmentation: the question is a description of a segment, the answer its mask.

Builds a `Sample` with one turn per description from `data/panoptic.py` and `data/templates/segmentation.py`.
`pix2cap_vp.py` is the reverse task.

Pix2Cap's file is a COCO panoptic JSON whose segments carry a text; the PNGs and images are COCO's own. An example:

    {"id": 8345037, "category_id": 51, "description": "A blue bowl of rice behind the plate of fruit.", ...}

Differences from the released loader: it cached decoded masks forever and replaced images without a description by
random ones, see `coco_panoptic.py`. Two segments with the same description gave two contradictory turns; here they give
one turn with both.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixel_sail.data.masks import union_masks
from pixel_sail.data.panoptic import PanopticFile, Segment, open_panoptic
from pixel_sail.data.panoptic_source import PanopticSource, check_at_least
from pixel_sail.data.templates.segmentation import description_turn
from pixel_sail.types import Sample, Source


def load(
    *,
    file: str | Path,
    root: str | Path,
    split: str = "train2017",
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    name: str = "pix2cap_seg",
    descriptions_per_sample: int = 5,
    min_description_chars: int = 6,
) -> Source:
    """Return Pix2Cap's file as a training source.

    file: pix2cap_coco_train.json. root, split, png_dir, image_dir: locations of COCO's PNGs and images, see
    `open_panoptic`. descriptions_per_sample: maximum turns per sample. min_description_chars: shorter descriptions are
    skipped. Both defaults are the released values. Raises: DataError, ValueError.
    """
    # Pix2Cap does not describe every segment of COCO's PNGs.
    opened = open_panoptic(root, split, annotations=file, png_dir=png_dir, image_dir=image_dir, lists_all=False)
    return Pix2CapSegSource(
        opened,
        name=name,
        split=split,
        descriptions_per_sample=descriptions_per_sample,
        min_description_chars=min_description_chars,
    )


def described(segments: Sequence[Segment], min_chars: int) -> list[Segment]:
    """Return the segments whose description has at least `min_chars` characters."""
    return [segment for segment in segments if len(segment.description) >= min_chars]


class Pix2CapSegSource(PanopticSource):
    """One item per image with a description."""

    def __init__(
        self,
        file: PanopticFile,
        *,
        name: str,
        split: str,
        descriptions_per_sample: int = 5,
        min_description_chars: int = 6,
    ) -> None:
        """Check the settings and the file. Raises: ValueError, DataError."""
        check_at_least(
            name, 1, descriptions_per_sample=descriptions_per_sample, min_description_chars=min_description_chars
        )
        self._descriptions_per_sample = descriptions_per_sample
        self._min_chars = min_description_chars
        super().__init__(
            file,
            name=name,
            split=split,
            has_content=lambda segments: bool(described(segments, min_description_chars)),
            content="a description",
        )

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with up to `descriptions_per_sample` texts sampled from `rng`. Raises: DataError."""
        image = self._image(index)
        masks = self._file.masks(image)
        groups: dict[str, list[Segment]] = {}
        for segment in described(image.segments, self._min_chars):
            groups.setdefault(segment.description, []).append(segment)
        texts = list(groups)
        turns = []
        for i in rng.permutation(len(texts))[: self._descriptions_per_sample]:
            union = union_masks([masks[segment.segment_id] for segment in groups[texts[i]]], image.image_hw)
            turns.append(description_turn(texts[i], union, rng))
        return self._sample(image, turns)

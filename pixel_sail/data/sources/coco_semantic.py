"""COCO panoptic annotations as semantic segmentation: one mask for "all the dogs", for things and stuff.

Builds a `Sample` with one turn per class from `data/panoptic.py` and `data/templates/segmentation.py`. Files and class
names are those of `coco_panoptic.py`.

Example: two dogs and a crowd of dogs give Turn(question="Cover all the dog at once. Segmentation in the semantic
mode.", answer="Sure, [SEG].", masks=(<the pixels of all three segments>,)).

Differences from the released loader: it excluded crowds from "all the person", here they are included unless
`crowds=released`. It cached masks forever and replaced images without segments by random ones, see `coco_panoptic.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.masks import union_masks
from pixel_sail.data.panoptic import PanopticFile, Segment, open_panoptic
from pixel_sail.data.panoptic_source import PanopticSource, check_at_least
from pixel_sail.data.sources.coco_panoptic import CocoClasses
from pixel_sail.data.templates.segmentation import semantic_turn
from pixel_sail.rle import encode_mask
from pixel_sail.types import Expression, Sample, Source


def load(
    *,
    root: str | Path,
    split: str = "train2017",
    annotations: str | Path | None = None,
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    name: str = "coco_semantic",
    classes_per_sample: int = 5,
    class_file: str | Path | None = None,
    class_names: str = OURS,
    crowds: str = OURS,
) -> Source:
    """Return one split as a training source; the arguments are those of `coco_panoptic.load`.

    crowds: `ours` makes them part of their class; `released` makes them background. Raises: DataError, ValueError.
    """
    file = open_panoptic(root, split, annotations=annotations, png_dir=png_dir, image_dir=image_dir)
    return CocoSemanticSource(
        file,
        CocoClasses(file, class_file, released_names=is_released(name, "class_names", class_names)),
        name=name,
        split=split,
        classes_per_sample=classes_per_sample,
        crowds_as_background=is_released(name, "crowds", crowds),
    )


def expressions(
    *,
    root: str | Path,
    split: str = "val2017",
    annotations: str | Path | None = None,
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    class_file: str | Path | None = None,
) -> list[Expression]:
    """Return one expression per class and image: the class name, with all its segments as target.

    For evaluation; the files are those of `load`. ref_id counts the expressions of the file from 1. Raises: DataError.
    """
    file = open_panoptic(root, split, annotations=annotations, png_dir=png_dir, image_dir=image_dir)
    classes = CocoClasses(file, class_file)
    found: list[Expression] = []
    for number in file.usable(bool, source=f"coco_semantic/{split}", content="a segment"):
        image = file.image(int(number))
        masks = file.masks(image)
        for category_id, group in classes.of(image).items():
            union = union_masks([masks[segment.segment_id] for segment in group], image.image_hw)
            found.append(
                Expression(
                    ref_id=len(found) + 1,
                    sent_id=0,
                    image_id=image.image_id,
                    image_path=image.image_path,
                    image_hw=image.image_hw,
                    text=classes.names[category_id],
                    target=encode_mask(union),
                )
            )
    return found


class CocoSemanticSource(PanopticSource):
    """One item per image with a segment."""

    def __init__(
        self,
        file: PanopticFile,
        classes: CocoClasses,
        *,
        name: str,
        split: str,
        classes_per_sample: int = 5,
        crowds_as_background: bool = False,
    ) -> None:
        """Check the settings and the file. Raises: ValueError, DataError."""
        check_at_least(name, 1, classes_per_sample=classes_per_sample)
        self._classes = classes
        self._classes_per_sample = classes_per_sample
        self._crowds_as_background = crowds_as_background
        content = "a segment that is not a crowd" if crowds_as_background else "a segment"
        super().__init__(
            file, name=name, split=split, has_content=lambda segments: bool(self._used(segments)), content=content
        )

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with up to `classes_per_sample` classes sampled from `rng`. Raises: DataError."""
        image = self._image(index)
        masks = self._file.masks(image)
        used = {category_id: self._used(group) for category_id, group in self._classes.of(image).items()}
        groups = [(category_id, group) for category_id, group in used.items() if group]
        turns = []
        for i in rng.permutation(len(groups))[: self._classes_per_sample]:
            category_id, group = groups[i]
            union = union_masks([masks[segment.segment_id] for segment in group], image.image_hw)
            turns.append(semantic_turn(self._classes.names[category_id], union, rng))
        return self._sample(image, turns)

    def _used(self, segments: Sequence[Segment]) -> list[Segment]:
        """Return the segments that belong to a class."""
        return [segment for segment in segments if not (self._crowds_as_background and segment.is_crowd)]

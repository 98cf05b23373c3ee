"""COCO panoptic segmentation, instance by instance: every thing of a class gets a mask of its own, as "dog-1", "dog-2".

`data/panoptic.py` -> here -> `Sample` with one turn per class, templates from `data/templates/segmentation.py`.
`coco_semantic.py` asks the same files for one mask per class.

Example: an image with two dogs and grass gives Turn(question="Mark each dog separately. Segmentation in the instance
mode.", answer="dog-1 [SEG] dog-2 [SEG].", masks=(left, right)) and Turn(..., answer="grass [SEG].", masks=(grass,)).

What the released loader got wrong, and what happens here:
- crowd segments were dropped, so that people in a crowd counted as background of "person": they are `Turn.ignored`,
  unless `crowds=released`;
- several segments of one stuff class met an answer with a single [SEG]: their union is the mask;
- a class with any number of instances was spelled out: above `instances_per_class` it is asked for as one mask;
- class names with hyphens ran into the numbers ("wall-other-merged"): names are spoken, and told apart or refused;
- decoded masks were kept for ever, and an image with nothing to ask for was replaced by a random other one: masks live
  as long as their sample, and such images are left out when the file is opened, counted in the log.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.masks import union_masks
from pixel_sail.data.panoptic import (
    Category,
    PanopticFile,
    PanopticImage,
    Segment,
    load_categories,
    load_class_file,
    open_panoptic,
    segments_by_category,
)
from pixel_sail.data.panoptic_source import PanopticSource, check_at_least
from pixel_sail.data.templates.segmentation import (
    RELEASED_NAMES,
    instance_turn,
    semantic_turn,
    spoken_names,
    stuff_turn,
)
from pixel_sail.types import BoolMask, Sample, SizeHW, Source, Turn


def load(
    *,
    root: str | Path,
    split: str = "train2017",
    annotations: str | Path | None = None,
    png_dir: str | Path | None = None,
    image_dir: str | Path | None = None,
    name: str = "coco_panoptic",
    classes_per_sample: int = 5,
    instances_per_class: int = 20,
    class_file: str | Path | None = None,
    class_names: str = OURS,
    crowds: str = OURS,
    many_instances: str = OURS,
) -> Source:
    """Return one split as a training source.

    root, split, annotations, png_dir, image_dir: where the files are, see `open_panoptic`. classes_per_sample: most
    turns of one sample (release: 5). instances_per_class: a class with more things than this is asked for as one mask,
    0 for no limit. class_file: class names from lines `id:name,synonym,...` instead of those of the JSON file.
    class_names, ours: those of the JSON file, spoken; released: with the eight others of RELEASED_NAMES. crowds, ours:
    in no loss of their class; released: background. many_instances, released: no limit whatever instances_per_class is.
    Raises: DataError, ValueError.
    """
    file = open_panoptic(root, split, annotations=annotations, png_dir=png_dir, image_dir=image_dir)
    classes = CocoClasses(file, class_file, released_names=is_released(name, "class_names", class_names))
    return CocoPanopticSource(
        file,
        classes,
        name=name,
        split=split,
        classes_per_sample=classes_per_sample,
        instances_per_class=0 if is_released(name, "many_instances", many_instances) else instances_per_class,
        crowds_as_background=is_released(name, "crowds", crowds),
    )


class CocoClasses:
    """The categories of a panoptic file with the names they are called by."""

    def __init__(
        self, file: PanopticFile, class_file: str | Path | None = None, *, released_names: bool = False
    ) -> None:
        """Read names from the panoptic file, eight of them as released, or from `class_file`. Raises: DataError."""
        self.categories: dict[int, Category] = load_categories(file.file)
        if class_file is None:
            others = RELEASED_NAMES if released_names else {}
            names = {number: others.get(category.name, category.name) for number, category in self.categories.items()}
        else:
            names = load_class_file(class_file, sorted(self.categories))
        self.names = spoken_names(names, str(file.file if class_file is None else class_file))

    def of(self, image: PanopticImage) -> dict[int, list[Segment]]:
        """Return the segments of an image by category, ids ascending. Raises: DataError for unknown categories."""
        return segments_by_category(image, sorted(self.categories))


class CocoPanopticSource(PanopticSource):
    """One item per image with a thing that is not a crowd, or with stuff."""

    def __init__(
        self,
        file: PanopticFile,
        classes: CocoClasses,
        *,
        name: str,
        split: str,
        classes_per_sample: int = 5,
        instances_per_class: int = 20,
        crowds_as_background: bool = False,
    ) -> None:
        """Check the settings and the file. Raises: ValueError, DataError."""
        check_at_least(name, 1, classes_per_sample=classes_per_sample)
        check_at_least(name, 0, instances_per_class=instances_per_class)
        self._classes = classes
        self._classes_per_sample = classes_per_sample
        self._instances_per_class = instances_per_class
        self._crowds_as_background = crowds_as_background
        super().__init__(
            file, name=name, split=split, has_content=self._can_ask, content="a segment that is not a crowd"
        )

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return image `index` with up to `classes_per_sample` classes sampled from `rng`. Raises: DataError."""
        image = self._image(index)
        masks = self._file.masks(image)
        groups = [group for group in self._classes.of(image).values() if self._can_ask(group)]
        sampled = [groups[i] for i in rng.permutation(len(groups))[: self._classes_per_sample]]
        return self._sample(image, [self._turn(group, masks, image.image_hw, rng) for group in sampled])

    def _can_ask(self, segments: Sequence[Segment]) -> bool:
        """Say whether there is more than crowds; a crowd of a stuff class is stuff like any other."""
        return any(
            not segment.is_crowd or not (self._crowds_as_background or self._is_thing(segment.category_id))
            for segment in segments
        )

    def _is_thing(self, category_id: int) -> bool:
        """Return what the file says; a category it does not list is reported by `get`."""
        return category_id not in self._classes.categories or self._classes.categories[category_id].is_thing

    def _turn(
        self, group: Sequence[Segment], masks: dict[int, BoolMask], size_hw: SizeHW, rng: np.random.Generator
    ) -> Turn:
        """Return the turn about one class."""
        if self._crowds_as_background:
            group = [segment for segment in group if not segment.is_crowd]
        category_id = group[0].category_id
        name = self._classes.names[category_id]
        everything = union_masks([masks[segment.segment_id] for segment in group], size_hw)
        if not self._classes.categories[category_id].is_thing:
            return stuff_turn(name, everything, rng)
        instances = [masks[segment.segment_id] for segment in group if not segment.is_crowd]
        if self._instances_per_class and len(instances) > self._instances_per_class:
            return semantic_turn(name, everything, rng)
        crowds = [masks[segment.segment_id] for segment in group if segment.is_crowd]
        ignored = union_masks(crowds, size_hw) if crowds else None
        return instance_turn(name, sorted(instances, key=_corner), rng, ignored=ignored)


def _corner(mask: BoolMask) -> tuple[int, int]:
    """Return (leftmost column, topmost row), which orders instances from left to right."""
    return int(mask.any(axis=0).argmax()), int(mask.any(axis=1).argmax())

"""COCO panoptic segmentation with one mask per instance of a class, as "dog-1", "dog-2".

Builds a `Sample` with one turn per class from `data/panoptic.py` and `data/templates/segmentation.py`.
`coco_semantic.py` builds questions for one mask per class from the same files.

Example: an image with two dogs and grass gives Turn(question="Mark each dog separately. Segmentation in the instance
mode.", answer="dog-1 [SEG] dog-2 [SEG].", masks=(left, right)) and Turn(..., answer="grass [SEG].", masks=(grass,)).

Differences from the released loader:
- It dropped crowd segments, so people in a crowd were background of "person". Here they are `Turn.ignored`, unless
  `crowds=released`.
- It answered several segments of one stuff class with a single [SEG]. Here their union is the mask.
- It listed every instance, however many. Here a class above `instances_per_class` is queried as one mask.
- Hyphens in class names collided with the numbers ("wall-other-merged"). Here names are spoken, and rejected if two
  are equal.
- It cached decoded masks forever, and replaced an image without a usable class by a random one. Here masks are not
  cached, and such images are skipped and counted in the log.
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

    root, split, annotations, png_dir, image_dir: file locations, see `open_panoptic`. classes_per_sample: maximum turns
    per sample (release: 5). instances_per_class: a class with more things than this is queried as one mask, 0 for no
    limit. class_file: class names from lines `id:name,synonym,...` instead of the JSON file. class_names: `ours` uses
    the JSON file's names in spoken form; `released` uses the eight others of RELEASED_NAMES. crowds: `ours` excludes
    them from the loss of their class; `released` makes them background. many_instances: `released` ignores
    instances_per_class. Raises: DataError, ValueError.
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
    """The categories of a panoptic file and their names in questions."""

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
        """Return the segments of an image by category, by ascending id. Raises: DataError for unknown categories."""
        return segments_by_category(image, sorted(self.categories))


class CocoPanopticSource(PanopticSource):
    """One item per image with stuff or with a thing that is not a crowd."""

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
        """Return whether there are more than crowds; a crowd of a stuff class is ordinary stuff."""
        return any(
            not segment.is_crowd or not (self._crowds_as_background or self._is_thing(segment.category_id))
            for segment in segments
        )

    def _is_thing(self, category_id: int) -> bool:
        """Return the file's value; an unlisted category is reported by `get`."""
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

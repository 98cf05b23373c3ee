"""Makes the text or the images of annotations meaningless, to measure what a benchmark gives away without them.

`refer.load` and `refer_seg.load` pass annotations through `make_blind` if configured. Train and evaluate with
`blind_baseline=language` for a model without language input, with `blind_baseline=image` for one without images:

    language:  "the red star left of the ring"  ->  "object 17"            (a number without meaning)
    image:     COCO_..12.jpg                    ->  COCO_..13.jpg          (another image of the same size)
"""

import logging
from collections import defaultdict
from dataclasses import replace

from pixel_sail.data.refer_annotations import ReferAnnotations, ReferImage
from pixel_sail.types import DataError, SizeHW

logger = logging.getLogger(__name__)

BLIND_BASELINES = ("none", "language", "image")

NUM_MEANINGLESS_TEXTS = 97
"""Texts stay distinct within an image, so that the number of questions does not change."""


def make_blind(annotations: ReferAnnotations, what: str) -> ReferAnnotations:
    """Return the annotations without their text or without their images. Raises: DataError for another `what`."""
    if what == "none":
        return annotations
    if what == "language":
        return _make_text_meaningless(annotations)
    if what == "image":
        return replace(annotations, images=_swap_images(annotations.images))
    raise DataError(f"blind_baseline: found {what!r}, expected one of {BLIND_BASELINES}; correct the config")


def _make_text_meaningless(annotations: ReferAnnotations) -> ReferAnnotations:
    """Replace every sentence."""
    refs_by_image = {}
    for image_id, refs in annotations.refs_by_image.items():
        changed = []
        for ref in refs:
            sentences = []
            for sentence in ref.sentences:
                text = f"object {sentence.sent_id % NUM_MEANINGLESS_TEXTS}"
                sentences.append(replace(sentence, sent=text, raw=text))
            changed.append(replace(ref, sentences=tuple(sentences)))
        refs_by_image[image_id] = tuple(changed)
    return replace(annotations, refs_by_image=refs_by_image)


def _swap_images(images: dict[int, ReferImage]) -> dict[int, ReferImage]:
    """Assign every image the file of the next one of its size; log how many are alone and keep their own."""
    same_size: dict[SizeHW, list[int]] = defaultdict(list)
    for image_id, image in images.items():
        same_size[image.size_hw].append(image_id)
    num_alone = sum(len(ids) == 1 for ids in same_size.values())
    if num_alone:
        logger.warning(
            "blind_baseline=image: %d of %d images have no other of their size and are unchanged",
            num_alone,
            len(images),
        )
    swapped = {}
    for ids in same_size.values():
        for image_id, other in zip(ids, [*ids[1:], ids[0]], strict=True):
            swapped[image_id] = replace(images[image_id], path=images[other].path)
    return swapped

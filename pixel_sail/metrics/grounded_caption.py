"""AP50, mIoU and recall of grounded captions, in two protocols.

Masks and phrases of one image, predicted and expected -> `ImageScore` -> `GroundedCaptionScores`, merged over images
and ranks -> `summary`. `metrics/captions.py` scores the text of the caption.

Example: two targets, one predicted mask that equals the first and has its phrase -> standard: AP50 0.505 (precision 1
up to recall 0.5), mIoU 0.5, recall 0.5. paper: AP50 0.505, mIoU 1.0, recall 0.5.

- AP50: all predictions have the same confidence. `paper` evaluates them one by one as COCO does: images by sorted id,
  at most 100 per image, each matched with the best free target, so the score partly depends on the order of the file.
  `standard` treats them as tied and maximizes the number of hits: precision is constant up to the reached recall, and
  0 beyond.
- mIoU: the mean over images of the mean IoU of pairs. `paper` pairs greedily by IoU and ignores unpaired masks.
  `standard` maximizes the sum of IoU and counts an unpaired mask of either side as 0. An image without masks on both
  sides has 1.
- Recall: the fraction of targets found by a mask with IoU >= 0.5 and a phrase with similarity >= 0.5. `paper` goes
  through pairs by decreasing IoU and stops at the first that fails. The released script crashes on an image with a mask
  without a phrase, which then counts as nothing found. `standard` maximizes the number of found targets.

Phrase similarity is a function of two lists of texts, [A] and [B], that returns a matrix [A, B] in 0-1. The release
uses the cosine of mean-pooled bert-base-uncased. `word_overlap` needs no model and must not be used for scores with
released names.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from pixel_sail.types import PROTOCOLS, RLE, DataError

MIN_IOU = 0.5
MIN_SIMILARITY = 0.5
MAX_DETECTIONS = 100
"""Maximum number of predictions per image in COCO's evaluation."""
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
"""Recalls at which COCO's evaluation reads the precision."""

Matrix = NDArray[np.float64]

Similarity = Callable[[Sequence[str], Sequence[str]], Matrix]


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """Contribution of one image to the scores."""

    image_id: str
    hits: tuple[bool, ...]
    """For each evaluated mask, in order, whether it hits a target at IoU 0.5."""
    mean_iou: float
    num_found: int
    """Targets found by mask and phrase."""
    num_targets: int


@dataclass(frozen=True, kw_only=True)
class GroundedCaptionScores:
    """Scores of images in one protocol. Never changed in place."""

    protocol: str
    images: tuple[ImageScore, ...] = ()

    def add(self, other: "GroundedCaptionScores") -> "GroundedCaptionScores":
        """Return the scores of the images of both. Raises: DataError if protocols differ or an image occurs twice."""
        if self.protocol != other.protocol:
            raise DataError(
                f"grounded captions: found protocols {self.protocol!r} and {other.protocol!r}, expected one"
            )
        both = (*self.images, *other.images)
        twice = [name for name, times in Counter(image.image_id for image in both).items() if times > 1]
        if twice:
            raise DataError(
                f"grounded captions: found {len(twice)} images scored twice, such as {twice[:3]}, expected each once; "
                "check how images are distributed over ranks"
            )
        return GroundedCaptionScores(protocol=self.protocol, images=both)

    def summary(self) -> dict[str, float | int]:
        """Return the scores by name, fractions in 0-1. Raises: DataError without any target."""
        num_targets = sum(image.num_targets for image in self.images)
        if num_targets == 0:
            raise DataError(
                f"grounded captions: found 0 targets in {len(self.images)} images, expected at least 1; check the split"
            )
        ordered = sorted(self.images, key=lambda image: image.image_id)
        hits = [hit for image in ordered for hit in image.hits]
        precision = _one_by_one if self.protocol == "paper" else _all_at_once
        return {
            "ap50": precision(np.array(hits, dtype=bool), num_targets),
            "miou": sum(image.mean_iou for image in ordered) / len(ordered),
            "recall": sum(image.num_found for image in ordered) / num_targets,
            "count": len(ordered),
            "targets": num_targets,
        }

    def fractions(self) -> list[dict[str, tuple[float, float]]]:
        """Return for each image numerator and denominator of the scores that are sums over images (not AP50)."""
        return [{"miou": (image.mean_iou, 1), "recall": (image.num_found, image.num_targets)} for image in self.images]


def score_image(
    image_id: str,
    *,
    predicted: Sequence[RLE],
    predicted_phrases: Sequence[str],
    targets: Sequence[RLE],
    target_phrases: Sequence[str],
    similarity: Similarity,
    protocol: str = "standard",
) -> GroundedCaptionScores:
    """Return the scores of one image; phrase k names mask k.

    A mask beyond the phrases has none and cannot match by phrase. Phrases beyond the masks are ignored.
    Raises: DataError if masks differ in size or the similarity has another shape than asked for.
    """
    where = f"grounded caption of image {image_id}"
    if protocol not in PROTOCOLS:
        raise DataError(f"{where}: found protocol {protocol!r}, expected one of {PROTOCOLS}; correct the config")
    iou = iou_matrix(predicted, targets, where)
    alike = np.full_like(iou, np.nan)
    known = _similarities(predicted_phrases[: len(predicted)], target_phrases[: len(targets)], similarity, where)
    alike[: known.shape[0], : known.shape[1]] = known
    if protocol == "paper":
        hits, mean_iou, num_found = _hits_in_order(iou), _greedy_mean_iou(iou), _greedy_found(iou, alike)
    else:
        num_hits = _most_pairs(iou >= MIN_IOU)
        hits = (True,) * num_hits + (False,) * (len(predicted) - num_hits)
        mean_iou = _best_mean_iou(iou)
        num_found = _most_pairs((iou >= MIN_IOU) & (alike >= MIN_SIMILARITY))
    image = ImageScore(image_id=image_id, hits=hits, mean_iou=mean_iou, num_found=num_found, num_targets=len(targets))
    return GroundedCaptionScores(protocol=protocol, images=(image,))


def iou_matrix(predicted: Sequence[RLE], targets: Sequence[RLE], where: str) -> Matrix:
    """Return the IoU of predicted masks [P] with targets [T], as [P, T]. Raises: DataError if sizes differ."""
    sizes = {tuple(rle["size"]) for rle in (*predicted, *targets)}
    if len(sizes) > 1:
        raise DataError(
            f"{where}: found masks of sizes {sorted(sizes)}, expected one (height, width); resize predictions to the "
            "original image before scoring"
        )
    if not predicted or not targets:
        return np.zeros((len(predicted), len(targets)))
    return np.asarray(coco_mask.iou(list(predicted), list(targets), [0] * len(targets)), dtype=np.float64)


def word_overlap(first: Sequence[str], second: Sequence[str]) -> Matrix:
    """Return for every pair of phrases words in both / words in either, ignoring case."""
    words = [[set(text.lower().split()) for text in texts] for texts in (first, second)]
    values = [[len(a & b) / len(a | b) if a | b else 0.0 for b in words[1]] for a in words[0]]
    return np.array(values, dtype=np.float64).reshape(len(first), len(second))


def _similarities(first: Sequence[str], second: Sequence[str], similarity: Similarity, where: str) -> Matrix:
    shape = (len(first), len(second))
    if not first or not second:
        return np.zeros(shape)
    values = np.asarray(similarity(first, second), dtype=np.float64)
    if values.shape != shape:
        raise DataError(f"{where}: found similarities of shape {values.shape}, expected {shape}; check the function")
    return values


# Precision over all images.


def _one_by_one(hits: NDArray[np.bool_], num_targets: int) -> float:
    """Return the average precision of predictions taken in order, read at 101 recalls as COCO's evaluation does."""
    num_hits = np.cumsum(hits)
    recall = num_hits / num_targets
    # The best precision at this recall or any higher one. The small constant is pycocotools'.
    precision = num_hits / (np.arange(1, len(hits) + 1) + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALL_POINTS, side="left")
    return float(sum(envelope[place] for place in places if place < len(envelope)) / len(RECALL_POINTS))


def _all_at_once(hits: NDArray[np.bool_], num_targets: int) -> float:
    """Return the average precision of the single operating point of predictions with equal confidence."""
    num_hits = int(hits.sum())
    if num_hits == 0:
        return 0.0
    num_points = int((num_hits / num_targets >= RECALL_POINTS).sum())
    return num_hits / len(hits) * num_points / len(RECALL_POINTS)


# One image as released.


def _hits_in_order(iou_PT: Matrix) -> tuple[bool, ...]:
    """Return which predictions match a target. Each takes the best free target, the later one if tied."""
    free = np.ones(iou_PT.shape[1], dtype=bool)
    hits = []
    for row in iou_PT[:MAX_DETECTIONS]:
        candidates = np.where(free & (row >= MIN_IOU), row, -1.0)
        hit = bool((candidates >= 0).any())
        if hit:
            free[len(row) - 1 - int(candidates[::-1].argmax())] = False
        hits.append(hit)
    return tuple(hits)


def _greedy_mean_iou(iou_PT: Matrix) -> float:
    """Return the mean IoU of pairs matched greedily by IoU, 0 if no pair overlaps."""
    left, pairs = iou_PT.copy(), []
    while left.size and left.max() > 0:
        row, column = np.unravel_index(left.argmax(), left.shape)
        pairs.append(float(left[row, column]))
        left[row], left[:, column] = 0, 0
    return sum(pairs) / len(pairs) if pairs else 0.0


def _greedy_found(iou_PT: Matrix, alike_PT: Matrix) -> int:
    """Return how many pairs pass both thresholds before the first that fails; 0 if a mask has no phrase."""
    left, num_found = iou_PT.copy(), 0
    while left.size:
        row, column = np.unravel_index(left.argmax(), left.shape)
        if left[row, column] < MIN_IOU:
            break
        if np.isnan(alike_PT[row, column]):
            return 0
        if alike_PT[row, column] < MIN_SIMILARITY:
            break
        num_found += 1
        left[row], left[:, column] = 0, 0
    return num_found


# One image, correct.


def _most_pairs(allowed_PT: NDArray[np.bool_]) -> int:
    rows, columns = linear_sum_assignment(allowed_PT, maximize=True)
    return int(allowed_PT[rows, columns].sum())


def _best_mean_iou(iou_PT: Matrix) -> float:
    num_places = max(iou_PT.shape)
    if num_places == 0:
        return 1.0
    rows, columns = linear_sum_assignment(iou_PT, maximize=True)
    return float(iou_PT[rows, columns].sum() / num_places)

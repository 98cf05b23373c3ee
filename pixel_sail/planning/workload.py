"""Content of a micro-batch: the numbers on which FLOPs and memory depend.

`plan.py` averages over `Workload`s of real batches (`of_batch`) or of assumed ones (`assumed.py`). One row with five
images of 480 x 640 and 100 text tokens each:

    Workload(rows=1, tokens_per_row=6510, images=(ImageLoad(rows=30, columns=40, masks=4, image_hw=(480, 640)), ...),
             supervised=250, samples=5, real_tokens=6510, seen_pairs=7850270, computed_pairs=7875020,
             computed_keys=12520)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pixel_sail.model.attention_backends import attention_segments
from pixel_sail.model.spans import sample_spans
from pixel_sail.types import IGNORE_LABEL, Batch, Example, SizeHW


@dataclass(frozen=True, kw_only=True)
class ImageLoad:
    """One image of a micro-batch."""

    rows: int
    columns: int
    masks: int
    image_hw: SizeHW
    """Size of its masks, pixels."""

    @property
    def patches(self) -> int:
        """Return the cells of its patch grid."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One micro-batch."""

    rows: int
    tokens_per_row: int
    """Padding included."""
    images: tuple[ImageLoad, ...]
    supervised: int
    samples: int
    real_tokens: int
    seen_pairs: int
    """(query, key) pairs that the attention mask permits: the minimum a kernel must compute."""
    computed_pairs: int
    """Pairs of one product per image and per text, in which only a text's own future is masked."""
    computed_keys: int
    """Keys of these products: an image counts once for itself and once for every text that attends to it."""

    @property
    def num_masks(self) -> int:
        """Return the masks of all images."""
        return sum(image.masks for image in self.images)


def of_batch(batch: Batch) -> Workload:
    """Return the workload of a real micro-batch."""
    masks = iter(batch.masks)
    images = []
    for (rows, columns), count in zip(batch.grids, batch.masks_per_image, strict=True):
        sizes = [tuple(next(masks).shape) for _ in range(count)]
        images.append(
            ImageLoad(rows=rows, columns=columns, masks=count, image_hw=(sizes[0][0], sizes[0][1]) if sizes else (0, 0))
        )
    spans = batch.spans
    if spans is None:
        spans = sample_spans(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    segments = attention_segments(spans)
    return Workload(
        rows=batch.input_ids_BT.shape[0],
        tokens_per_row=batch.input_ids_BT.shape[1],
        images=tuple(images),
        supervised=len(batch.targets_M),
        samples=len(batch.sample_ids),
        real_tokens=int((batch.sample_index_BT >= 0).sum()),
        seen_pairs=visible_pairs(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT),
        computed_pairs=sum(
            segment.num_queries * (segment.num_prefix_keys + segment.num_queries) for segment in segments
        ),
        computed_keys=sum(segment.num_prefix_keys + segment.num_queries for segment in segments),
    )


def of_example(example: Example) -> Workload:
    """Return the workload of one sample alone in a row."""
    where = (torch.zeros_like(example.input_ids_T)[None], example.branch_ids_T[None], example.in_image_T[None])
    segments = attention_segments(sample_spans(*where))
    images: tuple[ImageLoad, ...] = ()
    if example.grid_hw is not None:
        rows, columns = example.grid_hw
        height, width = example.masks[0].shape if example.masks else (0, 0)
        images = (ImageLoad(rows=rows, columns=columns, masks=len(example.masks), image_hw=(height, width)),)
    return Workload(
        rows=1,
        tokens_per_row=len(example),
        images=images,
        supervised=int((example.labels_T != IGNORE_LABEL).sum()),
        samples=1,
        real_tokens=len(example),
        seen_pairs=visible_pairs(*where),
        computed_pairs=sum(
            segment.num_queries * (segment.num_prefix_keys + segment.num_queries) for segment in segments
        ),
        computed_keys=sum(segment.num_prefix_keys + segment.num_queries for segment in segments),
    )


def visible_pairs(sample_index_BT: Tensor, branch_ids_BT: Tensor, in_image_BT: Tensor) -> int:
    """Return the number of (query, key) pairs of real tokens that the attention mask permits."""
    is_real_BT = sample_index_BT >= 0
    if not bool(is_real_BT.any()):
        return 0
    samples_T, branches_T, image_T = sample_index_BT[is_real_BT], branch_ids_BT[is_real_BT], in_image_BT[is_real_BT]
    num_samples, num_branches = int(samples_T.max()) + 1, int(branches_T.max()) + 1
    image_S = torch.bincount(samples_T[image_T], minlength=num_samples)
    owner_T = (samples_T * num_branches + branches_T)[~image_T]
    text_SR = torch.bincount(owner_T, minlength=num_samples * num_branches).view(num_samples, num_branches)
    # All later tokens attend to branch 0 (image and shared text); a branch attends to that and its own past.
    shared_S, branch_SR = text_SR[:, 0], text_SR[:, 1:]
    before_S = image_S + shared_S
    image_pairs_S = image_S**2 + shared_S * image_S + shared_S * (shared_S + 1) // 2
    branch_pairs_SR = branch_SR * before_S[:, None] + branch_SR * (branch_SR + 1) // 2
    return int(image_pairs_S.sum() + branch_pairs_SR.sum())


def mean(values: list[float]) -> float:
    """Return the mean of some numbers, as float64 sums them."""
    return float(torch.tensor(values, dtype=torch.float64).mean())

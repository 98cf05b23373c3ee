"""Collates packed sequences into a `Batch`: pads rows, makes indices global, lists the supervised positions.

This is the last step of data loading; the model and the losses read only the `Batch`. Two sequences of 120 and 97
tokens become rows of 120. In `patches_SK` the second row's patches follow the first row's; in `sample_ids` its samples
do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pixel_sail.data.packing import PackedSequence
from pixel_sail.model.spans import sample_spans
from pixel_sail.types import IGNORE_LABEL, Batch, Example

PADDING = {"sample_index": -1, "patch_index": -1, "prompt_ids": -1, "labels": IGNORE_LABEL}
"""Padding value of the per-token arrays for which it is not 0."""


def collate(sequences: Sequence[PackedSequence], *, seg_id: int) -> Batch:
    """Return the batch of these sequences, one row each.

    A position's target is the next token of its row. The first token of every sample and of every branch is never
    supervised (it belongs to an image or a question), so no position predicts a token of its neighbor.
    """
    rows: list[dict[str, Tensor]] = []
    examples: list[Example] = []
    num_patches = 0
    for sequence in sequences:
        parts: dict[str, list[Tensor]] = {}
        for example in sequence.examples:
            assert int(example.labels_T[0]) == IGNORE_LABEL, f"{example.sample_id}: the first token is supervised"
            for name, value in _token_arrays(example, len(examples), num_patches).items():
                parts.setdefault(name, []).append(value)
            examples.append(example)
            num_patches += len(example.patches_PK)
        rows.append({name: torch.cat(values, dim=-1) for name, values in parts.items()})
    arrays = _pad_rows(rows)
    labels = arrays.pop("labels")
    images = [i for i, example in enumerate(examples) if example.grid_hw is not None]
    supervised = (labels[:, 1:] != IGNORE_LABEL).nonzero()
    pairs = [(image, target) for image, i in enumerate(images) for target in examples[i].teacher_targets]
    originals = [(image, own) for image, i in enumerate(images) if (own := examples[i].image_HW3) is not None]
    return Batch(
        sample_ids=tuple(example.sample_id for example in examples),
        sources=tuple(example.source for example in examples),
        input_ids_BT=arrays["input_ids"],
        position_ids_2BT=arrays["position_ids"],
        sample_index_BT=arrays["sample_index"],
        branch_ids_BT=arrays["branch_ids"],
        in_image_BT=arrays["in_image"],
        patch_index_BT=arrays["patch_index"],
        prompt_ids_BT=arrays["prompt_ids"],
        patches_SK=torch.cat([example.patches_PK for example in examples]),
        grids=tuple(grid for example in examples if (grid := example.grid_hw) is not None),
        image_samples=tuple(images),
        seg_positions_N2=((arrays["input_ids"] == seg_id) & (arrays["sample_index"] >= 0)).nonzero(),
        masks_per_image=tuple(len(examples[i].masks) for i in images),
        logit_positions_M2=supervised,
        targets_M=labels[:, 1:][tuple(supervised.unbind(1))],
        target_samples_M=arrays["sample_index"][tuple(supervised.unbind(1))],
        point_seeds=tuple(examples[i].point_seed for i in images),
        masks=tuple(torch.from_numpy(mask) for example in examples for mask in example.masks),
        ignored=tuple(
            None if mask is None else torch.from_numpy(mask) for example in examples for mask in example.ignored
        ),
        teacher_names=tuple(target.teacher for _, target in pairs),
        teacher_images=tuple(image for image, _ in pairs),
        teacher_maps=tuple(target.features_EYX for _, target in pairs),
        teacher_scales=tuple(target.scales_E for _, target in pairs),
        original_image_index=tuple(image for image, _ in originals),
        original_images=tuple(own for _, own in originals),
        spans=sample_spans(arrays["sample_index"], arrays["branch_ids"], arrays["in_image"]),
    )


def _token_arrays(example: Example, sample_index: int, patch_offset: int) -> dict[str, Tensor]:
    """Return the per-token arrays of one example with indices made global."""
    return {
        "input_ids": example.input_ids_T,
        "labels": example.labels_T,
        "position_ids": example.position_ids_2T,
        "sample_index": torch.full_like(example.input_ids_T, sample_index),
        "branch_ids": example.branch_ids_T,
        "in_image": example.in_image_T,
        "patch_index": torch.where(example.patch_index_T >= 0, example.patch_index_T + patch_offset, -1),
        "prompt_ids": example.prompt_ids_T,
    }


def _pad_rows(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack each array over rows: [B, T], and position ids [2, B, T]."""
    longest = max(row["input_ids"].shape[0] for row in rows)
    stacked = {}
    for name in rows[0]:
        padded = [F.pad(row[name], (0, longest - row[name].shape[-1]), value=PADDING.get(name, 0)) for row in rows]
        stacked[name] = torch.stack(padded, dim=-2)
    return stacked

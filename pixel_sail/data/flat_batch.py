"""Moves a batch from a loader worker to the training process as one block of memory per dtype.

`data/loader.py` flattens it in the worker and restores it in the training process. Every tensor that crosses a process
boundary costs a file descriptor and a fraction of a millisecond, and a batch has a mask per question. One block pays
this cost once, and the tensors of the restored batch are views of it.

Example: input ids [2, 120] and positions [2, 2, 120] travel as 720 int64 numbers, with the layout
[("input_ids_BT", None, int64, 0, (2, 120)), ("position_ids_2BT", None, int64, 240, (2, 2, 120))].
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pixel_sail.types import Batch


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """Location of one tensor of the batch."""

    field: str
    item: int | None
    """Index in a tuple of tensors, None for a field that is a tensor itself."""
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FlatBatch:
    """A batch with its tensors in one block per dtype."""

    blocks: dict[torch.dtype, Tensor]
    slots: tuple[_Slot, ...]
    rest: dict[str, Any]
    """Fields without tensors, and tuples with None in place of each tensor."""

    def pin_memory(self) -> "FlatBatch":
        """Return the batch in pinned memory for asynchronous copies to a GPU; called by torch's DataLoader."""
        return replace(self, blocks={dtype: block.pin_memory() for dtype, block in self.blocks.items()})


def flatten_batch(batch: Batch) -> FlatBatch:
    """Return the batch as blocks."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    slots: list[_Slot] = []
    rest: dict[str, Any] = {}

    def add(field: str, item: int | None, tensor: Tensor) -> None:
        start = sizes.get(tensor.dtype, 0)
        slots.append(_Slot(field=field, item=item, dtype=tensor.dtype, start=start, shape=tuple(tensor.shape)))
        parts.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
        sizes[tensor.dtype] = start + tensor.numel()

    for field, value in vars(batch).items():
        if isinstance(value, Tensor):
            add(field, None, value)
        elif isinstance(value, tuple) and any(isinstance(entry, Tensor) for entry in value):
            rest[field] = tuple(None if isinstance(entry, Tensor) else entry for entry in value)
            for item, entry in enumerate(value):
                if isinstance(entry, Tensor):
                    add(field, item, entry)
        else:
            rest[field] = value
    return FlatBatch(blocks={dtype: torch.cat(own) for dtype, own in parts.items()}, slots=tuple(slots), rest=rest)


def unflatten_batch(flat: FlatBatch) -> Batch:
    """Return the restored batch; its tensors are views of the blocks."""
    fields: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in flat.rest.items()
    }
    for slot in flat.slots:
        size = 1
        for side in slot.shape:
            size *= side
        tensor = flat.blocks[slot.dtype][slot.start : slot.start + size].view(slot.shape)
        if slot.item is None:
            fields[slot.field] = tensor
        else:
            fields[slot.field][slot.item] = tensor
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Batch(**values)

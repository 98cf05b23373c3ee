"""DeepSpeed ZeRO checkpoints as tensors by name: float32 master weights merged from the shards of all ranks.

`sources.open_source` uses it for a folder with `*_optim_states.pt`, or with a file `latest` that names one. Stages 1
and 2 partition the concatenated parameters of a group, stage 3 partitions every parameter:

    2 ranks, a of 5 values, b of 4    stage 2: [a0..a4] [b0..b3], stage 3: [a0 a1 a2 b0 b1] [a3 a4 - b2 b3]

Source: the layout read by DeepSpeed's consolidation script (`deepspeed/utils/zero_to_fp32.py`, 0.19). That script
unpickles arbitrary classes; here the few classes that DeepSpeed stores are replaced by plain ones.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixel_sail.conversion.sources import TensorInfo, TensorSource, load_safely
from pixel_sail.files import is_hidden
from pixel_sail.types import DataError

OPTIMIZER = "optimizer_state_dict"
FLAT_KEYS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


class DeadObject:
    """Placeholder for a DeepSpeed object: holds the stored attributes, without behavior."""

    def __init__(self, *stored: Any) -> None:
        self.stored = stored

    def __setstate__(self, state: Any) -> None:
        """Keep the stored attributes as one value."""
        self.attributes = state


STAND_INS = [
    (DeadObject, f"deepspeed.{name}")
    for name in (
        "runtime.zero.config.ZeroStageEnum",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "utils.tensor_fragment.fragment_address",
    )
]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Location of one parameter: consecutive slices of flat tensors, and its shape."""

    runs: tuple[Tensor, ...]
    shape: tuple[int, ...]


class ZeroSource:
    """Parameters that are merged when read."""

    def __init__(self, path: Path, pieces: Mapping[str, Pieces]) -> None:
        self.path = path
        self._pieces = pieces
        self.infos = {name: TensorInfo(shape=own.shape, dtype=own.runs[0].dtype) for name, own in pieces.items()}

    def read(self, name: str) -> Tensor:
        """Return one parameter."""
        own = self._pieces[name]
        return torch.cat(own.runs)[: torch.Size(own.shape).numel()].view(own.shape)


def is_zero_folder(path: Path) -> bool:
    """Return whether a folder is a checkpoint of DeepSpeed."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_model_states.pt")))


def open_zero_folder(path: Path) -> TensorSource:
    """Return the checkpoint. Raises: DataError if a shard is missing, damaged or unsafe, or sizes do not add up."""
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    optimizer_files, model_files = (
        sorted((file for file in folder.glob(f"*_{kind}_states.pt") if not is_hidden(file)), key=_rank)
        for kind in ("optim", "model")
    )
    if not optimizer_files or not model_files:
        raise DataError(
            f"{folder}: found {len(model_files)} *_model_states.pt and {len(optimizer_files)} *_optim_states.pt, "
            "expected at least one of each (the float32 weights are in the latter); copy the whole folder"
        )
    shards = [_optimizer_state(file) for file in optimizer_files]
    stage, world = _stage(shards[0], optimizer_files[0]), _world_size(shards[0])
    ranks = sorted({_rank(file) for file in optimizer_files})
    if ranks != list(range(world)) or len(optimizer_files) != world:
        raise DataError(
            f"{folder}: found *_optim_states.pt of ranks {ranks}, expected those of 0 .. {world - 1} "
            f"({len(optimizer_files)} files for {world} ranks); copy the missing shards"
        )
    states = [load_safely(file, STAND_INS) for file in model_files]
    if len(states) != (world if stage == 3 else 1):
        raise DataError(
            f"{folder}: found {len(states)} *_model_states.pt, expected {world if stage == 3 else 1} for ZeRO stage "
            f"{stage} on {world} ranks (tensor parallel checkpoints are not read); copy the whole folder"
        )
    try:
        flats = [shard[FLAT_KEYS[stage]] for shard in shards]
        pieces = _cut_groups(states[0], flats, shards[0]) if stage < 3 else _cut_parameters(states[0], flats)
        pieces |= _frozen(states)
        for alias, name in dict(states[0].get("shared_params") or {}).items():
            pieces[alias] = pieces[name]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{folder}: the shards do not fit together ({type(error).__name__}: {error}), expected ZeRO stage {stage} "
            f"of {world} ranks as DeepSpeed 0.19 reads it; copy the whole folder again"
        ) from error
    return ZeroSource(path, pieces)


def _rank(file: Path) -> int:
    """Return the rank in the name of a shard, 0 if it has none."""
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _optimizer_state(file: Path) -> Mapping[str, Any]:
    """Return the optimizer state of one rank."""
    content = load_safely(file, STAND_INS)
    if not isinstance(content, Mapping) or "zero_stage" not in content.get(OPTIMIZER, {}):
        raise DataError(f"{file}: found no {OPTIMIZER}.zero_stage, expected a shard of DeepSpeed's ZeRO optimizer")
    state: Mapping[str, Any] = content[OPTIMIZER]
    return state


def _stage(shard: Mapping[str, Any], file: Path) -> int:
    """Return the ZeRO stage, which DeepSpeed stores as a number or as a member of an enumeration."""
    stored = shard["zero_stage"]
    stage = stored.stored[0] if isinstance(stored, DeadObject) else stored
    if stage not in FLAT_KEYS:
        raise DataError(f"{file}: found ZeRO stage {stage!r}, expected one of {sorted(FLAT_KEYS)}")
    return int(stage)


def _world_size(shard: Mapping[str, Any]) -> int:
    """Return the number of ranks."""
    count = shard["partition_count"]
    return int(max(count) if isinstance(count, (list, tuple)) else count)


def _cut_groups(
    model_state: Mapping[str, Any], flats: Sequence[Sequence[Tensor]], shard: Mapping[str, Any]
) -> dict[str, Pieces]:
    """Return the parameters of stage 1 and 2: each group is one row of values over all ranks."""
    pieces = {}
    paddings = shard.get("param_alignment_paddings")
    for group, shapes in enumerate(model_state["param_shapes"]):
        rows, position = [own[group] for own in flats], 0
        available = sum(row.numel() for row in rows)
        for index, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            if position + size > available:
                raise ValueError(f"group {group} ends at {available}, {name} at {position + size}")
            pieces[name] = Pieces(runs=_window(rows, position, size), shape=tuple(shape))
            position += size + (int(paddings[group][index]) if paddings is not None else 0)
        # The row may be padded to a multiple of twice the number of ranks.
        if available - position >= 2 * len(flats):
            raise ValueError(f"group {group} has {available} values for parameters of {position}")
    return pieces


def _cut_parameters(model_state: Mapping[str, Any], flats: Sequence[Sequence[Tensor]]) -> dict[str, Pieces]:
    """Return the parameters of stage 3: each rank holds an equal part of every parameter, the last one padded."""
    pieces, position, world = {}, 0, len(flats)
    shapes = {name: shape for group in model_state["param_shapes"] for name, shape in group.items()}
    available = sum(flat.numel() for flat in flats[0])
    for name, shape in shapes.items():
        part = -(-torch.Size(shape).numel() // world)
        if position + part > available:
            raise ValueError(f"a rank has {available} values, {name} ends at {position + part}")
        runs = tuple(run for own in flats for run in _window(own, position, part))
        pieces[name] = Pieces(runs=runs, shape=tuple(shape))
        position += part
    if position != available:
        raise ValueError(f"a rank has {available} values for parameters of {position}")
    return pieces


def _frozen(states: Sequence[Mapping[str, Any]]) -> dict[str, Pieces]:
    """Return the frozen parameters, in the parts stored in each file."""
    shapes = states[0].get("frozen_param_shapes") or {}
    return {
        name: Pieces(
            runs=tuple(state["frozen_param_fragments"][name].flatten() for state in states), shape=tuple(shape)
        )
        for name, shape in shapes.items()
    }


def _window(rows: Sequence[Tensor], start: int, size: int) -> tuple[Tensor, ...]:
    """Return the parts of consecutive flat tensors that cover [start, start + size)."""
    parts, first = [], 0
    for row in rows:
        begin, end = max(start - first, 0), min(start + size - first, row.numel())
        if begin < end:
            parts.append(row[begin:end])
        first += row.numel()
    return tuple(parts)

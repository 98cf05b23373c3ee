"""The plan of a conversion: what happens to every tensor, made before any is read.

`convert` passes names and shapes of both sides, `writer` executes the plan and the report lists it. Strict in both
directions: unknown keys, parameters without a source and wrong shapes are errors that name all of them.

    Entry(source="model.norm.weight", target="decoder.norm.weight", shape=(896,), dtype="bfloat16", note="copied")
    Entry(source=None, target="mask_head.seg_projector.0.bias", ..., note="initialised because ..")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixel_sail.conversion.sources import TensorInfo, TensorSource
from pixel_sail.conversion.writer import Write
from pixel_sail.model.convert import row_sources
from pixel_sail.types import DataError

COPIED = "copied"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the report."""

    source: str | None
    target: str | None
    shape: tuple[int, ...]
    dtype: str
    note: str

    def as_dict(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """Return the entry for the report, with the hash of the written tensor."""
        sha256 = {"sha256": hashes[self.target]} if self.target is not None else {}
        return {**vars(self), "shape": list(self.shape), **sha256}


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The tensors to write, and one report entry for each tensor of either side."""

    writes: tuple[Write, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Mapping of the rows of token embedding and text head."""

    sources: Tensor
    """Source row for each row of the target, -1 for none."""
    initialized: tuple[int, ...]
    """Rows of tokens that only the target has are normal with this deviation. Other rows without a source are zero."""
    deviation: float
    seed: int

    @classmethod
    def by_name(
        cls,
        source_tokens: Mapping[str, int],
        target_tokens: Mapping[str, int],
        *,
        source_rows: int,
        target_rows: int,
        deviation: float,
        seed: int,
    ) -> "Rows":
        """Return rows matched by token name. Ids without a token keep their row."""
        shared = {token: index for token, index in target_tokens.items() if token in source_tokens}
        sources = row_sources(source_tokens, shared, source_rows=source_rows, target_rows=target_rows)
        added = sorted(index for token, index in target_tokens.items() if token not in source_tokens)
        sources[added] = -1
        return cls(sources=sources, initialized=tuple(added), deviation=deviation, seed=seed)

    def place(self, rows_VD: Tensor) -> Tensor:
        """Return the target's rows."""
        if torch.equal(self.sources, torch.arange(rows_VD.shape[0])):
            return rows_VD
        placed = rows_VD[self.sources.clamp_min(0)]
        placed[self.sources < 0] = 0
        if self.initialized:
            generator = torch.Generator().manual_seed(self.seed)
            size = (len(self.initialized), rows_VD.shape[1])
            placed[list(self.initialized)] = (torch.randn(size, generator=generator) * self.deviation).to(rows_VD.dtype)
        return placed

    def note(self, source_rows: int) -> str:
        """Return a note about the rows for the report."""
        kept = self.sources[self.sources >= 0]
        zero = len(self.sources) - len(kept) - len(self.initialized)
        return (
            f"{COPIED} {len(kept)} of {source_rows} rows by token name; {len(self.initialized)} rows of new tokens "
            f"initialized, {zero} rows of no token zero, {source_rows - len(kept)} rows dropped because no token uses "
            "them"
        )


def plan_conversion(
    source: TensorSource,
    expected: Mapping[str, tuple[int, ...]],
    *,
    rename: Callable[[str], str | None],
    dropped: Callable[[str], str | None],
    absent: Mapping[str, tuple[Callable[[], Tensor], str]],
    rows: Rows,
    row_names: Sequence[str],
    tied: tuple[str, str] | None,
) -> ConversionPlan:
    """Return the plan for all tensors.

    expected: names and shapes of the target. rename: the target's name of a key, None if it has none. dropped: why a
    key may be dropped. absent: a function that makes a parameter the source may lack, and a note. row_names: target
    names whose rows belong to tokens. tied: source names of embedding and text head if they are tied; only the first
    is written.
    Raises: DataError naming keys that are unknown, missing or misshapen, or a tied head that differs.
    """
    dtype = _main_dtype(source)
    writes: dict[str, Write] = {}
    entries: list[Entry] = []
    problems: list[str] = []
    for key, info in source.infos.items():
        why = "it is the token embedding (tied), compared" if tied and key == tied[1] else dropped(key)
        target = None if why else rename(key)
        entries.append(_entry(key, target, info, f"dropped because {why}" if why else COPIED))
        if why:
            continue
        if target is None or target not in expected:
            problems.append(f"unknown key {key} {info.shape}{f' (here {target})' if target else ''}")
            continue
        if target in writes:
            problems.append(f"{key} and another key both become {target}")
            continue
        shape = expected[target]
        if target in row_names and info.shape[1:] == shape[1:]:
            entries[-1] = _entry(key, target, TensorInfo(shape=shape, dtype=info.dtype), rows.note(info.shape[0]))
        elif info.shape != shape:
            problems.append(f"{key}: found {info.shape}, expected {shape}")
            continue
        writes[target] = Write(
            name=target,
            info=TensorInfo(shape=shape, dtype=info.dtype),
            make=_reader(source, key, rows if target in row_names else None),
        )
    for target in sorted(expected.keys() - writes.keys()):
        if target not in absent:
            problems.append(f"missing {target} {expected[target]}")
            continue
        make, note = absent[target]
        info = TensorInfo(shape=expected[target], dtype=dtype)
        writes[target] = Write(name=target, info=info, make=_cast(make, dtype))
        entries.append(_entry(None, target, info, note))
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(
            f"{source.path}: the checkpoint does not fit: {'; '.join(problems[:20])}{more}; expected exactly the keys "
            "and shapes of the layout named with --from; check layout, --base and sizes"
        )
    if tied and tied[1] in source.infos and not torch.equal(source.read(tied[0]), source.read(tied[1])):
        raise DataError(
            f"{source.path}: {tied[1]} differs from {tied[0]}, expected them equal because tie_word_embeddings is "
            "true; use the config.json the checkpoint was trained with"
        )
    return ConversionPlan(writes=tuple(writes[name] for name in expected if name in writes), entries=tuple(entries))


def _reader(source: TensorSource, key: str, rows: Rows | None) -> Callable[[], Tensor]:
    """Return a function that makes one tensor."""
    return lambda: source.read(key) if rows is None else rows.place(source.read(key))


def _cast(make: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a function that makes a tensor with a dtype."""
    return lambda: make().to(dtype)


def _entry(source: str | None, target: str | None, info: TensorInfo, note: str) -> Entry:
    """Return one line of the report."""
    return Entry(
        source=source, target=target, shape=info.shape, dtype=str(info.dtype).removeprefix("torch."), note=note
    )


def _main_dtype(source: TensorSource) -> torch.dtype:
    """Return the dtype of most values."""
    sizes: dict[torch.dtype, int] = {}
    for info in source.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

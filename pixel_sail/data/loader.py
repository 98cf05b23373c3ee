"""Runs worker processes that turn streams into batches, in an order that does not depend on their number.

`training/loop.py` calls `training_batches` once, with the start or a saved position, and takes one list of
micro-batches per optimizer step. A step takes one sequence from each of `global_batch_size` streams. With several
rounds there are as many sets of streams, which take turns, so that more workers have work. With 8 sequences, 2 ranks,
micro-batches of 2 sequences and 2 rounds, rank 0 builds

    step 1, 3, ...: streams (0, 2) and (4, 6)        step 2, 4, ...: streams (8, 10) and (12, 14)

and up to 4 workers can each build one of these micro-batches.
"""

import faulthandler
import logging
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pixel_sail.data.collate import collate
from pixel_sail.data.flat_batch import FlatBatch, flatten_batch, unflatten_batch
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings, Skipped, StreamState
from pixel_sail.distillation.choice import TeacherChoice
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Batch, DataError, Example

logger = logging.getLogger(__name__)

STDERR = 2


@dataclass(frozen=True, kw_only=True)
class StreamAssignment:
    """The streams of a rank, and how they are grouped into micro-batches."""

    global_batch_size: int
    rounds: int = 1
    """Sets of streams that take turns."""
    rank: int
    world_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        """Check that every rank gets whole micro-batches. Raises: DataError."""
        group = self.world_size * self.micro_batch_size
        if self.global_batch_size % group:
            raise DataError(
                f"data.global_batch_size: found {self.global_batch_size}, expected a multiple of {group} with "
                f"{self.world_size} processes and data.micro_batch_size = {self.micro_batch_size}; change one of them"
            )

    @property
    def num_streams(self) -> int:
        """Return the number of streams over all ranks and rounds."""
        return self.global_batch_size * self.rounds

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Return the streams of this rank's micro-batches, round by round; the list then repeats."""
        groups = []
        for start in range(0, self.num_streams, self.global_batch_size):
            own = range(start + self.rank, start + self.global_batch_size, self.world_size)
            size = self.micro_batch_size
            groups += [tuple(own[i : i + size]) for i in range(0, len(own), size)]
        return groups

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches of one optimizer step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class StepData:
    """The data of one rank for one optimizer step, and the positions of its streams afterwards."""

    batches: list[Batch]
    after: dict[int, StreamState]
    skipped: tuple[Skipped, ...]
    """Samples that this rank's streams skipped since the previous step."""


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """One micro-batch as returned by a worker."""

    flat: FlatBatch
    after: dict[int, StreamState]
    skipped: tuple[Skipped, ...]

    def pin_memory(self) -> "_MicroBatch":
        """Return the micro-batch in pinned memory; called by torch's DataLoader."""
        return replace(self, flat=self.flat.pin_memory())


class MicroBatchDataset(IterableDataset):
    """Endless micro-batches from groups of streams, taken in turn."""

    def __init__(self, groups: Sequence[Sequence[PackedStream]], *, seg_id: int) -> None:
        self.groups = groups
        self.seg_id = seg_id

    def __iter__(self) -> Iterator[_MicroBatch | DataError]:
        """Yield this worker's micro-batches; worker w of W owns every W-th group, and the loader reads workers in turn.

        Data errors are yielded, not raised: torch would hide their message under the worker's traceback.
        """
        info = get_worker_info()
        if info is not None:
            # For training/watchdog.py. faulthandler writes from C, so it works even while the worker hangs.
            faulthandler.register(signal.SIGUSR2, file=STDERR)
        own = self.groups if info is None else self.groups[info.id :: info.num_workers]
        iterators = [[iter(stream) for stream in group] for group in own]
        while True:
            for group in iterators:
                try:
                    sequences = [next(stream) for stream in group]
                except DataError as error:
                    yield error
                    return
                yield _MicroBatch(
                    flat=flatten_batch(collate(sequences, seg_id=self.seg_id)),
                    after={sequence.stream: sequence.after for sequence in sequences},
                    skipped=tuple(skip for sequence in sequences for skip in sequence.skipped),
                )


def reading_table(num_streams: int) -> Tensor:
    """Return a table, shared with data workers, of the position each stream is reading: int64 [L], -1 for none."""
    return torch.full((num_streams,), -1, dtype=torch.int64).share_memory_()


def being_read(mixture: Mixture, reading_L: Tensor) -> list[str]:
    """Return a description of the items in a `reading_table`."""
    positions = [position for position in reading_L.tolist() if position >= 0]
    items = [mixture.stream_item(position) for position in positions]
    return [
        f"{item.source_name}, item {item.item} (position {position} of the mixture)"
        for position, item in zip(positions, items, strict=True)
    ]


def usable_workers(requested: int, num_groups: int) -> int:
    """Return the largest number of workers up to `requested` that divides the groups evenly, which keeps the order."""
    return max((n for n in range(1, requested + 1) if num_groups % n == 0), default=0)


def is_lost_worker(error: RuntimeError) -> bool:
    """Return whether an error means that a data worker was killed; torch has no exception class for it."""
    return re.match(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)", str(error)) is not None


def training_batches(
    mixture: Mixture,
    processor: PixelSailProcessor,
    settings: PackingSettings,
    assignment: StreamAssignment,
    *,
    start: Sequence[StreamState],
    step: int = 0,
    num_workers: int,
    max_skipped_fraction: float = 0.0,
    teachers: Sequence[TeacherChoice] = (),
    reading_L: Tensor | None = None,
    cost: Callable[[Example], float] = len,
) -> Iterator[StepData]:
    """Yield the data of one optimizer step after another, without end. start: states of all streams after `step` steps.
    teachers: those whose features are added to the samples. reading_L: from `reading_table`. cost: cost of a sample,
    counted against `seq_len`.

    Raises: DataError when a sample is wrong and more than `max_skipped_fraction` of the mixture was skipped.
    """
    assert len(start) == assignment.num_streams, f"{len(start)} positions for {assignment.num_streams} streams"
    first = step % assignment.rounds * assignment.accumulation
    groups = assignment.groups[first:] + assignment.groups[:first]
    streams = [
        [
            PackedStream(
                mixture,
                processor,
                settings,
                index=stream,
                num_streams=assignment.num_streams,
                start=start[stream],
                max_skipped_fraction=max_skipped_fraction,
                teachers=teachers,
                reading_L=reading_L,
                cost=cost,
            )
            for stream in group
        ]
        for group in groups
    ]
    workers = usable_workers(num_workers, len(groups))
    if workers != num_workers:
        logger.info(
            "data: using %d of %d workers, so that they divide %d groups evenly", workers, num_workers, len(groups)
        )
    loader = DataLoader(
        MicroBatchDataset(streams, seg_id=processor.seg_id),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    arriving = iter(loader)
    while True:
        own: list[_MicroBatch] = []
        for _ in range(assignment.accumulation):
            arrived = next(arriving)
            if isinstance(arrived, DataError):
                raise arrived
            own.append(arrived)
        yield StepData(
            batches=[unflatten_batch(micro.flat) for micro in own],
            after={stream: position for micro in own for stream, position in micro.after.items()},
            skipped=tuple(skip for micro in own for skip in micro.skipped),
        )

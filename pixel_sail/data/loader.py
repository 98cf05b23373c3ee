"""Worker processes that turn lanes into batches, in an order that does not depend on how many there are.

Place in the flow: `training/loop.py` calls `training_batches` once, at a saved position or at the start, and takes one
list of micro-batches per optimizer step. With 8 lanes, 2 ranks and micro-batches of 2 packs, rank 0 owns lanes 0 2 4 6
and gets two micro-batches per step, lanes (0, 2) and (4, 6).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pixel_sail.data.collate import collate
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import LanePosition, LaneStream, Pack, PackingSettings, Skipped
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Batch, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LaneShare:
    """Which lanes a rank trains on, and how it groups them."""

    num_lanes: int
    rank: int
    world_size: int
    packs_per_micro_batch: int

    def __post_init__(self) -> None:
        """Check that every rank gets whole micro-batches."""
        group = self.world_size * self.packs_per_micro_batch
        if self.num_lanes % group:
            raise DataError(
                f"data.packs_per_step is {self.num_lanes}; with {self.world_size} processes and "
                f"data.packs_per_micro_batch = {self.packs_per_micro_batch} it must be a multiple of {group}"
            )

    @property
    def lanes(self) -> list[int]:
        """Return this rank's lanes."""
        return list(range(self.rank, self.num_lanes, self.world_size))

    @property
    def accumulation(self) -> int:
        """Return the number of micro-batches of one optimizer step."""
        return len(self.lanes) // self.packs_per_micro_batch


@dataclass(frozen=True, kw_only=True)
class StepData:
    """What one rank trains on in one optimizer step, and its lanes' positions afterwards."""

    batches: list[Batch]
    after: dict[int, LanePosition]
    skipped: tuple[Skipped, ...]
    """What this rank's lanes left out on the way."""


class LaneDataset(IterableDataset):
    """The packs of some lanes in turn: pack 1 of every lane, pack 2 of every lane, ..."""

    def __init__(
        self,
        mixture: Mixture,
        processor: PixelSailProcessor,
        settings: PackingSettings,
        *,
        lanes: Sequence[int],
        start: Sequence[LanePosition],
        max_skipped_share: float,
    ) -> None:
        self.streams = [
            LaneStream(
                mixture,
                processor,
                settings,
                lane=lane,
                num_lanes=len(start),
                start=start[lane],
                max_skipped_share=max_skipped_share,
            )
            for lane in lanes
        ]

    def __iter__(self) -> Iterator[Pack | DataError]:
        """Yield this worker's packs; worker w of W owns every W-th lane, which the loader reads in turn.

        Wrong data is yielded instead of raised, or torch would bury its message under the worker's traceback.
        """
        info = get_worker_info()
        own = self.streams if info is None else self.streams[info.id :: info.num_workers]
        iterators = [iter(stream) for stream in own]
        while True:
            for iterator in iterators:
                try:
                    yield next(iterator)
                except DataError as error:
                    yield error
                    return


def usable_workers(requested: int, num_lanes: int) -> int:
    """Return the largest number of workers up to `requested` that divides the lanes evenly, so that order is kept."""
    return max((n for n in range(1, requested + 1) if num_lanes % n == 0), default=0)


def training_batches(
    mixture: Mixture,
    processor: PixelSailProcessor,
    settings: PackingSettings,
    share: LaneShare,
    *,
    start: Sequence[LanePosition],
    num_workers: int,
    max_skipped_share: float = 0.0,
) -> Iterator[StepData]:
    """Yield the data of one optimizer step after another, without end, from the positions of all lanes.

    Raises: DataError when a sample is wrong and more were left out than `max_skipped_share` of the stream.
    """
    assert len(start) == share.num_lanes, f"{len(start)} positions for {share.num_lanes} lanes"
    dataset = LaneDataset(
        mixture, processor, settings, lanes=share.lanes, start=start, max_skipped_share=max_skipped_share
    )
    workers = usable_workers(num_workers, len(share.lanes))
    if workers != num_workers:
        logger.info("data: %d workers used of %d, so that they share %d lanes", workers, num_workers, len(share.lanes))
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    packs = iter(loader)
    while True:
        step: list[Pack] = []
        for _ in share.lanes:
            pack = next(packs)
            if isinstance(pack, DataError):
                raise pack
            step.append(pack)
        groups = [step[i : i + share.packs_per_micro_batch] for i in range(0, len(step), share.packs_per_micro_batch)]
        yield StepData(
            batches=[collate(group, seg_id=processor.seg_id) for group in groups],
            after={pack.lane: pack.after for pack in step},
            skipped=tuple(skip for pack in step for skip in pack.skipped),
        )

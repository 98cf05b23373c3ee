"""Packs samples into sequences of at most `seq_len` tokens.

`data/loader.py` reads several `PackedStream`s. The endless mixture is split into a fixed number L of streams; stream l
has positions l, l + L, l + 2L, ... Each stream packs its own sequences in order, and an optimizer step takes one
sequence from each stream. Ranks and workers only divide the streams among themselves, so the global batch does not
depend on their number. A stream buffers `packing_buffer` samples and fills a sequence with those that fit best. Its
state is the number of the next sample to read and the numbers of the buffered samples:

    packing_buffer 3, seq_len 10, lengths 6 5 3 4 7 ...
        ->  sequences (6 4) (5 3) ..., after the first StreamState(4, (1, 2))

A sample's cost, counted against `seq_len`, is its number of tokens or its FLOPs in tokens (`balance`). An unusable
sample is skipped, recorded by name and reason, and never replaced by another one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from pixel_sail.data.images import load_image
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.turn_parts import fitting_part
from pixel_sail.distillation.cache import TeacherCacheError
from pixel_sail.distillation.choice import TeacherChoice, teacher_targets
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import DataError, Example, Sample

Element = TypeVar("Element")


@dataclass(kw_only=True)
class PackingSettings:
    """How samples are packed into sequences."""

    seq_len: int = 4096
    """Maximum tokens of a packed sequence. A longer sample is an error unless it can be split between turns."""
    independent_turns: bool = False
    """True: each question of a sample attends to the image and itself only. False (release): one conversation."""
    max_samples: int = 0
    """Maximum samples per sequence, 0 for no limit."""
    packing_buffer: int = 8
    """Samples a stream buffers to fill its sequences well; 1 packs them strictly in order."""
    balance: str = "tokens"
    """Cost that fills a sequence: `tokens`, or `flops`, which gives all ranks equal work per step. With `flops` a
    sample costs as many tokens as would take the same FLOPs in the decoder layers alone, up to `seq_len`."""

    def __post_init__(self) -> None:
        """Check the numbers. Raises: DataError."""
        if self.balance not in ("tokens", "flops"):
            raise DataError(f"data.packing.balance: found {self.balance!r}, expected tokens or flops; set one of them")
        if self.seq_len < 1 or self.max_samples < 0 or self.packing_buffer < 1:
            raise DataError(
                f"data.packing: found seq_len {self.seq_len}, max_samples {self.max_samples}, packing_buffer "
                f"{self.packing_buffer}; expected at least 1, 0 and 1; correct the config"
            )


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Position of a stream: every sample before `next` is consumed except those still in the buffer, `waiting`."""

    next: int = 0
    waiting: tuple[int, ...] = ()

    @property
    def consumed(self) -> int:
        """Return the number of consumed samples."""
        return self.next - len(self.waiting)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that was skipped."""

    source: str
    position: int
    """Position in the mixture."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """Samples trained on as one sequence, and the state of its stream after it."""

    stream: int
    after: StreamState
    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...] = ()
    """Samples skipped since the previous sequence."""


def pack_samples(
    read: Callable[[int], tuple[Element, float] | None],
    settings: PackingSettings,
    *,
    held: dict[int, tuple[Element, float]],
    upcoming: int,
) -> Iterator[tuple[tuple[Element, ...], StreamState]]:
    """Yield the samples of one sequence after another, without end, and the state of the stream after each.

    read: returns sample `number` of the stream and its cost, None for a skipped one. held: buffered samples by number.
    upcoming: the number to read next.
    """
    while True:
        chosen: list[Element] = []
        room = float(settings.seq_len)
        while True:
            while len(held) < settings.packing_buffer:
                sample = read(upcoming)
                if sample is not None:
                    held[upcoming] = sample
                upcoming += 1
            number = _best_fit(held, room, is_first=not chosen)
            if number is None or (settings.max_samples and len(chosen) == settings.max_samples):
                break
            item, cost = held.pop(number)
            chosen.append(item)
            room -= cost
        yield tuple(chosen), StreamState(next=upcoming, waiting=tuple(held))


def _best_fit(held: dict[int, tuple[Element, float]], room: float, *, is_first: bool) -> int | None:
    """Return the sample to pack next. An empty sequence takes the oldest, so that none waits forever; otherwise the
    most expensive sample that fits, the older one on a tie."""
    if is_first:
        return min(held)
    fitting = [number for number, (_, cost) in held.items() if cost <= room]
    return max(fitting, key=lambda number: (held[number][1], -number), default=None)


class PackedStream:
    """The packed sequences of one stream, in order, from any position."""

    def __init__(
        self,
        mixture: Mixture,
        processor: PixelSailProcessor,
        settings: PackingSettings,
        *,
        index: int,
        num_streams: int,
        start: StreamState | None = None,
        max_skipped_fraction: float = 0.0,
        teachers: Sequence[TeacherChoice] = (),
        reading_L: torch.Tensor | None = None,
        cost: Callable[[Example], float] = len,
    ) -> None:
        """`reading_L`: int64, where this stream records the mixture position it is reading, -1 otherwise. `cost`: cost
        of a sample, counted against `seq_len`."""
        self.mixture = mixture
        self.processor = processor
        self.settings = settings
        self.index = index
        self.num_streams = num_streams
        self.start = StreamState() if start is None else start
        self.max_skipped_fraction = max_skipped_fraction
        self.teachers = tuple(teachers)
        self.cost = cost
        self.reading_L = torch.empty(num_streams, dtype=torch.int64) if reading_L is None else reading_L

    def example(self, number: int) -> Example:
        """Return sample `number` of this stream, tokenized. Raises: DataError when it is wrong or longer than a
        sequence."""
        self.reading_L[self.index] = self._stream_position(number)
        example = self._read(number)
        self.reading_L[self.index] = -1
        return example

    def _read(self, number: int) -> Example:
        item = self.mixture.item(self._stream_position(number))
        sample = item.sample
        example, image = self._encode(sample)
        if len(example) > self.settings.seq_len and sample.part_choice is not None:
            part = fitting_part(sample, self.processor, example.grid_hw, self.settings.seq_len)
            example, image = self._encode(part)
        if len(example) > self.settings.seq_len:
            raise DataError(
                f"{sample.sample_id}: found {len(example)} tokens, expected at most data.packing.seq_len = "
                f"{self.settings.seq_len}; raise it or sample fewer turns per sample"
            )
        example = replace(example, source=item.source_name, point_seed=item.point_seed)
        if not self.teachers or image is None or sample.image_path is None:
            return example
        return with_teacher_targets(example, self.teachers, path=sample.image_path, image=image)

    def _encode(self, sample: Sample) -> tuple[Example, Image.Image | None]:
        """Return a tokenized sample and its image."""
        image = None
        if sample.image_path is not None:
            image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        independent_turns = self.settings.independent_turns
        return self.processor.encode_sample(sample, image, independent_turns=independent_turns), image

    def __iter__(self) -> Iterator[PackedSequence]:
        """Yield sequences without end. Raises: DataError when this stream alone skipped more samples than allowed."""
        held = {number: self._weighed(number) for number in self.start.waiting}
        skipped: list[Skipped] = []
        num_skipped = 0

        def read(number: int) -> tuple[Example, float] | None:
            nonlocal num_skipped
            try:
                return self._weighed(number)
            except TeacherCacheError:
                # The cache is wrong, not the sample: skipping it would change the training data.
                raise
            except DataError as error:
                num_skipped += 1
                skipped.append(self._skipped(number, error))
                if num_skipped > allowed_skips(self.mixture, self._stream_position(number), self.max_skipped_fraction):
                    raise
                return None

        for examples, after in pack_samples(read, self.settings, held=held, upcoming=self.start.next):
            yield PackedSequence(stream=self.index, after=after, examples=examples, skipped=tuple(skipped))
            skipped.clear()

    def _weighed(self, number: int) -> tuple[Example, float]:
        example = self.example(number)
        return example, self.cost(example)

    def _stream_position(self, number: int) -> int:
        return self.index + number * self.num_streams

    def _skipped(self, number: int, error: DataError) -> Skipped:
        position = self._stream_position(number)
        return Skipped(source=self.mixture.stream_item(position).source_name, position=position, reason=str(error))


def with_teacher_targets(
    example: Example, teachers: Sequence[TeacherChoice], *, path: Path, image: Image.Image
) -> Example:
    """Return the example with the targets of the teachers that apply to it. Raises: TeacherCacheError."""
    assert example.grid_hw is not None, f"{example.sample_id}: an image without a grid"
    targets = teacher_targets(
        teachers,
        source=example.source,
        point_seed=example.point_seed,
        has_masks=bool(example.masks),
        path=path,
        grid_hw=example.grid_hw,
        where=example.sample_id,
    )
    is_looked_at = any(target.features_EYX is None for target in targets)
    return replace(
        example,
        teacher_targets=targets,
        image_HW3=torch.from_numpy(np.array(image)) if is_looked_at else None,
    )


def allowed_skips(mixture: Mixture, position: int, max_fraction: float) -> int:
    """Return how many samples may have been skipped when the stream reaches `position`.

    The fraction is of at least a whole epoch, so that one bad sample early on does not end a long run.
    """
    return int(max_fraction * max(position + 1, mixture.epoch_length))

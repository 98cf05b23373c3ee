"""The stream of packed sequences is independent of ranks and workers and resumes exactly; samples in a row stay
separate."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixel_sail.data import flat_batch
from pixel_sail.data.loader import StreamAssignment, training_batches, usable_workers
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings, StreamState
from pixel_sail.training.checkpoint import gather_data_state
from pixel_sail.types import IGNORE_LABEL, DataError, Sample, Turn

NUM_STREAMS = 4
SETTINGS = PackingSettings(seq_len=120, packing_buffer=3)


class RandomSource:
    """Items of very different length, every fourth without an image; the sample id identifies what was sampled."""

    def __init__(self, name, length, paths):
        self.name = name
        self.length = length
        self.paths = paths

    def __len__(self):
        return self.length

    def get(self, index, rng):
        choice = int(rng.integers(10**6))
        question = "x" * (index * 7 % 23 + 1)
        if index % 4 == 3:
            return self._sample(index, choice, None, None, Turn(question=question, answer="no"))
        size_hw = IMAGE_SIZES[index % len(IMAGE_SIZES)]
        mask = rng.random(size_hw) < 0.5
        turn = Turn(question=question, answer="[SEG]", masks=(mask,))
        return self._sample(index, choice, self.paths[index % len(IMAGE_SIZES)], size_hw, turn)

    def _sample(self, index, choice, path, size_hw, turn):
        name = f"{self.name}/{index}/{choice}"
        return Sample(sample_id=name, source=self.name, image_path=path, image_hw=size_hw, turns=(turn,))


IMAGE_SIZES = ((16, 24), (8, 8), (24, 16))


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index}.png" for index in range(len(IMAGE_SIZES))]
    for index, path in enumerate(paths):
        make_image(np.random.default_rng(index), IMAGE_SIZES[index]).save(path)
    return paths


@pytest.fixture(scope="module")
def make_mixture(image_paths):
    def make(*, lengths=(23,), repeats=(1.0,), seed=0):
        names = ["ab"[index] for index in range(len(lengths))]
        sources = {name: RandomSource(name, length, image_paths) for name, length in zip(names, lengths, strict=True)}
        return Mixture(sources, dict(zip(names, repeats, strict=True)), seed=seed)

    return make


def _item(sample_id):
    """Return source and index, without the random part."""
    return sample_id.rsplit("/", 1)[0]


def _steps(mixture, processor, num_steps, *, world_size=1, workers=0, start=None, micro=1, rank=0, rounds=1, step=0):
    assignment = StreamAssignment(
        global_batch_size=NUM_STREAMS, rounds=rounds, rank=rank, world_size=world_size, micro_batch_size=micro
    )
    start = start or [StreamState()] * assignment.num_streams
    stream = training_batches(mixture, processor, SETTINGS, assignment, start=start, step=step, num_workers=workers)
    return list(islice(stream, num_steps))


def _assert_batches_equal(found, expected):
    for name, value in vars(expected).items():
        other = vars(found)[name]
        if name in ("masks", "ignored"):
            assert len(other) == len(value)
            assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(other, value, strict=True))
        else:
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@pytest.mark.parametrize("num_streams", [1, 3, 4])
def test_every_sample_comes_exactly_once_per_epoch_over_all_streams(make_mixture, processor, num_streams):
    mixture = make_mixture()
    seen = [Counter(), Counter()]
    for stream in range(num_streams):
        names = {mixture.item(position).sample.sample_id: position for position in range(stream, 900, num_streams)}
        packed = set()
        for sequence in islice(PackedStream(mixture, processor, SETTINGS, index=stream, num_streams=num_streams), 40):
            for example in sequence.examples:
                position = names.pop(example.sample_id)
                packed.add((position - stream) // num_streams)
                if position < 2 * 23:
                    seen[position // 23][_item(example.sample_id)] += 1
            assert sequence.after.consumed == len(packed)
            assert packed == set(range(sequence.after.next)) - set(sequence.after.waiting)
    assert seen == [Counter({f"a/{index}": 1 for index in range(23)})] * 2


def test_sequences_in_order_fill_the_budget_without_exceeding_it(make_mixture, processor):
    settings = PackingSettings(seq_len=120, packing_buffer=1)
    sequences = list(islice(PackedStream(make_mixture(), processor, settings, index=0, num_streams=1), 12))
    sizes = [[len(example) for example in sequence.examples] for sequence in sequences]
    assert max(sum(row) for row in sizes) <= 120
    for row, following in pairwise(sizes):
        assert sum(row) + following[0] > 120, "the next sample would have fitted"
    assert max(len(row) for row in sizes) > 1


def test_looking_ahead_wastes_less_and_keeps_no_sample_back_for_long(make_mixture, processor):
    filled = {}
    for packing_buffer in (1, 6):
        settings = PackingSettings(seq_len=120, packing_buffer=packing_buffer)
        sequences = list(islice(PackedStream(make_mixture(), processor, settings, index=0, num_streams=1), 60))
        filled[packing_buffer] = sum(len(example) for sequence in sequences for example in sequence.examples) / (
            60 * 120
        )
        assert all(sum(map(len, sequence.examples)) <= 120 for sequence in sequences)
        # A sequence opens with the oldest sample that waits, so that one leaves after at most as many sequences as
        # wait.
        assert all(
            sequence.after.next - min(sequence.after.waiting, default=sequence.after.next) < 40
            for sequence in sequences
        )
    assert filled[6] > filled[1]
    assert filled[6] > 0.93


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    budget=st.integers(30, 90),
    packing_buffer=st.integers(1, 6),
    most=st.integers(0, 3),
    stop=st.integers(1, 6),
)
def test_any_lengths_are_packed_once_within_seq_len_and_resume_from_any_point(
    lengths, budget, packing_buffer, most, stop
):
    settings = PackingSettings(seq_len=budget, packing_buffer=packing_buffer, max_samples=most)

    class Lengths(PackedStream):
        def example(self, number):
            return range(number * 100, number * 100 + lengths[number % len(lengths)])

    def packed_from(start, count):
        return list(islice(Lengths(None, None, settings, index=0, num_streams=1, start=start), count))

    whole = packed_from(None, 12)
    numbers = [example[0] // 100 for sequence in whole for example in sequence.examples]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) | set(whole[-1].after.waiting) == set(range(whole[-1].after.next))
    assert all(sum(map(len, sequence.examples)) <= budget and sequence.examples for sequence in whole)
    assert not most or all(len(sequence.examples) <= most for sequence in whole)
    resumed = packed_from(whole[stop - 1].after, 12 - stop)
    assert [sequence.examples for sequence in resumed] == [sequence.examples for sequence in whole[stop:]]
    assert [sequence.after for sequence in resumed] == [sequence.after for sequence in whole[stop:]]


def _with_bad_items(mixture, bad):
    """Make these items of the first source fail like a broken file."""
    source = mixture.sources[0]
    plain = source.get

    def get(index, rng):
        if index in bad:
            raise DataError(f"item {index}: found nothing, expected an image; replace the file")
        return plain(index, rng)

    source.get = get
    return mixture


def test_bad_samples_are_skipped_by_name_without_replacement(make_mixture, processor):
    mixture = _with_bad_items(make_mixture(), {4, 9})
    stream = PackedStream(mixture, processor, SETTINGS, index=0, num_streams=1, max_skipped_fraction=0.1)
    names, skipped = [], []
    for sequence in stream:
        names += [example.sample_id for example in sequence.examples]
        skipped += sequence.skipped
        if sequence.after.next >= 23:
            break
    first = [skip for skip in skipped if skip.position < 23]
    assert sorted(skip.reason.split(":")[0] for skip in first) == ["item 4", "item 9"]
    assert {(skip.source, mixture.stream_item(skip.position).item) for skip in first} == {("a", 4), ("a", 9)}
    assert {name.split("/")[1] for name in names} <= {str(index) for index in range(23)} - {"4", "9"}


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_samples_than_allowed_end_the_run(make_mixture, processor, workers):
    mixture = _with_bad_items(make_mixture(), {4, 9, 11})
    assignment = StreamAssignment(global_batch_size=1, rank=0, world_size=1, micro_batch_size=1)
    stream = training_batches(
        mixture, processor, SETTINGS, assignment, start=[StreamState()], num_workers=workers, max_skipped_fraction=0.1
    )
    with pytest.raises(DataError, match=r"item (4|9|11): found nothing"):
        list(islice(stream, 23))


def test_max_samples_limits_a_sequence(make_mixture, processor):
    settings = PackingSettings(seq_len=10_000, max_samples=2, packing_buffer=1)
    sequences = list(islice(PackedStream(make_mixture(), processor, settings, index=1, num_streams=2), 4))
    assert [len(sequence.examples) for sequence in sequences] == [2, 2, 2, 2]
    assert [sequence.after.consumed for sequence in sequences] == [2, 4, 6, 8]


@pytest.mark.parametrize("max_samples", [1, 2])
def test_max_samples_and_a_waiting_sample_count_correctly(make_mixture, processor, max_samples):
    settings = PackingSettings(seq_len=60, max_samples=max_samples, packing_buffer=1)
    sequences = list(islice(PackedStream(make_mixture(), processor, settings, index=0, num_streams=1), 15))
    names = [example.sample_id for sequence in sequences for example in sequence.examples]
    mixture = make_mixture()
    assert names == [mixture.item(position).sample.sample_id for position in range(len(names))]
    assert sequences[-1].after.consumed == len(names)


def test_the_global_batch_is_the_same_for_any_number_of_ranks_and_workers(make_mixture, processor):
    expected = [
        {name for batch in step.batches for name in batch.sample_ids} for step in _steps(make_mixture(), processor, 5)
    ]
    assert len(set().union(*expected)) == sum(map(len, expected)) > 20
    for world_size, workers in ((2, 0), (4, 0), (1, 1), (1, 2), (2, 2), (4, 2)):
        found, after = [set() for _ in range(5)], {}
        for rank in range(world_size):
            steps = _steps(make_mixture(), processor, 5, world_size=world_size, workers=workers, rank=rank)
            for names, step in zip(found, steps, strict=True):
                names.update(name for batch in step.batches for name in batch.sample_ids)
            after |= steps[-1].after
        assert found == expected, f"{world_size} ranks, {workers} workers"
        assert sorted(after) == list(range(NUM_STREAMS))


@pytest.mark.parametrize(("rounds", "workers"), [(1, 2), (3, 6), (2, 1)])
def test_batches_of_workers_equal_those_of_the_main_process(make_mixture, processor, rounds, workers):
    plain = _steps(make_mixture(), processor, 3, micro=2, rounds=rounds)
    other = _steps(make_mixture(), processor, 3, micro=2, rounds=rounds, workers=workers)
    for found, expected in zip(other, plain, strict=True):
        assert found.after == expected.after
        for batch, reference in zip(found.batches, expected.batches, strict=True):
            _assert_batches_equal(batch, reference)
            assert batch.input_ids_BT.shape[0] == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("stop", [1, 4])
def test_resuming_from_a_position_continues_with_the_same_sequences(make_mixture, processor, stop, rounds, workers):
    whole = _steps(make_mixture(), processor, 7, rounds=rounds)
    start = [StreamState()] * (NUM_STREAMS * rounds)
    for step in whole[:stop]:
        start = gather_data_state(start, step.after, SETTINGS.packing_buffer, torch.device("cpu"))
    assert any(position.waiting for position in start)
    resumed = _steps(make_mixture(), processor, 7 - stop, start=start, workers=workers, rounds=rounds, step=stop)
    for found, expected in zip(resumed, whole[stop:], strict=True):
        assert found.after == expected.after
        for batch, reference in zip(found.batches, expected.batches, strict=True):
            _assert_batches_equal(batch, reference)


def test_equal_seeds_give_equal_samples_and_another_seed_another_order(make_mixture):
    first, again, other = make_mixture(seed=3), make_mixture(seed=3), make_mixture(seed=4)
    # Positions are read in different orders, since streams of different ranks do so.
    forward = [first.item(position) for position in range(46)]
    backward = [again.item(position) for position in reversed(range(46))][::-1]
    assert [d.sample.sample_id for d in forward] == [d.sample.sample_id for d in backward]
    assert [d.point_seed for d in forward] == [d.point_seed for d in backward]
    order = [_item(d.sample.sample_id) for d in forward[:23]]
    assert order != [_item(other.item(position).sample.sample_id) for position in range(23)]
    assert order != [_item(d.sample.sample_id) for d in forward[23:]], "every epoch has another order"
    assert len({d.point_seed for d in forward}) == 46
    assert len({d.sample.sample_id for d in forward}) == 46, "every epoch samples an item differently"


@pytest.mark.parametrize(
    ("length", "repeat", "share"), [(3, 2.4, 7), (10, 0.3, 3), (100, 0.29, 29), (5, 0.0, 0), (3, 1.0, 3), (7, 3.0, 21)]
)
def test_fractional_repeats_take_whole_rounds_and_a_random_rest(make_mixture, length, repeat, share):
    mixture = make_mixture(lengths=(4, length), repeats=(1.0, repeat))
    assert mixture.epoch_length == 4 + share
    rests = set()
    for epoch in range(6):
        positions = range(epoch * mixture.epoch_length, (epoch + 1) * mixture.epoch_length)
        sampled = [mixture.item(position) for position in positions]
        assert {d.epoch for d in sampled} == {epoch}
        counts = Counter(_item(d.sample.sample_id) for d in sampled)
        assert [counts[f"a/{index}"] for index in range(4)] == [1] * 4
        own = [counts[f"b/{index}"] for index in range(length)]
        assert sum(own) == share
        assert max(own) - min(own) <= 1
        rests.add(tuple(own))
    assert (len(rests) > 1) == bool(share % length)


def test_copies_of_an_item_in_one_epoch_are_sampled_differently(make_mixture):
    mixture = make_mixture(lengths=(3,), repeats=(2.0,))
    assert len({mixture.item(position).sample.sample_id for position in range(6)}) == 6


def test_weights_divide_an_epoch(image_paths):
    sources = {name: RandomSource(name, length, image_paths) for name, length in (("a", 4), ("b", 50), ("c", 7))}
    mixture = Mixture(sources, {}, seed=0, weights={"a": 3, "b": 1.5, "c": 0}, epoch_samples=31)
    counts = Counter(mixture.stream_item(position).source_name for position in range(31))
    assert counts == {"a": 21, "b": 10}
    assert (
        Counter(
            mixture.stream_item(p).item for p in range(31) if mixture.stream_item(p).source_name == "a"
        ).most_common()[-1][1]
        == 5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": 1.0}}, "expected a weight for each"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "not all 0"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "data.weights.b: found -1.0"),
        ({"weights": {"a": 1.0, "c": 1.0}}, r"data.weights: found \['c'\]"),
        ({"weights": {"a": 1.0, "b": 1.0}, "epoch_samples": 0}, "data.epoch_samples: found 0"),
        ({"weights": {"a": 1.0, "b": 1.0}, "repeats": {"a": 2.0}}, "found both, expected at most one"),
    ],
)
def test_wrong_weights_are_rejected(image_paths, changes, message):
    sources = {name: RandomSource(name, 3, image_paths) for name in "ab"}
    settings = {"repeats": {}, "epoch_samples": 8} | changes
    with pytest.raises(DataError, match=message):
        Mixture(sources, seed=0, **settings)


@pytest.mark.parametrize(
    ("lengths", "repeats", "message"),
    [
        ((4,), (-0.5,), "data.repeats.a: found -0.5"),
        ((4,), (0.0,), "found no items in"),
        ((0,), (1.0,), "found no items in"),
    ],
)
def test_a_mixture_without_items_or_with_negative_repeats_is_rejected(make_mixture, lengths, repeats, message):
    with pytest.raises(DataError, match=message):
        make_mixture(lengths=lengths, repeats=repeats)


def test_repeats_of_an_unknown_source_are_rejected(image_paths):
    with pytest.raises(DataError, match=r"data.repeats: found \['b'\], expected names in data.sources \['a'\]"):
        Mixture({"a": RandomSource("a", 3, image_paths)}, {"b": 2.0}, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_longer_than_a_sequence_stops_with_its_name(make_mixture, processor, workers):
    assignment = StreamAssignment(global_batch_size=1, rank=0, world_size=1, micro_batch_size=1)
    settings = PackingSettings(seq_len=30)
    stream = training_batches(
        make_mixture(), processor, settings, assignment, start=[StreamState()], num_workers=workers
    )
    with pytest.raises(DataError, match=r"a/\d+/\d+: found \d+ tokens, expected at most data.packing.seq_len = 30"):
        list(islice(stream, 23))


def test_a_sample_of_exactly_the_budget_is_packed(make_mixture, processor):
    example = PackedStream(make_mixture(), processor, SETTINGS, index=0, num_streams=1).example(0)
    exact = PackingSettings(seq_len=len(example))
    sequence = next(iter(PackedStream(make_mixture(), processor, exact, index=0, num_streams=100)))
    assert [e.sample_id for e in sequence.examples] == [example.sample_id]


@pytest.mark.parametrize(("num_streams", "world_size", "micro"), [(6, 4, 1), (4, 1, 3), (4, 2, 4), (1, 2, 1)])
def test_streams_that_do_not_divide_over_ranks_are_rejected(num_streams, world_size, micro):
    message = f"data.global_batch_size: found {num_streams}, expected a multiple of {world_size * micro} "
    with pytest.raises(DataError, match=f"{message}with {world_size} processes"):
        StreamAssignment(global_batch_size=num_streams, rank=0, world_size=world_size, micro_batch_size=micro)


def test_ranks_divide_all_streams():
    assignments = [
        StreamAssignment(global_batch_size=8, rounds=2, rank=rank, world_size=2, micro_batch_size=2)
        for rank in range(2)
    ]
    assert assignments[0].groups == [(0, 2), (4, 6), (8, 10), (12, 14)]
    assert assignments[1].groups == [(1, 3), (5, 7), (9, 11), (13, 15)]
    assert [assignment.accumulation for assignment in assignments] == [2, 2]


@pytest.mark.parametrize(("requested", "streams", "usable"), [(0, 4, 0), (3, 4, 2), (4, 4, 4), (9, 4, 4), (5, 7, 1)])
def test_workers_are_reduced_until_they_share_the_streams_evenly(requested, streams, usable):
    assert usable_workers(requested, streams) == usable


@pytest.fixture
def examples(processor, make_sample):
    """Two samples with masks, one of them with two branches, one without an image, one with an image only."""
    rng = np.random.default_rng(8)
    sampled = [
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(1, 2), prompts=(3,), sample_id="two turns"),
        make_sample(rng, size_hw=None, masks_per_turn=(0,), sample_id="text only"),
        make_sample(rng, size_hw=(40, 8), masks_per_turn=(1,), prompts=(5,), sample_id="tall"),
        make_sample(rng, size_hw=(8, 8), masks_per_turn=(0,), sample_id="no mask"),
    ]
    encoded = [processor.encode_sample(sample, image, independent_turns=True) for sample, image in sampled]
    return [replace(example, point_seed=100 + index) for index, example in enumerate(encoded)]


def test_tokens_of_a_batch_are_those_of_its_samples_in_order(make_batch, examples):
    batch = make_batch(examples[:2], examples[2:])
    assert batch.sample_ids == ("two turns", "text only", "tall", "no mask")
    for index, example in enumerate(examples):
        own = batch.sample_index_BT == index
        assert torch.equal(batch.input_ids_BT[own], example.input_ids_T)
        assert torch.equal(batch.position_ids_2BT[:, own], example.position_ids_2T)
        assert torch.equal(batch.branch_ids_BT[own], example.branch_ids_T)
        assert torch.equal(batch.in_image_BT[own], example.in_image_T)
        assert torch.equal(batch.prompt_ids_BT[own], example.prompt_ids_T)
        rows = own.any(1).nonzero()
        assert rows.tolist() == [[index // 2]]


def test_every_image_reads_its_own_patches(make_batch, examples):
    batch = make_batch(examples[:2], examples[2:])
    for index, example in enumerate(examples):
        indices = batch.patch_index_BT[(batch.sample_index_BT == index) & (batch.patch_index_BT >= 0)]
        assert torch.equal(batch.patches_SK[indices], example.patches_PK)
    assert sorted(batch.patch_index_BT[batch.patch_index_BT >= 0].tolist()) == list(range(6 + 5 + 1))
    assert batch.grids == ((2, 3), (5, 1), (1, 1))
    assert batch.image_samples == (0, 2, 3)
    assert batch.masks_per_image == (3, 1, 0)
    assert batch.point_seeds == (100, 102, 103)


def test_padding_belongs_to_no_sample(make_batch, examples):
    batch = make_batch(examples[1:2], examples[:1])
    length = len(examples[1])
    assert batch.input_ids_BT.shape == (2, len(examples[0]))
    padding = {"sample_index_BT": -1, "patch_index_BT": -1, "prompt_ids_BT": -1, "branch_ids_BT": 0, "in_image_BT": 0}
    for name, value in padding.items():
        assert set(getattr(batch, name)[0, length:].tolist()) == {value}, name
    assert batch.sample_index_BT[1].tolist() == [1] * len(examples[0])
    assert int(batch.logit_positions_M2[batch.logit_positions_M2[:, 0] == 0, 1].max()) == length - 2


def test_padding_that_looks_like_seg_makes_no_mask(processor, make_batch, examples):
    # The tokenizer may give [SEG] any id, also that of padding.
    batch = make_batch(examples[1:2], examples[:1])
    assert len(batch.seg_positions_N2) == 3
    rows, tokens = batch.seg_positions_N2.unbind(1)
    assert set(batch.input_ids_BT[rows, tokens].tolist()) == {processor.seg_id}
    assert rows.tolist() == [1, 1, 1]
    assert tokens.tolist() == sorted(tokens.tolist())


def test_supervision_never_crosses_samples_or_branches(make_batch, examples):
    batch = make_batch(examples[:2], examples[2:])
    rows, tokens = batch.logit_positions_M2.unbind(1)
    for array in (batch.sample_index_BT, batch.branch_ids_BT):
        assert torch.equal(array[rows, tokens], array[rows, tokens + 1])
    assert torch.equal(batch.input_ids_BT[rows, tokens + 1], batch.targets_M)
    assert torch.equal(batch.sample_index_BT[rows, tokens], batch.target_samples_M)
    for index, example in enumerate(examples):
        expected = example.labels_T[example.labels_T != IGNORE_LABEL]
        assert torch.equal(batch.targets_M[batch.target_samples_M == index], expected)


def test_masks_stay_with_their_seg_tokens(make_batch, examples):
    batch = make_batch(examples[2:], examples[:2])
    owners = batch.sample_index_BT[tuple(batch.seg_positions_N2.unbind(1))]
    assert owners.tolist() == [0, 2, 2, 2]
    assert [tuple(mask.shape) for mask in batch.masks] == [(40, 8), (16, 24), (16, 24), (16, 24)]
    expected = [*examples[2].masks, *examples[0].masks]
    for mask, original in zip(batch.masks, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), original)


def test_moving_a_batch_keeps_every_field(make_batch, examples):
    batch = make_batch(examples)
    _assert_batches_equal(batch.to("cpu"), batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda b: {"masks": b.masks[1:]}, "masks, .SEG. positions, the sum over images and ignored masks differ"),
        (lambda b: {"seg_positions_N2": b.seg_positions_N2[1:]}, "masks, .SEG. positions"),
        (lambda b: {"ignored": b.ignored[1:]}, "masks, .SEG. positions"),
        (lambda b: {"masks_per_image": (3, 1, 1)}, "masks, .SEG. positions"),
        (lambda b: {"masks_per_image": (3, 1)}, "every image needs its number of masks"),
        (lambda b: {"patches_SK": b.patches_SK[1:]}, "11 patches, grids hold 12"),
        (lambda b: {"grids": b.grids[:2]}, "12 patches, grids hold 11"),
        (lambda b: {"point_seeds": (1,)}, "exactly one owner"),
        (lambda b: {"image_samples": (0, 1, 2, 3)}, "exactly one owner"),
        (lambda b: {"targets_M": b.targets_M[1:]}, "supervision differs"),
        (lambda b: {"branch_ids_BT": b.branch_ids_BT[:, 1:]}, "branch_ids_BT is"),
        (lambda b: {"position_ids_2BT": b.position_ids_2BT[:1]}, "1, 1"),
    ],
)
def test_a_batch_with_broken_counts_is_rejected(make_batch, examples, changes, message):
    batch = make_batch(examples)
    with pytest.raises(AssertionError, match=message):
        replace(batch, **changes(batch))


def test_batch_survives_transfer_from_a_worker(make_batch, examples):
    whole = np.ones((1, 1), dtype=bool)
    examples = [replace(e, ignored=(whole, *e.ignored[1:])) if i == 0 else e for i, e in enumerate(examples)]
    batch = make_batch(examples[:2], examples[2:])
    assert any(mask is None for mask in batch.ignored) and any(mask is not None for mask in batch.ignored)
    found = flat_batch.unflatten_batch(pickle.loads(pickle.dumps(flat_batch.flatten_batch(batch))))
    _assert_batches_equal(found, batch)
    assert {value.dtype for value in vars(batch).values() if isinstance(value, torch.Tensor)} > {torch.uint8}

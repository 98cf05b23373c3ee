"""Load balancing: the cost estimate of a sample, and equal work per rank."""

from itertools import islice

import numpy as np
import pytest
from counting import counted_operations
from test_packing import image_paths, make_mixture  # noqa: F401, fixtures

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.packing import PackedStream, PackingSettings
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.kernels import Kernels
from pixel_sail.planning.assumed import assumed_sample
from pixel_sail.planning.balance import SampleCost
from pixel_sail.planning.workload import of_batch, of_example
from pixel_sail.training.prepare import sample_cost
from pixel_sail.types import DataError

# Narrow layers, so that attention pairs and mask cells dominate the cost.
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "mask_stride": 2}


@pytest.fixture
def examples(processor, make_sample):
    rng = np.random.default_rng(0)
    kinds = (
        {"size_hw": (64, 48), "masks_per_turn": (2, 1)},
        {"size_hw": (64, 48), "masks_per_turn": (0,)},
        {"size_hw": None, "masks_per_turn": (0, 0)},
    )
    return [
        processor.encode_sample(*make_sample(rng, **kind), independent_turns=independent)
        for kind in kinds
        for independent in (False, True)
    ]


def test_the_work_of_a_sample_is_that_of_a_batch_of_it(examples, make_batch):
    for example in examples:
        assert of_example(example) == of_batch(make_batch([example]))


@pytest.mark.usefixtures("as_large_images")
def test_the_cost_is_the_work_in_tokens_of_layers_without_attention(tiny_model, examples, make_batch):
    model = tiny_model(**NARROW).train()
    model.use(Kernels())
    cost = SampleCost(architecture=model.config)
    layers = sum(weight.numel() for name, weight in model.decoder.layers.named_parameters() if weight.dim() == 2)
    assert all(cost(example) >= len(example) for example in examples)
    for example in examples[:4]:  # a text alone is so short that what every forward pass does once shows
        batch = make_batch([example])
        with counted_operations() as counter:
            model(**batch.training_inputs())
        counted = counter.get_total_flops() / (2 * layers)
        # The kernel also computes masked-out future tokens; the cost does not count them.
        assert cost(example) == pytest.approx(counted, rel=0.12)


def test_a_large_image_with_masks_weighs_more_than_its_tokens(examples, tiny_model):
    cost = SampleCost(architecture=tiny_model(**NARROW).config)
    with_masks, without, text = (cost(examples[index]) / len(examples[index]) for index in (0, 2, 4))
    assert with_masks > 1.5 * without > 1.5 * text > 1.5


def spread_of_work(mixture, processor, cost_of: SampleCost, balance: str) -> float:
    """Return the time of the slowest of eight streams relative to the mean, over the steps."""
    # Equal mean work per sequence in both modes: with more samples per sequence, costs would average out.
    budget = 400 if balance == "tokens" else 725
    settings = PackingSettings(seq_len=budget, balance=balance)
    cost = cost_of if balance == "flops" else len
    streams = [
        islice(PackedStream(mixture, processor, settings, index=stream, num_streams=8, cost=cost), 12)
        for stream in range(8)
    ]
    work = np.array([[sum(map(cost_of, sequence.examples)) for sequence in stream] for stream in streams])
    return float((work.max(0) / work.mean(0)).mean())


def test_ranks_wait_less_for_each_other_when_sequences_are_of_equal_work(make_mixture, processor, tiny_model):  # noqa: F811
    cost = SampleCost(architecture=tiny_model(**NARROW).config)
    mixture = make_mixture(lengths=(40,))
    by_tokens, by_work = (spread_of_work(mixture, processor, cost, balance) for balance in ("tokens", "flops"))
    assert by_work - 1 < 0.7 * (by_tokens - 1)


def test_an_unknown_balance_is_rejected():
    with pytest.raises(DataError, match=r"data\.packing\.balance: found 'time', expected tokens or flops"):
        PackingSettings(balance="time")


def test_the_figures_of_the_documentation():
    architecture = Architecture(
        vocab_size=151_680,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        mask_dim=512,
    )

    def per_token(image_hw, masks):
        sample = assumed_sample(architecture, image_hw, text_tokens=100, supervised=50, masks=masks)
        return SampleCost(architecture=architecture).of(sample) / sample.real_tokens

    found = [per_token(image_hw, masks) for image_hw in ((480, 640), (1024, 1024)) for masks in (0, 5)]
    assert found == pytest.approx([1.16, 1.28, 1.50, 1.62], abs=0.006)


def test_a_run_weighs_samples_as_configured():
    by_tokens, by_work = (
        load_config("train", TrainConfig, ["name=x", f"data.packing.balance={balance}"])
        for balance in ("tokens", "flops")
    )
    assert sample_cost(by_tokens) is len
    assert sample_cost(by_work) == SampleCost(architecture=by_work.model.architecture)

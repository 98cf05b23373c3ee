"""The data benchmark counts the model's FLOPs correctly, and runs on any configured data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import load_tool
from shared_data import SHARED_CONFIGS, shared_data
from torch.utils.flop_counter import FlopCounterMode

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.types import IGNORE_LABEL, Example

SAIL_0_5B = Architecture(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    mask_stride=4,
    mask_dim=512,
)


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "index_cache"))


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_data")


@pytest.fixture
def image_example(processor, make_sample):
    """An example as of a 640 x 480 image with 120 tokens of text, one mask and no answer."""
    sample, image = make_sample(np.random.default_rng(0))
    sampled = processor.encode_sample(sample, image, independent_turns=False)
    num_image, num_text = 1202, 120
    index = torch.arange(num_image + num_text)
    is_patch = (index >= 1) & (index < num_image - 1)
    return replace(
        sampled,
        input_ids_T=index,
        labels_T=torch.full_like(index, IGNORE_LABEL),
        branch_ids_T=(index >= num_image).long(),
        in_image_T=index < num_image,
        patch_index_T=torch.where(is_patch, index - 1, -1),
    )


def test_the_cost_of_an_image_agrees_with_a_calculation_by_hand(bench, image_example):
    def tera_products(example):
        return bench.forward_flops(SAIL_0_5B, [example], vocab_size=151_680) / 2e12

    assert isinstance(image_example, Example)
    without_mask = tera_products(replace(image_example, masks=()))
    answered = replace(image_example, labels_T=torch.where(image_example.in_image_T, IGNORE_LABEL, 1))
    # 0.473 linear layers, 0.0687 attention (0.075 if every token saw every other), 0.0008 patch embedding.
    assert without_mask == pytest.approx(0.473 + 0.0687 + 0.0008, abs=0.001)
    assert tera_products(image_example) - without_mask == pytest.approx(0.054, abs=0.001)
    assert tera_products(answered) - tera_products(image_example) == pytest.approx(0.0163, abs=0.0001)


def test_branches_do_not_see_each_other(bench, image_example):
    two = torch.where(image_example.in_image_T, 0, 1 + (torch.arange(len(image_example)) >= 1262).long())
    pairs = bench._seen_pairs(image_example), bench._seen_pairs(replace(image_example, branch_ids_T=two))
    assert pairs[0] - pairs[1] == 60 * 60


@pytest.mark.parametrize("mask_stride", [2, 4, 8])
def test_the_formula_counts_the_matrix_products_of_the_model(
    bench, tiny_model, processor, make_sample, make_batch, mask_stride
):
    model = tiny_model(mask_stride=mask_stride)
    sample, image = make_sample(np.random.default_rng(1), size_hw=(32, 40), masks_per_turn=(1, 2))
    example = processor.encode_sample(sample, image, independent_turns=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**make_batch([example]).model_inputs())
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    found = sum(flops for op, flops in counts.items() if "attention" not in op)
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * bench._seen_pairs(example)
    counted = bench.forward_flops(config, [example], vocab_size=config.vocab_size) - attention
    assert found == pytest.approx(counted, rel=0.01), counts


def test_the_fraction_of_a_step_is_worker_time_over_workers_plus_own_time(bench):
    stages = bench.Stages(annotation=1.0, image=4.0, tokens=5.0, num_turns=1.0, num_masks=1.0)
    sequences = bench.SequenceFigures(
        num_sequences=1, samples_per_sequence=6.0, tokens_per_sequence=8000.0, filled=0.97, forward_tflop=8.0
    )
    workers = bench.Workers(
        num_workers=2, samples_per_second=1.0, main_ms_per_sequence=1.5, private_mb=1.0, proportional_mb=1.0
    )
    cost = bench.data_fraction(stages, sequences, workers, num_workers=8, flop_rate=400e12)
    assert cost == pytest.approx({"worker_ms": 60.0, "data_ms": 9.0, "step_ms": 60.0, "fraction": 0.15})


def test_the_tool_measures_real_images(bench, tmp_path, capsys):
    shared_data("derived_gref_mini")
    shared_data("derived_refer_mini")
    arguments = ["--sequences", "2", "--samples", "2", "--processes", "1", "--json", str(tmp_path / "bench.json")]
    tokenizer = f"model.tokenizer={tmp_path / 'none'}"
    assert bench.main([*arguments, *SHARED_CONFIGS, "data=bench_images", tokenizer]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["data"] == ["gref_mini", "refer_mini"]
    assert figures["seq_len"] == 8192
    assert 0.5 < figures["sequences"]["filled"] <= 1.0
    assert figures["sequences"]["tokens_per_sequence"] == pytest.approx(figures["sequences"]["filled"] * 8192)
    assert 0 < figures["workers"]["private_mb"] <= figures["workers"]["proportional_mb"]
    output = capsys.readouterr().out
    assert "29 samples an epoch" in output
    assert "replaced by" in output


def test_without_arguments_the_tool_measures_the_synthetic_data(bench, data_root, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    # Only sizes that determine the run time; data and model are the tool's defaults.
    assert bench.main(["--sequences", "1", "--samples", "2", "--processes", "1"]) == 0
    output = capsys.readouterr().out
    assert "refshapes, " in output and "llava" in output
    assert "of 8192 tokens" in output and "replaced by" in output


def test_the_tool_takes_the_overrides_of_training(bench, data_root, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    arguments = ["--sequences", "1", "--samples", "2", "--processes", "1", "experiment=quickstart"]
    assert bench.main([*arguments, "data.packing.seq_len=700"]) == 0
    output = capsys.readouterr().out
    assert "of 700 tokens" in output
    assert "groupshapes, refshapes" in output


def test_wrong_input_ends_with_one_message(bench, tmp_path, capsys):
    assert bench.main(["data=refcoco", f"paths.data={tmp_path}"]) == 2
    assert "DataError" in capsys.readouterr().err
    assert bench.main(["data=none_such"]) == 2
    assert "ConfigError" in capsys.readouterr().err

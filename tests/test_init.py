"""`model.init`: initialization of the mask head and the distillation layers wherever they are new."""

import json
import logging
import zlib
from dataclasses import asdict

import pytest
import torch
from running import load_tool
from safetensors.torch import load_file
from synthetic_checkpoints import CHOSEN, make_base_tokenizer, write_qwen
from test_start import base, build, configured  # noqa: F401, a fixture and what makes the card small
from torch import nn

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.model import configuration_pixel_sail, upsampler
from pixel_sail.model.configuration_pixel_sail import UPSAMPLERS, Architecture
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.mask_head import INITS, MaskHead
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import differing_leaves, with_defaults
from pixel_sail.training.prepare import identity_defaults, run_identity

WIDE = {"hidden_size": 96, "num_attention_heads": 4, "mask_dim": 64, "mask_stride": 4}
"""Wider than `narrow` lets the upsampler be, so that there is a pre-projector; two blocks."""

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(configuration_pixel_sail, "MAX_FEATURE_SIZE", 64)


def init_head(init, seed=0, **changes):
    torch.manual_seed(seed)
    head = MaskHead(Architecture(**(WIDE | changes))).requires_grad_(False)
    head.init_weights(init)
    return head


def layers_of(head):
    return {name: layer for name, layer in head.named_modules() if isinstance(layer, LAYERS)}


def assert_uniform(values, bound):
    """Mean, spread and range of a uniform distribution from -bound to bound."""
    # Five standard deviations of a sample's mean; a standard deviation varies by 0.45 / sqrt(count) of itself.
    count = values.numel()
    assert values.abs().max() <= bound and values.abs().max() > bound * (1 - 20 / count)
    assert values.mean().item() == pytest.approx(0.0, abs=5 * bound / (3 * count) ** 0.5)
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=2.5 / count**0.5)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("design", UPSAMPLERS)
def test_torch_initializes_every_layer_as_torch_does_by_default(design):
    head = init_head("torch", upsampler=design)
    layers = layers_of(head)
    assert len(layers) == 6 + 2 * 3
    for name, layer in layers.items():
        # A transposed convolution takes the channels it gives for those it reads.
        fan_in = layer.weight[0].numel()
        assert_uniform(layer.weight, fan_in**-0.5)
        assert_uniform(layer.bias, fan_in**-0.5)
        fresh = type(layer)(**_arguments(layer))
        assert layer.weight.std().item() == pytest.approx(fresh.weight.std().item(), rel=0.1), name
    for block in head.upsampler.blocks:
        assert bool((block.norm.weight == 1).all()) and not block.norm.bias.any()


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    return {name: getattr(layer, name) for name in names}


def test_widths_of_the_two_inits_at_the_size_of_the_half_billion_model():
    found = {}
    for init in INITS:
        head = init_head(init, hidden_size=896, num_attention_heads=14, mask_dim=512)
        block = head.upsampler.blocks[0]
        if init == "ours":  # The structured part of the initialization.
            block.transposed.weight -= torch.eye(len(block.transposed.weight))[:, :, None, None]
            block.depthwise.weight[:, :, 1, 1] -= 1.0
        layers = (block.transposed, block.depthwise, head.pixel_projector[0], head.pixel_projector[2])
        found[init] = [layer.weight.std().item() for layer in layers]
    assert found["ours"] == pytest.approx([0.00334, 0.0333, 0.0334, 0.0070], rel=0.02)
    assert found["torch"] == pytest.approx([0.0096, 0.192, 0.0193, 0.0193], rel=0.02)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("init", INITS)
def test_upsample_blocks_start_equal_as_torch_and_different_as_ours(init):
    blocks = init_head(init, mask_stride=2).upsampler.blocks
    assert len(blocks) == 3
    first = blocks[0].state_dict()
    for block in blocks[1:]:
        for name, value in block.state_dict().items():
            # Norms and our biases are constants in every block.
            constant = init == "ours" and value.unique().numel() == 1
            assert torch.equal(value, first[name]) == (init == "torch" or "norm" in name or constant), name
            assert value.data_ptr() != first[name].data_ptr(), "one parameter for two blocks"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("design", ["transposed", "pixel_shuffle"])
def test_the_upsampler_starts_as_a_repetition_of_its_input(design, monkeypatch):
    monkeypatch.setattr(upsampler, "START_NOISE", 0.0)
    block = init_head("ours", upsampler=design).upsampler.blocks[0]
    states = torch.randn(2, 64, 5, 7)
    repeated = states.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(block.upsample(states), repeated)
    mixed = block.pointwise(block.depthwise(torch.nn.functional.gelu(repeated)))
    assert torch.allclose(mixed, torch.nn.functional.gelu(repeated))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("design", UPSAMPLERS)
def test_the_first_map_encodes_cell_positions_as_ours_but_not_as_torch(design):
    # Every patch has a random state; one linear layer must predict the column of a cell from it.
    found = {}
    for init in INITS:
        head = init_head(init, upsampler=design)
        torch.manual_seed(1)
        map_NC = head.upsampler(torch.randn(1, 64, 8, 8)).permute(0, 2, 3, 1).flatten(0, 2)
        columns_N = torch.arange(32).repeat(32) // 4
        target_N8 = torch.nn.functional.one_hot(columns_N, 8).float()
        read_N8 = map_NC @ torch.linalg.lstsq(map_NC, target_N8).solution
        found[init] = (read_N8.argmax(1) == columns_N).float().mean().item()
    assert found["ours"] > 0.9, found
    if design != "bilinear":  # Interpolation keeps the four cells alike for all weights.
        assert found["ours"] > found["torch"] + 0.1, found


TEACHERS = {
    "map": TeacherSettings(model=None, site="pixel_map", channels=300),
    "states": TeacherSettings(model=None, site="patch_states", channels=200),
}


def fresh_model(data_root, init, seed=1):
    overrides = [] if init is None else [f"model.init={init}"]
    config = configured(data_root, "model.init_from=null", *overrides)
    return build_model(config.model, seed=seed, teachers=TEACHERS)[0].state_dict()


def test_a_run_initializes_only_its_mask_head_and_teacher_layers_as_configured(data_root):
    plain, ours, as_torch = (fresh_model(data_root, init) for init in (None, *INITS))
    assert all(torch.equal(plain[name], ours[name]) for name in plain), "ours is the default"
    changed = {name for name in ours if not torch.equal(ours[name], as_torch[name])}
    heads = {name for name in ours if name.startswith(("mask_head.", "distill_head.")) and ".norm." not in name}
    assert changed == heads
    again, other = fresh_model(data_root, "torch"), fresh_model(data_root, "torch", seed=2)
    assert all(torch.equal(again[name], as_torch[name]) for name in again)
    assert all(not torch.equal(other[name], as_torch[name]) for name in heads)


def test_a_teacher_that_was_renamed_keeps_its_layers_and_their_random_numbers(tiny_model):
    """Checkpoints from before the rename contain the layer, and equal seeds gave equal weights."""
    model = tiny_model()
    model.add_distill_head({"attribute_states": DistillSite(site="patch_states", channels=43)}, seed=5)
    layers = dict(model.distill_head.named_parameters())
    assert list(layers) == ["drawn_states_distill_linear.weight", "drawn_states_distill_linear.bias"]
    generator = torch.Generator().manual_seed(zlib.crc32(b"drawn_states", 5))
    weight = layers["drawn_states_distill_linear.weight"]
    expected = torch.normal(0.0, weight.shape[1] ** -0.5, weight.shape, generator=generator)
    assert torch.allclose(weight, expected, rtol=1e-5, atol=0)


def test_layers_towards_teachers_are_initialized_as_torch_initializes_linear_layers(data_root):
    found = fresh_model(data_root, "torch")
    for name, width in (("map", 512), ("states", 32)):
        for part in ("weight", "bias"):
            assert_uniform(found[f"distill_head.{name}_distill_linear.{part}"], width**-0.5)
    ours = fresh_model(data_root, "ours")
    assert not ours["distill_head.states_distill_linear.bias"].any()


def test_a_newly_initialized_part_follows_the_setting_and_a_loaded_one_does_not(data_root, base, caplog):  # noqa: F811
    start = load_file(f"{base}/model.safetensors")
    with caplog.at_level(logging.INFO):
        taken = build(configured(data_root, f"model.init_from={base}", "model.init=torch")).state_dict()
    assert "all weights are taken, model.init=torch initializes none of them" in caplog.text
    assert all(torch.equal(taken[name], value) for name, value in start.items())
    overrides = (f"model.init_from={base}", "model.architecture.mask_stride=2")
    initialized = {init: build(configured(data_root, *overrides, f"model.init={init}")).state_dict() for init in INITS}
    for name in ("transposed", "depthwise", "pointwise"):
        first, last = (initialized["torch"][f"mask_head.upsampler.blocks.{i}.{name}.weight"] for i in (0, 2))
        assert torch.equal(first, last)
        assert not torch.equal(first, initialized["ours"][f"mask_head.upsampler.blocks.0.{name}.weight"])
    assert_uniform(initialized["torch"]["mask_head.pixel_projector.2.weight"], 32**-0.5)
    assert all(
        torch.equal(initialized["torch"][name], value) for name, value in start.items() if "mask_head" not in name
    )


def test_a_converted_start_has_the_requested_mask_head(tmp_path):
    qwen = write_qwen(tmp_path / "qwen", make_base_tokenizer())
    tool, weights = load_tool("convert_checkpoint"), {}
    sizes = ("--patch-size", str(CHOSEN.patch_size), "--mask-stride", "2", "--mask-dim", "64")
    for init in INITS:
        arguments = ["--from", "qwen2", "--to", str(tmp_path / init), *sizes, "--init", init, str(qwen)]
        assert tool.main(arguments) == 0
        weights[init] = load_file(tmp_path / init / "model.safetensors")
        assert json.loads((tmp_path / init / "conversion.json").read_text())["init"] == init
    alike = {name for name, value in weights["ours"].items() if torch.equal(value, weights["torch"][name])}
    norms = {name for name in alike if name.startswith("mask_head.")}
    assert all(".norm." in name for name in norms)
    assert {name for name in weights["ours"] if not name.startswith("mask_head.")} <= alike
    width = weights["torch"]["mask_head.seg_projector.0.weight"].shape[1]
    assert_uniform(weights["torch"]["mask_head.seg_projector.0.weight"], width**-0.5)
    first, second = (weights["torch"][f"mask_head.upsampler.blocks.{i}.transposed.weight"] for i in range(2))
    assert torch.equal(first, second)


def test_a_run_older_than_the_setting_resumes_with_our_init(data_root):
    for init in INITS:
        config = configured(data_root, f"model.init={init}")
        old = run_identity(asdict(config))
        del old["model"]["init"]
        then, now = (with_defaults(own, identity_defaults(config)) for own in (old, run_identity(asdict(config))))
        assert dict(differing_leaves(then, now)) == ({} if init == "ours" else {"model.init": ("ours", "torch")})


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.init is 'xavier', expected one of \('ours', 'torch'\)"):
        load_config("train", TrainConfig, ["name=x", "model.init=xavier"])

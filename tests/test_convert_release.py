"""The release's layout is converted to ours and back bit-exactly; what the release computes differently is not
exported."""

import json
import re
import shutil

import pytest
import torch
from running import load_tool
from safetensors.torch import load_file, save_file
from shared_data import parity_folder
from synthetic_checkpoints import (
    BASE_TOKENS,
    CHOSEN,
    convert,
    eve_key,
    make_base_tokenizer,
    other_tokenizer,
    release_checkpoint,
    save_tokenizer,
    text_logits,
    text_model,
    write_qwen,
)
from test_parity import _released_name
from transformers import Qwen2Config, Qwen2ForCausalLM

from pixel_sail.conversion import sources
from pixel_sail.conversion.convert import expected_shapes, plan_to_ours, plan_to_release, to_ours, to_release
from pixel_sail.conversion.layouts import LAYOUTS, released_key
from pixel_sail.conversion.released_limits import check_released
from pixel_sail.conversion.sizes import COPIED_SIZES, Chosen
from pixel_sail.conversion.sources import open_source
from pixel_sail.conversion.vocabulary import release_orders
from pixel_sail.model import configuration_pixel_sail
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.convert import our_key
from pixel_sail.model.modeling_pixel_sail import load_model
from pixel_sail.types import DataError

RELEASED = Chosen(num_visual_prompts=2)
"""The rest is in the checkpoint."""


@pytest.fixture(scope="session")
def base_tokenizer():
    return make_base_tokenizer()


@pytest.fixture(scope="session")
def qwen(base_tokenizer, tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"), base_tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", [0, 1])
def test_the_release_comes_back_bit_for_bit(tied, order, base_tokenizer, make_config, tmp_path):
    prompts = 2 if order == 0 else 0
    state, tokenizer = release_checkpoint(
        tmp_path,
        base_tokenizer,
        make_config,
        release_orders(2)[order],
        tie_word_embeddings=tied,
        num_visual_prompts=prompts,
    )
    torch.save({"state_dict": state, "meta": {"iter": 7}}, tmp_path / "iter_7.pth")
    convert(tmp_path / "iter_7.pth", "release", tmp_path / "ours", base=tmp_path / "base", chosen=RELEASED)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    seg = load_model(tmp_path / "ours").config.token_ids["[SEG]"]
    assert seg == tokenizer.get_vocab()["[SEG]"]
    assert torch.equal(ours["embed_tokens.weight"][seg], state["single_transformer.model.embed_tokens.weight"][seg])
    to_release(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    back = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(file)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == torch.bfloat16 for key in state)


@pytest.mark.parametrize("name", ["p16_tied", "p32_untied"])
def test_the_recorded_release_comes_back_bit_for_bit(name):
    folder = parity_folder(name)
    config = json.loads((folder / "config.json").read_text())
    tokens = config["special_tokens"]
    tool = load_tool("check_parity")
    stride = max(1, -(-config["patch_size"] // 2 ** config["upsample_blocks"]))
    architecture = Architecture(
        **{field: config[field] for field in tool.RECORDED_SIZES},
        mask_stride=stride,
        num_visual_prompts=config["num_visual_prompts"],
        token_ids=tokens,
    )
    source = open_source(folder / "reference_state.safetensors")
    there = plan_to_ours(source, LAYOUTS["release"], architecture, source_tokens=tokens, target_tokens=tokens, seed=0)
    ours = {write.name: write.make() for write in there.writes}
    assert ours.keys() == load_tool("check_parity").load_reference(folder, False).state_dict().keys() - (
        {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    )
    middle = sources.LoadedSource(folder, ours)
    rows = config["vocab_size"]
    plan = plan_to_release(middle, architecture, source_tokens=tokens, target_tokens=tokens, target_rows=rows)
    back = {write.name: write.make() for write in plan.writes}
    reference = load_file(folder / "reference_state.safetensors")
    if config["tie_word_embeddings"]:
        head = back.pop("single_transformer.lm_head.weight")
        assert torch.equal(head, reference["single_transformer.model.embed_tokens.weight"])
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[key], reference[key]) for key in reference)


def test_every_name_goes_to_the_release_and_back(tiny_model):
    for name in tiny_model(mask_stride=2).state_dict():
        assert released_key(name, base="sail") == _released_name(name)
        assert our_key(released_key(name, base="sail")) == name


def test_an_export_comes_back_with_equal_logits(qwen, base_tokenizer, tmp_path):
    convert(qwen, "qwen2", tmp_path / "base", shard_bytes=30_000)
    before = load_model(tmp_path / "base")
    # Two blocks, as the release builds them for patches of 8.
    stride2 = Chosen(**(vars(CHOSEN) | {"mask_stride": 2}))
    to_ours(qwen, "qwen2", tmp_path / "ours", base=qwen, chosen=stride2)
    to_release(tmp_path / "ours", tmp_path / "released")
    qwen_config = tmp_path / "released" / "config.json"
    shutil.copy(qwen / "config.json", qwen_config)
    # The release appends the prompt that is never used when it starts.
    convert(tmp_path / "released", "release", tmp_path / "again", chosen=RELEASED)
    again = load_model(tmp_path / "again")
    ids = torch.randint(0, BASE_TOKENS, (1, 11))
    # The text heads differ in rows, so rounding may differ.
    found, expected = (text_logits(own, ids)[..., :BASE_TOKENS] for own in (again, before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_wrong_tokenizer_of_a_release_is_noticed(base_tokenizer, make_config, tmp_path):
    state, _ = release_checkpoint(tmp_path, base_tokenizer, make_config, release_orders(2)[0], num_visual_prompts=2)
    save_file(state, tmp_path / "state.safetensors")
    other_tokenizer(tmp_path / "base")
    with pytest.raises(DataError, match=r"the release appends one of \[1, 0, 2\].*use the tokenizer of the base"):
        convert(tmp_path / "state.safetensors", "release", tmp_path / "ours", base=tmp_path / "base", chosen=RELEASED)


def write_release(folder, base_tokenizer, make_config, order, **changes):
    """Write a random checkpoint of the release and its base; return its state and the tokenizer it was trained with."""
    state, tokenizer = release_checkpoint(folder, base_tokenizer, make_config, order, **changes)
    save_file(state, folder / "state.safetensors")
    return state, tokenizer


def convert_release(folder, prompts=2):
    chosen = Chosen(num_visual_prompts=prompts)
    return convert(folder / "state.safetensors", "release", folder / "ours", base=folder / "base", chosen=chosen)


def test_a_tokenizer_without_seg_is_rejected_although_it_has_a_token_for_every_row(
    base_tokenizer, make_config, tmp_path
):
    _, right = write_release(tmp_path, base_tokenizer, make_config, release_orders(2)[0], num_visual_prompts=2)
    wrong = base_tokenizer.from_pretrained(tmp_path / "base")
    wrong.add_tokens([f"another{i}" for i in range(len(right) - len(wrong))])
    assert len(wrong) == len(right)
    wrong.save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match=r"without \['\[SEG\]', '<p>', '</p>'\] for an embedding of 286 rows"):
        convert_release(tmp_path)
    assert not (tmp_path / "ours").exists()
    right.save_pretrained(tmp_path / "base")
    convert_release(tmp_path)


def test_weights_for_prompts_are_dropped_only_where_there_are_no_prompts(base_tokenizer, make_config, tmp_path):
    # Like the release that was trained on masks only, which also has vp_embed.
    state, tokenizer = write_release(tmp_path, base_tokenizer, make_config, release_orders(2)[1], num_visual_prompts=0)
    projection = {"single_transformer.model.vp_embed.weight": torch.ones(32, 32).bfloat16()}
    save_file(state | projection, tmp_path / "state.safetensors")
    with pytest.raises(DataError, match=r"vp_embed in the checkpoint and no <Prompt0> among its 283 tokens.*prompts 0"):
        convert_release(tmp_path)
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match="no <Prompt0>"):
        convert_release(tmp_path)
    done = convert_release(tmp_path, prompts=0)
    assert "dropped because the model has no visual prompts" in {entry.note for entry in done.plan.entries}
    assert load_model(tmp_path / "ours").config.num_visual_prompts == 0


def test_a_tokenizer_with_a_prompt_missing_in_between_is_rejected(base_tokenizer, make_config, tmp_path):
    order = tuple("<Prompt7>" if token == "<Prompt0>" else token for token in release_orders(2)[0])
    _, tokenizer = write_release(tmp_path, base_tokenizer, make_config, order, num_visual_prompts=2)
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match=r"prompts \['<Prompt1>', '<Prompt7>'\], expected \['<Prompt0>', '<Prompt1>'\]"):
        convert_release(tmp_path)


EVE = {"base": "eve", "attention": "causal", "mask_stride": 2, "patch_hidden_size": 12}
"""The tiny model, but with patches of 8 and two upsampling blocks."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "causal"}, "attention 'causal', expected 'prefix'"),
        ({"attention_bias": False}, "attention_bias False, expected True"),
        ({"visual_prompts": "pooled"}, "visual_prompts 'pooled', expected 'injection'"),
        ({"visual_prompts": "off"}, "visual_prompts 'off', expected 'injection'"),
        ({"prompt_projection": False}, "prompt_projection False, expected True"),
        ({"upsampler": "bilinear"}, "upsampler 'bilinear', expected 'transposed'"),
        ({"upsampler": "pixel_shuffle"}, "upsampler 'pixel_shuffle', expected 'transposed'"),
        ({"mask_stride": 4}, "num_upsample_blocks 1, expected 2"),
        (EVE, "hidden_size 32, expected '> 32'"),
        (EVE | {"mask_stride": 8}, "num_upsample_blocks 0, expected 1"),
        (EVE | {"upsampler": "bilinear"}, "upsampler 'bilinear', expected 'transposed'"),
        (EVE | {"attention_bias": False}, "attention_bias False, expected True"),
    ],
)
def test_a_model_that_the_release_computes_differently_is_not_exported_to_it(
    changes, message, make_config, tokenizer, tmp_path
):
    check_released(tmp_path, make_config(mask_stride=2))
    check_released(tmp_path, make_config(mask_stride=2, num_visual_prompts=0, visual_prompts="off"))
    config = make_config(**({"mask_stride": 2} | changes))
    config.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    save_file(
        {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()},
        tmp_path / "ours" / "a.safetensors",
    )
    with pytest.raises(DataError, match=f"{re.escape(message)} .*the released code supports nothing else"):
        to_release(tmp_path / "ours", tmp_path / "released")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def released_eve_name(name):
    """Written down independently of the table under test, as is `eve_key`."""
    own = eve_key(name)
    return f"single_transformer.{own}" if own != name or name.startswith("lm_head") else _released_name(name)


@pytest.mark.parametrize("parts", [["self_attn", "layernorm", "mlp"], ["mlp"], []], ids="-".join)
@pytest.mark.parametrize("mask_stride", [2, 4])
def test_a_released_eve_model_comes_back_bit_for_bit(
    parts, mask_stride, base_tokenizer, make_config, tmp_path, monkeypatch
):
    # So that a tiny model has the projection before the upsampler that the released one always has.
    monkeypatch.setattr(configuration_pixel_sail, "MAX_FEATURE_SIZE", 16)
    base = text_model(Qwen2ForCausalLM, Qwen2Config)
    save_tokenizer(base_tokenizer, tmp_path / "base")
    base.config.save_pretrained(tmp_path / "base")
    tokens = [token for token in release_orders(2)[0] if token not in base_tokenizer.get_vocab()]
    sizes = {name: getattr(base.config, name) for name in COPIED_SIZES} | {"vocab_size": BASE_TOKENS + len(tokens)}
    config = make_config(**(sizes | EVE | {"mask_stride": mask_stride, "modality_experts": parts}))
    generator = torch.Generator().manual_seed(3)
    shapes = {released_eve_name(name): shape for name, shape in expected_shapes(config).items()}
    assert "image_feature_pre_projector.0.weight" in shapes
    assert "single_transformer.model.vision_tower.split_embedding" in shapes
    assert ("single_transformer.model.layers.1.moe_mlp.up_proj.weight" in shapes) == ("mlp" in parts)
    state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    unused = {"single_transformer.vp_embed.weight": torch.ones(32, 32).bfloat16()}
    save_file(state | unused, tmp_path / "state.safetensors")
    convert_release(tmp_path)
    ours = load_model(tmp_path / "ours").config
    assert {name: getattr(ours, name) for name in EVE} == EVE | {"mask_stride": mask_stride}
    assert (ours.modality_experts, ours.max_long_side, ours.num_visual_prompts) == (parts, 800, 2)
    done = to_release(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state.items())
    # Patches of 8: one block is added to the halvings down to this ratio.
    assert f"seg_pred_down_ratio={2 * mask_stride}, and its base with moe_part={parts}" in done.remarks[0]

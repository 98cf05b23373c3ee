"""Checkpoints of other layouts become ours and go back without losing a bit, and what does not fit leaves nothing."""

import json
import pickle
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from running import load_tool
from safetensors.torch import load_file, save_file
from shared_data import parity_folder
from test_parity import _released_name
from tokenizers import AddedToken
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pixel_sail.config import ModelConfig
from pixel_sail.conversion import sources, writer
from pixel_sail.conversion.layouts import LAYOUTS, released_key
from pixel_sail.conversion.plan import Rows
from pixel_sail.conversion.roads import expected_shapes, plan_to_ours, plan_to_release, to_ours, to_release
from pixel_sail.conversion.sizes import COPIED_SIZES, Chosen
from pixel_sail.conversion.sources import open_source
from pixel_sail.conversion.vocabulary import release_orders
from pixel_sail.conversion.writer import shards_of, tensor_hash
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.convert import TOKEN_ROWS, our_key
from pixel_sail.model.modeling_pixel_sail import load_model
from pixel_sail.model.tokenization import load_tokenizer, train_tokenizer
from pixel_sail.training.build import build_model
from pixel_sail.types import DataError

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CHOSEN = Chosen(patch_size=8, mask_stride=4, mask_dim=16, num_visual_prompts=2)
BASE_TOKENS = 280


@pytest.fixture(scope="session")
def base_tokenizer():
    """A tokenizer without the tokens of phrases, masks and prompts, as a base has it."""
    full = train_tokenizer([], vocab_size=270, num_visual_prompts=0)
    model = json.loads(full.backend_tokenizer.to_str())
    late = ("[SEG]", "<p>", "</p>")
    model["added_tokens"] = [token for token in model["added_tokens"] if token["content"] not in late]
    kept = [token for token in sorted(model["model"]["vocab"], key=model["model"]["vocab"].get) if token not in late]
    model["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    for token in model["added_tokens"]:
        token["id"] = model["model"]["vocab"][token["content"]]
    tokenizer = type(full)(tokenizer_object=type(full.backend_tokenizer).from_str(json.dumps(model)))
    tokenizer.add_tokens([f"word{i}" for i in range(BASE_TOKENS - len(tokenizer))])
    return tokenizer


def text_model(kind, config_kind, **changes):
    torch.manual_seed(1)
    model = kind(config_kind(**(DECODER | {"vocab_size": BASE_TOKENS + 8} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def save_base(folder, model, tokenizer, **arguments):
    model.save_pretrained(folder, **arguments)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(base_tokenizer, tmp_path_factory):
    """A random Qwen2 checkpoint of several shards."""
    model = text_model(Qwen2ForCausalLM, Qwen2Config)
    return save_base(tmp_path_factory.mktemp("qwen"), model, base_tokenizer, max_shard_size="20KB")


@pytest.fixture
def damaged(qwen, tmp_path):
    return Path(shutil.copytree(qwen, tmp_path / "damaged"))


def text_logits(model, ids):
    count = torch.arange(ids.shape[1]).expand_as(ids)
    none = torch.full_like(ids, -1)
    with torch.no_grad():
        return model(
            ids,
            torch.stack([count, count]),
            torch.zeros_like(ids),
            torch.zeros_like(ids),
            torch.zeros_like(ids, dtype=torch.bool),
            none,
            none,
            torch.zeros(0, 3 * model.config.patch_size**2),
        ).logits


def convert(source, layout, folder, **changes):
    return to_ours(source, layout, folder, base=changes.pop("base", source), chosen=CHOSEN, **changes)


@pytest.mark.parametrize(
    ("layout", "kind", "config_kind", "tied"),
    [
        ("qwen2", Qwen2ForCausalLM, Qwen2Config, False),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config, True),
        ("solo", MistralForCausalLM, MistralConfig, False),
    ],
)
def test_text_logits_of_a_converted_base_are_unchanged(layout, kind, config_kind, tied, base_tokenizer, tmp_path):
    theirs = text_model(kind, config_kind, tie_word_embeddings=tied)
    source = save_base(tmp_path / "base", theirs, base_tokenizer)
    patches = torch.randn(32, 3 * 8 * 8)
    if layout == "solo":
        state = load_file(source / "model.safetensors") | {"model.embed_vision_patch.weight": patches}
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, layout, tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    ids = torch.randint(0, BASE_TOKENS, (2, 19))
    with torch.no_grad():
        expected = theirs(ids).logits[..., :BASE_TOKENS]
    found = text_logits(ours, ids)[..., :BASE_TOKENS]
    assert (found - expected).abs().max() < 1e-5
    assert ours.config.attention_bias == (layout == "qwen2")
    assert ours.config.attention == "prefix"
    causal = to_ours(
        source, layout, tmp_path / "causal", base=source, chosen=Chosen(**(vars(CHOSEN) | {"attention": "causal"}))
    )
    assert load_model(tmp_path / "causal").config.attention == "causal"
    assert any("attention is causal" in remark for remark in causal.remarks) == (layout == "solo")
    if layout == "solo":
        assert torch.equal(ours.patch_embedding.patch_projection.weight, patches)
    tokenizer = load_tokenizer(tmp_path / "ours", num_visual_prompts=2)
    assert ours.config.token_ids["[SEG]"] == tokenizer.get_vocab()["[SEG]"] == BASE_TOKENS


EVE_KEYS = (
    (r"decoder\.layers\.(\d+)\.image\.self_attn\.(.+)", r"model.layers.\1.self_attn.moe_\2"),
    (r"decoder\.layers\.(\d+)\.image\.(.+)", r"model.layers.\1.moe_\2"),
    (r"decoder\.(.+)", r"model.\1"),
    (r"embed_tokens\.(.+)", r"model.embed_tokens.\1"),
    (r"patch_embedding\.piece_projection\.(.+)", r"model.vision_tower.patch_embedding.0.\1"),
    (r"patch_embedding\.patch_projection\.(.+)", r"model.vision_tower.patch_embedding.2.\1"),
    (r"patch_embedding\.class_embedding", "model.vision_tower.class_embedding"),
    (r"patch_embedding\.row_end_embedding", "model.vision_tower.split_embedding"),
)
"""Ours -> the published base."""


@pytest.mark.parametrize("parts", [["self_attn", "layernorm", "mlp"], ["mlp"], []], ids="-".join)
def test_an_evev2_base_keeps_every_weight_and_shows_its_own_sizes(parts, base_tokenizer, make_config, tmp_path):
    base = text_model(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False)
    save_tokenizer(base_tokenizer, tmp_path / "eve")
    base.config.save_pretrained(tmp_path / "eve")
    sizes = {name: getattr(base.config, name) for name in COPIED_SIZES} | {"vocab_size": base.config.vocab_size}
    eve = {"base": "eve", "attention": "causal", "modality_experts": parts, "patch_size": 8, "patch_hidden_size": 12}
    shapes = expected_shapes(make_config(**sizes, **eve))
    generator = torch.Generator().manual_seed(3)
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items() if not n.startswith("mask_head")}
    state = {
        next((re.sub(own, key, name) for own, key in EVE_KEYS if re.fullmatch(own, name)), name): tensor
        for name, tensor in weights.items()
    }
    assert ("model.layers.1.moe_mlp.up_proj.weight" in state) == ("mlp" in parts)
    save_file(state, tmp_path / "eve" / "model.safetensors")
    convert(tmp_path / "eve", "evev2", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert {name: getattr(model.config, name) for name in eve} == eve
    ours = model.state_dict()
    for name, tensor in weights.items():
        found = ours[name][: len(tensor)] if name in TOKEN_ROWS else ours[name]
        known = BASE_TOKENS if name in TOKEN_ROWS else len(tensor)
        assert torch.equal(found[:known], tensor[:known]), name


def test_training_starts_from_a_converted_base(qwen, tmp_path):
    convert(qwen, "qwen2", tmp_path / "ours")
    sizes = {field: getattr(CHOSEN, field) for field in ("patch_size", "mask_stride", "mask_dim", "num_visual_prompts")}
    architecture = Architecture(**DECODER, **sizes, rope_theta=Qwen2Config().rope_parameters["rope_theta"])
    config = ModelConfig(tokenizer=str(tmp_path / "ours"), init_from=str(tmp_path / "ours"), architecture=architecture)
    model, processor = build_model(config, seed=5, experts={})
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert processor.seg_id == BASE_TOKENS
    assert all(torch.equal(model.state_dict()[name], value) for name, value in written.items())


def test_what_a_text_base_lacks_is_drawn_from_the_seed(qwen, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        to_ours(qwen, "qwen2", tmp_path / name, base=qwen, chosen=Chosen(**(vars(CHOSEN) | {"seed": seed})))
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    seg = BASE_TOKENS
    for key, rows in (("patch_embedding.patch_projection.weight", slice(None)), ("embed_tokens.weight", [seg])):
        assert not torch.equal(a[key][rows], c[key][rows])
        assert a[key][rows].std().item() == pytest.approx(0.2, rel=0.4)
    assert torch.equal(a["embed_tokens.weight"][:seg], c["embed_tokens.weight"][:seg])
    report = json.loads((tmp_path / "a" / "conversion.json").read_text())
    entries = {entry["target"]: entry for entry in report["entries"]}
    assert entries["mask_head.seg_projector.0.bias"]["note"] == "initialised because the base has no mask head"
    assert entries["decoder.norm.weight"]["source"] == "model.norm.weight"
    assert entries.keys() == a.keys()
    assert all(entry["sha256"] == tensor_hash(a[name]) for name, entry in entries.items())


def release_checkpoint(folder, base_tokenizer, make_config, order, **changes):
    """Write a random checkpoint in the release's layout with its base folder; return its state."""
    tokenizer = base_tokenizer.from_pretrained(save_tokenizer(base_tokenizer, folder / "base"))
    missing = [token for token in order if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in missing], special_tokens=True)
    config = make_config(vocab_size=len(tokenizer), mask_stride=2, token_ids={}, **changes)
    model = text_model(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=config.tie_word_embeddings)
    model.config.save_pretrained(folder / "base")
    shapes = expected_shapes(config)
    generator = torch.Generator().manual_seed(3)
    state = {_released_name(n): torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    if config.tie_word_embeddings:
        state["single_transformer.lm_head.weight"] = state["single_transformer.model.embed_tokens.weight"].clone()
    return state, tokenizer


def save_tokenizer(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


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
    convert(tmp_path / "iter_7.pth", "release", tmp_path / "ours", base=tmp_path / "base")
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
        **{field: config[field] for field in tool.COPIED_SIZES},
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
        assert released_key(name) == _released_name(name)
        assert our_key(released_key(name)) == name


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
    convert(tmp_path / "released", "release", tmp_path / "again")
    again = load_model(tmp_path / "again")
    ids = torch.randint(0, BASE_TOKENS, (1, 11))
    assert torch.equal(text_logits(before, ids)[..., :BASE_TOKENS], text_logits(again, ids)[..., :BASE_TOKENS])


def zero_pieces(state, stage, world):
    """Return the flat tensors of every rank, made the slow way."""
    if stage == 2:
        row = torch.cat([value.flatten() for value in state.values()])
        padding = -len(row) % (2 * world)
        parts = torch.cat([row, torch.zeros(padding)]).chunk(world)
        # As DeepSpeed stores them: the padding of the last rank is cut off.
        return [[part[: len(part) - padding] if rank == world - 1 else part] for rank, part in enumerate(parts)]
    ranks = [[] for _ in range(world)]
    for value in state.values():
        padded = torch.cat([value.flatten(), torch.zeros(-value.numel() % world)])
        for rank, part in enumerate(padded.chunk(world)):
            ranks[rank].append(part)
    # Two sub-groups that end within a parameter.
    flat = [torch.cat(parts) for parts in ranks]
    return [[own[:7], own[7:]] for own in flat]


def write_zero(folder, state, stage, world):
    folder.mkdir()
    (folder / "latest").write_text("global_step7")
    step = folder / "global_step7"
    step.mkdir()
    shapes = [{name: value.shape for name, value in state.items()}]
    for rank, flat in enumerate(zero_pieces(state, stage, world)):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": stage, "partition_count": world, key: [part.clone() for part in flat]}
        torch.save({"optimizer_state_dict": optimizer}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {"module": {}, "param_shapes": shapes, "shared_params": {}, "buffer_names": []}
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        if stage == 3 or rank == 0:
            torch.save(model, step / name)
    return step


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_a_zero_folder_is_put_together(stage, world, tmp_path):
    rng = np.random.default_rng(0)
    state = {
        name: torch.from_numpy(rng.standard_normal(shape, dtype="float32"))
        for name, shape in {"a.weight": (5, 3), "b.bias": (4,), "c.weight": (2, 2, 2), "d.bias": (1,)}.items()
    }
    step = write_zero(tmp_path / "zero", state, stage, world)
    source = open_source(tmp_path / "zero")
    assert {name: source.infos[name].shape for name in state} == {name: tuple(t.shape) for name, t in state.items()}
    assert all(torch.equal(source.read(name), state[name]) for name in state)
    shutil.copy(next(step.glob("*_rank_0_*optim_states.pt")), step / f"zero_pp_rank_{world}_mp_rank_00_optim_states.pt")
    with pytest.raises(DataError, match=rf"expected those of 0 .. {world - 1}"):
        open_source(tmp_path / "zero")


def test_a_zero_folder_without_a_shard_is_refused(tmp_path):
    step = write_zero(tmp_path / "zero", {"a": torch.ones(9)}, 2, 3)
    next(step.glob("*_rank_1_*")).unlink()
    with pytest.raises(DataError, match=r"ranks \[0, 2\], expected those of 0 .. 2"):
        open_source(tmp_path / "zero")


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_stores_beside_the_weights_is_let_through_as_dead_data(stage, tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    step = write_zero(tmp_path / "zero", {"a": torch.arange(9.0)}, stage, 2)
    for file in step.glob("*optim_states.pt"):
        content = torch.load(file, weights_only=True)
        content["optimizer_state_dict"] |= {
            "zero_stage": ZeroStageEnum(stage),
            "loss_scaler": LossScaler(1.0),
            "param_slice_mappings": [{"a": fragment_address(numel=5, start=0)}],
        }
        torch.save(content, file)
    assert torch.equal(open_source(tmp_path / "zero").read("a"), torch.arange(9.0))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "it_was_run"
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": Malicious(trace)}, tmp_path / "bad.pth")
    with pytest.raises(
        DataError, match=r"bad\.pth: found a request for .*pathlib\.PosixPath.*expected tensors and plain data"
    ):
        open_source(tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(DataError, match=r"plain\.pth"):
        open_source(tmp_path / "plain.pth")
    assert not trace.exists()


def shard(folder, number=0):
    return sorted(folder.glob("*.safetensors"))[number]


def rewrite(change):
    def apply(folder):
        path = shard(folder)
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def edit_json(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def add_key(folder):
    path = shard(folder)
    save_file(load_file(path) | {"model.visual.weight": torch.ones(3)}, path)
    edit_json(sources.INDEX, lambda index: index["weight_map"].update({"model.visual.weight": path.name}))(folder)


def drop_key(folder):
    path = shard(folder, -1)
    state = load_file(path)
    name = sorted(state)[-1]
    del state[name]
    save_file(state, path)
    edit_json(sources.INDEX, lambda index: index["weight_map"].pop(name))(folder)


def other_tokenizer(folder):
    tokenizer = train_tokenizer([], vocab_size=320, num_visual_prompts=15)
    tokenizer.add_tokens([f"other{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_tokenizer, r"tokenizer of \d+ tokens for an embedding of 288 rows, expected as many"),
        (lambda folder: shard(folder, 1).unlink(), r"shards missing: \['model-00002"),
        (lambda folder: shutil.copy(shard(folder), folder / "model-9.safetensors"), "does not name: .*model-9"),
        (lambda folder: cut(shard(folder, 1), 0.6), "no complete safetensors file"),
        (lambda folder: cut(shard(folder, 1), 0.0), "no complete safetensors file"),
        (lambda folder: cut(folder / sources.INDEX, 0.5), "no readable weight_map"),
        (edit_json(sources.INDEX, lambda i: i["weight_map"].pop("model.norm.weight")), "does not list for it"),
        (rewrite(lambda state: dict(list(state.items())[1:])), "lacks"),
        (add_key, r"unknown key model\.visual\.weight \(3,\)"),
        (drop_key, "missing "),
        (edit_json("config.json", lambda c: c.update(hidden_size=64)), r"found \(288, 32\)|found \(\S+ 32\), expected"),
        (
            edit_json("config.json", lambda c: c.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)),
            "missing decoder.layers.2",
        ),
        (edit_json("config.json", lambda c: c.update(tie_word_embeddings=True)), "lm_head.weight differs from"),
        (edit_json("config.json", lambda c: c.update(hidden_act="gelu")), "hidden_act 'gelu', expected 'silu'"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: found no readable configuration"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "found no tokenizer"),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)
def test_what_does_not_fit_is_named_and_leaves_no_folder(spoil, message, damaged, tmp_path, capsys):
    spoil(damaged)
    tool = load_tool("convert_checkpoint")
    arguments = ["--from", "qwen2", "--to", str(tmp_path / "ours"), "--patch-size", "8", str(damaged)]
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("DataError: ")
    assert re.search(message, error), error
    assert not [path for path in tmp_path.iterdir() if path.name not in ("damaged",)]


def test_the_tool_converts_and_reports_every_key(qwen, tmp_path, capsys):
    tool = load_tool("convert_checkpoint")
    folder = tmp_path / "ours"
    arguments = ["--from", "qwen2", "--to", str(folder), "--patch-size", "8", "--visual-prompts", "2", str(qwen)]
    assert tool.main(arguments) == 0
    assert "initialised because the base has no mask head" in capsys.readouterr().out
    listed = {entry["source"] for entry in json.loads((folder / "conversion.json").read_text())["entries"]}
    assert set(open_source(qwen).infos) <= listed
    assert tool.main(arguments) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert tool.main(["--from", "evev2", "--to", str(tmp_path / "eve"), str(qwen)]) == 2
    assert "patch_embedding.patch_projection.weight" in capsys.readouterr().err
    assert tool.main(["--to-release", str(tmp_path / "released"), str(folder)]) == 2
    assert "expected 2 and true" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_wrong_tokenizer_of_a_release_is_noticed(base_tokenizer, make_config, tmp_path):
    state, _ = release_checkpoint(tmp_path, base_tokenizer, make_config, release_orders(2)[0], num_visual_prompts=2)
    save_file(state, tmp_path / "state.safetensors")
    other_tokenizer(tmp_path / "base")
    with pytest.raises(DataError, match=r"the release appends one of \[0, .*give the tokenizer of the base"):
        convert(tmp_path / "state.safetensors", "release", tmp_path / "ours", base=tmp_path / "base")


def test_a_spoilt_disk_is_noticed_when_the_shard_is_read_back(qwen, tmp_path, monkeypatch):
    def save_wrongly(tensors, path, metadata):
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] + 1}, path, metadata=metadata)

    monkeypatch.setattr(writer, "save_file", save_wrongly)
    with pytest.raises(DataError, match="differ from what was written"):
        convert(qwen, "qwen2", tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_one_shard_is_in_memory(qwen, tmp_path, monkeypatch):
    live, peak = {}, 0

    def watched(read):
        def wrapped(*arguments):
            nonlocal peak
            tensor = read(*arguments)
            storage = tensor.untyped_storage()
            live[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(tensor, live.pop, storage.data_ptr(), None)
            peak = max(peak, sum(live.values()))
            return tensor

        return wrapped

    monkeypatch.setattr(sources.SafetensorsSource, "read", watched(sources.SafetensorsSource.read))
    monkeypatch.setattr(Rows, "place", watched(Rows.place))
    limit = 45_000
    done = convert(qwen, "qwen2", tmp_path / "ours", shard_bytes=limit)
    shards = shards_of(done.plan.writes, limit)
    largest = max(sum(write.info.nbytes for write in one) for one in shards)
    embedding = max(write.info.nbytes for write in done.plan.writes)
    total = sum(write.info.nbytes for write in done.plan.writes)
    assert len(shards) > 3
    # While an embedding's rows are placed, source and target of it exist.
    assert 0 < peak <= max(largest, limit) + embedding < total
    assert live == {}

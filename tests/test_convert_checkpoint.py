"""Checkpoints of other bases are converted bit-exactly, and a failed conversion leaves no files."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from running import ROOT, load_tool
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from synthetic_checkpoints import (
    BASE_TOKENS,
    CHOSEN,
    DECODER,
    convert,
    make_base_tokenizer,
    other_tokenizer,
    save_base,
    text_logits,
    text_model,
    write_eve,
    write_qwen,
)
from tokenizers import Tokenizer
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pixel_sail.config import ModelConfig
from pixel_sail.conversion import sources, vocabulary, writer
from pixel_sail.conversion.convert import expected_shapes, to_ours
from pixel_sail.conversion.layouts import LAYOUTS, layout_reason
from pixel_sail.conversion.plan import Rows
from pixel_sail.conversion.sizes import COPIED_SIZES, Chosen, base_architecture
from pixel_sail.conversion.sources import open_source
from pixel_sail.conversion.writer import shards_of, tensor_hash
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.convert import TOKEN_ROWS
from pixel_sail.model.modeling_pixel_sail import load_model
from pixel_sail.model.tokenization import add_special_tokens, load_tokenizer, special_tokens
from pixel_sail.training.build import build_model
from pixel_sail.types import DataError


@pytest.fixture(scope="session")
def base_tokenizer():
    return make_base_tokenizer()


@pytest.fixture(scope="session")
def qwen(base_tokenizer, tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"), base_tokenizer)


@pytest.fixture
def damaged(qwen, tmp_path):
    return Path(shutil.copytree(qwen, tmp_path / "damaged"))


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


EVE_SIZES = DECODER | {"vocab_size": BASE_TOKENS + 8, "rope_theta": 10_000.0}


@pytest.mark.parametrize("parts", [["self_attn", "layernorm", "mlp"], ["mlp"], []], ids="-".join)
def test_an_evev2_base_keeps_every_weight_and_shows_its_own_sizes(parts, base_tokenizer, make_config, tmp_path):
    eve = {"base": "eve", "attention": "causal", "modality_experts": parts, "patch_size": 8, "patch_hidden_size": 12}
    weights = write_eve(tmp_path / "eve", base_tokenizer, make_config(**EVE_SIZES, **eve))
    assert ("decoder.layers.1.image.mlp.up_proj.weight" in weights) == ("mlp" in parts)
    convert(tmp_path / "eve", "evev2", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert {name: getattr(model.config, name) for name in eve} == eve
    ours = model.state_dict()
    for name, tensor in weights.items():
        found = ours[name][: len(tensor)] if name in TOKEN_ROWS else ours[name]
        known = BASE_TOKENS if name in TOKEN_ROWS else len(tensor)
        assert torch.equal(found[:known], tensor[:known]), name


CONVERSIONS = {
    "sail_0_5b": ("qwen2", "sail"),
    "sail_3b": ("qwen2", "sail"),
    "solo_7b": ("solo",),
    "eve_7b": ("evev2",),
    "tiny": (),
}
"""Model file -> bases it can start from; tiny starts from random weights."""


def architecture_of_file(name):
    return OmegaConf.to_object(OmegaConf.load(ROOT / "configs" / "model" / f"{name}.yaml")["architecture"])


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, own in CONVERSIONS.items() for layout in own])
def test_the_defaults_of_every_conversion_are_those_of_the_model_files(name, layout):
    assert CONVERSIONS.keys() == {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    wanted = Architecture(**architecture_of_file(name))
    held = {n: s for n, s in expected_shapes(wanted).items() if layout_reason(LAYOUTS[layout].initialised, n) is None}
    infos = {n: sources.TensorInfo(shape=shape, dtype=torch.bfloat16) for n, shape in held.items()}
    base = {field: getattr(wanted, field) for field in (*COPIED_SIZES, "rope_theta")}
    assert vars(base_architecture(base, infos, Chosen())) == vars(wanted)
    assert Chosen().vocab_multiple == ModelConfig().vocab_multiple


def test_a_start_made_without_options_is_taken_by_the_7b_model_file(base_tokenizer, make_config, tmp_path, capsys):
    sizes = EVE_SIZES | {"patch_hidden_size": 12, "initializer_range": 0.2}
    fields = architecture_of_file("eve_7b") | sizes
    write_eve(tmp_path / "eve", base_tokenizer, make_config(**fields))
    tool = load_tool("convert_checkpoint")
    arguments = ["--from", "evev2", "--to", str(tmp_path / "ours"), str(tmp_path / "eve")]
    for option, value, found in (("--attention", "prefix", "causal"), ("--patch-size", "16", "32")):
        assert tool.main([option, value, *arguments]) == 2
        assert f"{option} {value} given, the checkpoint has {found}" in capsys.readouterr().err
    assert tool.main(arguments) == 0
    ours = str(tmp_path / "ours")
    build_model(ModelConfig(tokenizer=ours, init_from=ours, architecture=Architecture(**fields)), seed=0, teachers={})


def test_training_starts_from_a_converted_base(qwen, tmp_path):
    convert(qwen, "qwen2", tmp_path / "ours")
    sizes = {field: getattr(CHOSEN, field) for field in ("patch_size", "mask_stride", "mask_dim", "num_visual_prompts")}
    architecture = Architecture(**DECODER, **sizes, rope_theta=Qwen2Config().rope_parameters["rope_theta"])
    config = ModelConfig(tokenizer=str(tmp_path / "ours"), init_from=str(tmp_path / "ours"), architecture=architecture)
    model, processor = build_model(config, seed=5, teachers={})
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert processor.seg_id == BASE_TOKENS
    assert all(torch.equal(model.state_dict()[name], value) for name, value in written.items())


def test_weights_missing_in_a_text_base_are_initialized_from_the_seed(qwen, tmp_path):
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


def zero_pieces(state, stage, world):
    """Return the flat tensors of every rank, by a simple reference."""
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


def test_a_zero_folder_without_a_shard_is_rejected(tmp_path):
    step = write_zero(tmp_path / "zero", {"a": torch.ones(9)}, 2, 3)
    next(step.glob("*_rank_1_*")).unlink()
    with pytest.raises(DataError, match=r"ranks \[0, 2\], expected those of 0 .. 2"):
        open_source(tmp_path / "zero")


@pytest.mark.parametrize("stage", [2, 3])
def test_metadata_of_deepspeed_is_read_as_inert_data(stage, tmp_path):
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


def test_a_pickle_that_asks_for_code_is_rejected_and_not_run(tmp_path):
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_tokenizer, r"tokenizer of \d+ tokens for an embedding of 288 rows, expected as many"),
        (lambda folder: shard(folder, 1).unlink(), r"shards missing: \['model-00002"),
        (lambda folder: shutil.copy(shard(folder), folder / "model-9.safetensors"), "does not name: .*model-9"),
        (lambda folder: cut(shard(folder, 1), 0.6), "incomplete safetensors file"),
        (lambda folder: cut(shard(folder, 1), 0.0), "incomplete safetensors file"),
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
def test_a_mismatch_is_named_and_leaves_no_folder(spoil, message, damaged, tmp_path, capsys):
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
    assert "num_upsample_blocks 1, expected 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


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


PLAIN = ("<vision>", "<vpatch>", "</vision>", "<|im_start|>", "<|im_end|>")
"""Ordinary pieces of the vocabulary of SOLO's tokenizer."""


def with_plain_pieces(tokenizer):
    """The same vocabulary, but some special tokens are ordinary pieces that no merge produces."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= {own["content"]: own["id"] for own in content["added_tokens"]}
    content["added_tokens"] = [own for own in content["added_tokens"] if own["content"] not in PLAIN]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def test_special_tokens_that_are_ordinary_pieces_become_special_under_their_ids(base_tokenizer, tmp_path):
    plain = with_plain_pieces(base_tokenizer)
    before = plain.get_vocab()
    assert all(len(plain(token)["input_ids"]) > 1 and token in before for token in PLAIN)
    plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, num_visual_prompts=2)
    assert {token: tokenizer.get_vocab()[token] for token in before} == before
    for token in special_tokens(2):
        assert tokenizer(f"a{token}b")["input_ids"].count(tokenizer.get_vocab()[token]) == 1
    tokenizer.split_special_tokens = True
    with pytest.raises(DataError, match="expected one id for each of these tokens"):
        add_special_tokens(tokenizer, num_visual_prompts=2)


def make_sentencepiece(folder):
    """Write a tokenizer.model like SOLO's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="make setup installs it")
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    words = ("where is the red star", "the small box behind it", "a round one left of the star") * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    model.pieces.extend(type(model.pieces[0])(piece=token, score=0.0, type=1) for token in PLAIN)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def test_a_solo_checkpoint_with_a_sentencepiece_tokenizer_is_converted(tmp_path):
    (tmp_path / "solo").mkdir()
    theirs = make_sentencepiece(tmp_path / "solo")
    count = theirs.get_piece_size() + len(PLAIN)
    model = text_model(MistralForCausalLM, MistralConfig, vocab_size=count)
    model.save_pretrained(tmp_path / "solo")
    state = load_file(tmp_path / "solo" / "model.safetensors")
    state["model.embed_vision_patch.weight"] = torch.randn(32, 3 * 8 * 8)
    save_file(state, tmp_path / "solo" / "model.safetensors")
    convert(tmp_path / "solo", "solo", tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours", num_visual_prompts=2)
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in PLAIN] == list(range(count - len(PLAIN), count))
    for text in ("where is the star", "a \u00e9  b\nc", "the red one"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
        assert tokenizer.decode(theirs.encode(text)) == text
    # As the fast tokenizer of Llama does with legacy=true: every piece of text gets a space before it.
    framed = tokenizer("<|im_start|>the red<|im_end|>", add_special_tokens=False)["input_ids"]
    assert framed == [vocabulary["<|im_start|>"], *theirs.encode("the red"), vocabulary["<|im_end|>"]]


def test_a_sentencepiece_tokenizer_without_its_package_is_an_error_that_names_it(qwen, tmp_path, monkeypatch):
    source = Path(shutil.copytree(qwen, tmp_path / "solo"))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"no package sentencepiece.*pip install sentencepiece"):
        convert(source, "qwen2", tmp_path / "ours")


def test_a_full_disk_is_one_message_and_leaves_nothing(qwen, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # File size limit of a process; beyond it, writes fail as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        arguments = ["--from", "qwen2", "--to", str(tmp_path / "ours"), "--patch-size", "8", str(qwen)]
        assert load_tool("convert_checkpoint").main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"DataError: \S+safetensors: could not be written .* nothing was kept", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_safetensors_file_that_changed_meanwhile_is_one_message(qwen, tmp_path, monkeypatch, capsys):
    class Changed:
        def __init__(self, *arguments, **options):
            self.opened = safe_open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            del self.opened

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            raise SafetensorError("invalid header")

    monkeypatch.setattr(sources, "safe_open", Changed)
    arguments = ["--from", "qwen2", "--to", str(tmp_path / "ours"), "--patch-size", "8", str(qwen)]
    assert load_tool("convert_checkpoint").main(arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"DataError: .*safetensors: .*\(SafetensorError: invalid header\); download it again\n", said)
    assert not (tmp_path / "ours").exists()


def write_one(folder, value, finish=lambda working, hashes: None):
    tensor = torch.full((2,), value)
    info = sources.TensorInfo(shape=(2,), dtype=tensor.dtype)
    write = writer.Write(name="a", info=info, make=lambda: tensor)
    writer.write_folder(folder, [write], shard_bytes=1_000, finish=finish)


def test_two_conversions_to_one_folder_leave_that_of_the_first_to_end(tmp_path):
    stranger = tmp_path / ".writing_ours"
    stranger.mkdir()
    (stranger / "model.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(DataError, match="found an existing path, expected a new folder"):
        # The second starts and ends while the first is at work.
        write_one(tmp_path / "ours", 1.0, finish=lambda working, hashes: write_one(tmp_path / "ours", 2.0))
    assert load_file(tmp_path / "ours" / "model.safetensors")["a"].tolist() == [2.0, 2.0]
    assert (stranger / "model.safetensors").read_bytes() == b"somebody else's"
    assert {path.name for path in tmp_path.iterdir()} == {"ours", ".writing_ours"}


def test_every_file_is_on_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, os.rename
    monkeypatch.setattr(
        writer.os, "fsync", lambda own: (done.append(Path(f"/proc/self/fd/{own}").readlink().name), flush(own))
    )
    monkeypatch.setattr(writer.os, "rename", lambda old, new: (done.append("renamed"), rename(old, new)))
    write_one(tmp_path / "ours", 1.0, finish=lambda working, hashes: (working / "config.json").write_text("{}"))
    before = done[: done.index("renamed")]
    assert set(before[:2]) == {"model.safetensors", "config.json"}
    assert before[2].startswith(".writing_ours_")
    assert done[-2:] == ["renamed", tmp_path.name]

"""The parity tool accepts outputs equal to the release, detects differences, and reports why a folder cannot be
checked."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from running import load_tool
from safetensors.torch import load_file, save_file
from shared_data import parity_folder
from torch.nn import functional as F

from pixel_sail.losses.mask import full_map_losses
from pixel_sail.model.convert import KEY_PATTERNS, convert_release_state, our_key, row_sources
from pixel_sail.model.generation import encode_images, generate
from pixel_sail.types import IGNORE_LABEL

FORWARD_TENSORS = ("hidden_last", "logits", "llm_loss", "feature_low", "feature_high", "seg_query", "mask_logits")


@pytest.fixture(scope="module")
def tool():
    return load_tool("check_parity")


@pytest.mark.parametrize("name", ["p16_tied", "p32_untied"])
def test_recorded_outputs_of_the_released_model_are_reproduced(tool, capsys, name):
    folder = parity_folder(name)
    assert tool.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    # Every recorded output is compared, alone and packed.
    for tensor in FORWARD_TENSORS:
        assert len(re.findall(rf"^  {tensor} ", printed, flags=re.MULTILINE)) == 2


RELEASED_NAMES = (
    (r"embed_tokens\.", "single_transformer.model.embed_tokens."),
    (r"decoder\.layers\.", "single_transformer.model.layers."),
    (r"decoder\.norm\.", "single_transformer.model.norm."),
    (r"patch_embedding\.patch_projection\.", "single_transformer.model.vis_embed."),
    (r"patch_embedding\.prompt_projection\.", "single_transformer.model.vp_embed."),
    (r"lm_head\.", "single_transformer.lm_head."),
    (r"mask_head\.pre_projector\.", "image_feature_pre_projector."),
    (r"mask_head\.seg_projector\.", "seg_token_projector."),
    (r"mask_head\.pixel_projector\.", "image_feature_projector."),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.transposed\.", r"upsample_blocks.\1.0."),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.(depthwise|pointwise)\.", r"upsample_blocks.\1.2.\2."),
    (r"mask_head\.upsampler\.blocks\.(\d+)\.norm\.", r"upsample_blocks.\1.3.ln."),
)
"""Our key -> released one, written down independently of the table under test."""


def _released_name(name):
    (match,) = [(pattern, new) for pattern, new in RELEASED_NAMES if re.match(pattern, name)]
    return re.sub("^" + match[0], match[1], name)


def _released_state(model):
    state = {_released_name(name): value.clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["single_transformer.lm_head.weight"]
    return state


def _case(model, processor, example, prompt_length):
    """Return one recorded case in the layout of the shared folders, from an ordinary forward pass."""
    rows, columns = example.grid_hw
    seg = int((example.input_ids_T == processor.seg_id).sum())
    with torch.no_grad():
        output = model(
            input_ids_BT=example.input_ids_T[None],
            position_ids_2BT=example.position_ids_2T[:, None],
            sample_index_BT=torch.zeros_like(example.input_ids_T)[None],
            branch_ids_BT=example.branch_ids_T[None],
            in_image_BT=example.in_image_T[None],
            patch_index_BT=example.patch_index_T[None],
            prompt_ids_BT=example.prompt_ids_T[None],
            patches_SK=example.patches_PK,
            grids=[example.grid_hw],
            seg_positions_N2=(example.input_ids_T == processor.seg_id)[None].nonzero(),
            masks_per_image=[seg],
        )
        low = output.hidden_BTD[0, 1 : 1 + rows * columns].view(rows, columns, -1)
        high = model.mask_head.pixel_features(low[None])[0]
    unprompted = -1 - (example.patch_index_T >= 0).long()
    case = {
        "input_ids": example.input_ids_T[None],
        "labels": example.labels_T[None],
        "vision_patches": example.patches_PK.view(-1, 3, 8, 8),
        "vision_patch_indices": example.patch_index_T[None],
        "vp_token_indices": torch.where(example.prompt_ids_T < 0, unprompted, example.prompt_ids_T)[None],
        "position_ids": torch.cat((example.position_ids_2T[:1] * 0, example.position_ids_2T))[:, None],
        "grid": torch.tensor(example.grid_hw),
        "prompt_len": torch.tensor(prompt_length),
        "hidden_last": output.hidden_BTD[0],
        "logits": output.logits[0],
        "llm_loss": F.cross_entropy(output.logits[0, :-1], example.labels_T[1:]),
        "feature_low": low,
        "feature_high": high,
        "greedy_ids": torch.tensor(_greedy(model, example, prompt_length)),
    }
    if seg:
        case |= _mask_tensors(output, high)
    return {name: value.clone().contiguous() for name, value in case.items()}


def _mask_tensors(output, high):
    logits = output.mask_logits[0]
    masks = torch.rand(logits.shape) < 0.5
    sums = full_map_losses(logits, masks)
    share = 1.0 / (sums.count + 1e-4)
    return {
        "seg_query": output.seg_queries_ND,
        "mask_logits": torch.einsum("nd,yxd->nyx", output.seg_queries_ND, high),
        "gt_masks": masks,
        "total_loss_mask": 2.0 * sums.bce * share,
        "total_loss_dice": 0.5 * sums.dice * share,
    }


def _greedy(model, example, prompt_length):
    span = example.in_image_T
    positions, prompts = example.position_ids_2T[:, span], example.prompt_ids_T[span]
    prefix = encode_images(model, example.patches_PK[None], example.grid_hw, positions, prompts[None])
    question = example.input_ids_T[int(span.sum()) : prompt_length].tolist()
    return generate(model, prefix, [[question]], max_new_tokens=8, end_ids=())[0][0].token_ids


@pytest.fixture(scope="module")
def synthetic_folders(tool, tiny_model, processor, make_sample, tmp_path_factory):
    """Folders in the layout of the shared ones, without weights, which are sampled by name."""
    folders = {}
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        _write_folder(folders[tied], tool, tiny_model(tie_word_embeddings=tied), processor, make_sample)
    return folders


def _write_folder(folder, tool, model, processor, make_sample):
    shapes = {name: list(value.shape) for name, value in _released_state(model).items()}
    tokens = model.config.token_ids
    named = convert_release_state(tool.named_weights(shapes), model, source_tokens=tokens, target_tokens=tokens)
    model.load_state_dict(named)
    config = {name: getattr(model.config, name) for name in tool.RECORDED_SIZES}
    config |= {"mrope_section": [0, 2, 2], "special_tokens": tokens, "num_visual_prompts": 15, "upsample_blocks": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "shapes.json").write_text(json.dumps(shapes))
    rng = np.random.default_rng(0)
    cases = {}
    for index, (size_hw, masks) in enumerate([((16, 24), (2,)), ((8, 16), (0,)), ((24, 8), (1, 1))]):
        sample, image = make_sample(rng, size_hw=size_hw, masks_per_turn=masks, prompts=(index,))
        example = processor.encode_sample(sample, image, independent_turns=False)
        prompt_length = int((example.labels_T != IGNORE_LABEL).nonzero()[0])
        for name, value in _case(model, processor, example, prompt_length).items():
            cases[f"{index}.{name}"] = value
    save_file(cases, folder / "cases.safetensors")


@pytest.fixture
def folder(synthetic_folders, tmp_path):
    return shutil.copytree(synthetic_folders[False], tmp_path / "untied")


def _weights(folder, tool):
    """Return the weights of the folder, with the release's names."""
    return tool.named_weights(json.loads((folder / "shapes.json").read_text()))


def test_weights_are_sampled_by_name_where_no_file_is(tool, synthetic_folders, capsys):
    assert tool.main([str(synthetic_folders[True]), str(synthetic_folders[False])]) == 0
    assert "parity holds" in capsys.readouterr().out


def test_named_weights_are_preferred_over_a_file_on_request(tool, folder):
    state = _weights(folder, tool)
    state["single_transformer.model.norm.weight"] += 0.01
    save_file(state, folder / "reference_state.safetensors")
    assert tool.main([str(folder)]) == 1
    assert tool.main([str(folder), "--named-weights"]) == 0


def test_a_weight_file_with_the_right_weights_passes(tool, folder):
    save_file(_weights(folder, tool), folder / "reference_state.safetensors")
    assert tool.main([str(folder)]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "single_transformer.model.layers.1.self_attn.q_proj.bias",
        "single_transformer.model.vis_embed.weight",
        "single_transformer.model.vp_embed.weight",
        "seg_token_projector.2.bias",
        "upsample_blocks.0.3.ln.bias",
    ],
)
def test_a_slightly_different_weight_is_noticed(tool, folder, name, capsys):
    state = _weights(folder, tool)
    state[name] = state[name] + 0.01 * torch.randn(state[name].shape)
    save_file(state, folder / "reference_state.safetensors")
    assert tool.main([str(folder)]) == 1
    assert "parity FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    (*FORWARD_TENSORS, "total_loss_mask", "total_loss_dice", "greedy_ids"),
)
@pytest.mark.parametrize("spoil", [lambda x: x + 1, lambda x: x * float("nan")], ids=["shifted", "not a number"])
def test_every_recorded_output_is_compared(tool, folder, name, spoil, capsys):
    cases = load_file(folder / "cases.safetensors")
    cases[f"2.{name}"] = spoil(cases[f"2.{name}"])
    save_file(cases, folder / "cases.safetensors")
    assert tool.main([str(folder)]) == 1
    assert re.search(f"{name} .*(ABOVE|DIFFER)", capsys.readouterr().out)


def test_the_tolerance_is_the_callers(tool, folder):
    cases = load_file(folder / "cases.safetensors")
    cases["0.logits"] += 0.01
    save_file(cases, folder / "cases.safetensors")
    assert tool.main([str(folder)]) == 1
    assert tool.main([str(folder), "--tolerance", "0.02"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"image_encoder.weight": torch.zeros(2)}, "unknown key 'image_encoder.weight'"),
        (lambda s: s | {"upsample_blocks.7.0.bias": torch.zeros(2)}, "unknown mask_head.upsampler.blocks.7"),
        (lambda s: {k: v for k, v in s.items() if "vis_embed" not in k}, "missing patch_embedding.patch_projection"),
        (lambda s: {k: v for k, v in s.items() if "embed_tokens" not in k}, "missing embed_tokens.weight"),
        (lambda s: s | {"seg_token_projector.2.bias": torch.zeros(3)}, "found (3,), expected (16,)"),
    ],
    ids=["unknown key", "unknown block", "missing", "missing embedding", "misshapen"],
)
def test_weights_that_do_not_fit_cannot_be_checked(tool, folder, change, message, capsys):
    save_file(change(_weights(folder, tool)), folder / "reference_state.safetensors")
    assert tool.main([str(folder)]) == 2
    assert message in capsys.readouterr().err


def _edit(name, change):
    def apply(folder):
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_edit("config.json", lambda c: c.pop("upsample_blocks")), "neither a SAIL-type case"),
        (
            _edit("config.json", lambda c: c.update(mrope_section=[2, 1, 1])),
            "mrope_section [2, 1, 1], expected [0, 2, 2]",
        ),
        (_edit("config.json", lambda c: c.pop("hidden_size")), "hidden_size"),
        (_edit("config.json", lambda c: c["special_tokens"].pop("[SEG]")), "[SEG]"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be checked"),
        (lambda folder: (folder / "cases.safetensors").unlink(), "cases.safetensors"),
    ],
)
def test_a_folder_that_lacks_something_cannot_be_checked(tool, folder, spoil, message, capsys):
    spoil(folder)
    assert tool.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert f"{folder}: cannot be checked" in captured.err
    assert message in captured.err
    assert "parity holds" not in captured.out


@pytest.mark.parametrize("name", ["cases.safetensors", "reference_state.safetensors"])
def test_a_damaged_file_cannot_be_checked(tool, folder, name, capsys):
    (folder / name).write_bytes(b"404: Not Found, a page instead of a file")
    assert tool.main([str(folder)]) == 2
    assert "cannot be checked" in capsys.readouterr().err


def test_a_folder_without_cases_cannot_be_checked(tool, folder, capsys):
    save_file({}, folder / "cases.safetensors")
    assert tool.main([str(folder)]) == 2
    assert "cannot be checked" in capsys.readouterr().err


def test_named_weights_depend_on_the_name_alone(tool):
    shapes = {"a.weight": [4, 6], "b.weight": [4, 6], "a.norm.weight": [1000], "a.bias": [1000]}
    weights, reordered = tool.named_weights(shapes), tool.named_weights(dict(reversed(shapes.items())))
    assert all(torch.equal(weights[name], reordered[name]) for name in shapes)
    assert not torch.equal(weights["a.weight"], weights["b.weight"])
    assert weights["a.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.02)
    assert weights["a.bias"].mean().item() == pytest.approx(0.0, abs=0.02)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_every_parameter_has_exactly_one_released_name(tiny_model, monkeypatch):
    monkeypatch.setattr("pixel_sail.model.configuration_pixel_sail.MAX_FEATURE_SIZE", 24)
    names = list(tiny_model(mask_stride=2).state_dict())
    assert any("pre_projector" in name for name in names)
    released = [_released_name(name) for name in names]
    assert [our_key(name) for name in released] == names
    assert len(set(released)) == len(names)
    for name in released:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in KEY_PATTERNS) == 1


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "x.single_transformer.lm_head.weight", "upsample_blocks.0.1.weight"]
)
def test_a_name_the_release_does_not_use_is_rejected(name):
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        our_key(name)


def test_rows_are_matched_by_token_name_in_any_order():
    source, target = {"[SEG]": 5, "<p>": 6}, {"[SEG]": 6, "<p>": 5}
    assert row_sources(source, target, source_rows=7, target_rows=7).tolist() == [0, 1, 2, 3, 4, 6, 5]


@pytest.mark.parametrize(
    ("target_rows", "expected"), [(6, [0, 1, 2, 3, 4, 5]), (8, [0, 1, 2, 3, 4, 5, 6, 7]), (10, [*range(8), -1, -1])]
)
def test_padding_of_either_vocabulary_is_cut_or_left_empty(target_rows, expected):
    tokens = {"[SEG]": 4, "<p>": 5}
    assert row_sources(tokens, tokens, source_rows=8, target_rows=target_rows).tolist() == expected


def test_tokens_move_into_another_region_and_leave_nothing_behind():
    # The source appended at 4 and 5, the target at 6 and 7, behind two rows no token of the source stands for.
    found = row_sources({"[SEG]": 4, "<p>": 5}, {"<p>": 6, "[SEG]": 7}, source_rows=6, target_rows=9)
    assert found.tolist() == [0, 1, 2, 3, -1, -1, 5, 4, -1]


def test_a_token_missing_on_one_side_is_rejected():
    with pytest.raises(ValueError, match=r"\['<q>'\] only in the checkpoint, \['<r>'\] only in the target"):
        row_sources({"<p>": 1, "<q>": 2}, {"<p>": 1, "<r>": 2}, source_rows=4, target_rows=4)


def test_the_token_without_a_use_may_be_dropped():
    found = row_sources({"<p>": 2, "<NO_Prompt>": 3}, {"<p>": 3}, source_rows=4, target_rows=4)
    assert found.tolist() == [0, 1, -1, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_converted_rows_follow_their_tokens(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    target = model.config.token_ids
    # The release gives the same tokens, in reversed order, to the same ids.
    source = dict(zip(target, reversed(target.values()), strict=True))
    state = convert_release_state(_released_state(model), model, source_tokens=source, target_tokens=target)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        before = model.state_dict()[name]
        for token in ("[SEG]", "<vision>", "<Prompt14>"):
            assert torch.equal(state[name][target[token]], before[source[token]])
        assert torch.equal(state[name][200], before[200])


def test_a_tied_head_that_differs_is_rejected(tiny_model):
    model = tiny_model()
    released = _released_state(model)
    tokens = model.config.token_ids
    released["single_transformer.lm_head.weight"] = released["single_transformer.model.embed_tokens.weight"] + 1.0
    with pytest.raises(ValueError, match="lm_head differs from embed_tokens"):
        convert_release_state(released, model, source_tokens=tokens, target_tokens=tokens)

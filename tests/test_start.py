"""A run starts from an exported folder: the same decoder and vocabulary, other modules may be redesigned where
allowed."""

import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_configs import names

from pixel_sail.config import CONFIG_FOLDER, FRESH_PARTS, ConfigError, TrainConfig, load_config
from pixel_sail.model.modeling_pixel_sail import load_model
from pixel_sail.training.build import NAMES, build_model

ARCHITECTURE = "model.architecture."
CARD = "experiment=pixel_sail_0_5b"
SMALL = tuple(
    f"{ARCHITECTURE}{field}={value}"
    for field, value in {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }.items()
)

INITIALIZED = {
    **{key: ["mask_head"] for key in ("stride_2", "stride_8", "stride_16", "upsampler_off")},
    **{key: ["mask_head"] for key in ("upsampler_bilinear", "upsampler_pixel_shuffle", "mask_dim_256")},
    **{key: ["prompt_projection"] for key in ("prompts_pooled", "prompts_off", "prompts_unprojected")},
    "ladder_1_baseline": ["mask_head", "prompt_projection"],
    "ladder_2_upsampler": ["prompt_projection"],
    # Two blocks upsample stride 14 to 3.5, like 16 to 4.
    "patch_14": ["patch_embedding"],
    "patch_32": ["mask_head", "patch_embedding"],
    "attention_causal": [],
    "upsampler_transposed": [],
    "mask_dim_512": [],
    "stride_4": [],
    "prompts_injection": [],
    "attention_prefix": [],
    "patch_16": [],
}
"""Ablation of the architecture -> the parts that are not loaded from the base of the card."""


def configured(data_root, *overrides):
    tokenizer = f"model.tokenizer={data_root}/refshapes/tokenizer"
    return load_config("train", TrainConfig, [CARD, tokenizer, *SMALL, *overrides])


def build(config, seed=1):
    return build_model(config.model, seed=seed, teachers={})[0]


@pytest.fixture(scope="module")
def base(data_root, tmp_path_factory):
    """An export of the card's architecture."""
    folder = str(tmp_path_factory.mktemp("base"))
    build(configured(data_root, "model.init_from=null"), seed=0).save_pretrained(folder)
    return folder


def test_every_ablation_of_the_architecture_is_tried_here():
    files = {name: (CONFIG_FOLDER / "ablation" / f"{name}.yaml").read_text() for name in names("ablation")}
    assert sorted(INITIALIZED) == sorted(name for name, text in files.items() if "architecture:" in text)


@pytest.mark.parametrize("ablation", INITIALIZED)
def test_an_ablation_starts_from_the_cards_base(data_root, base, ablation, caplog):
    config = configured(data_root, f"ablation={ablation}", f"model.init_from={base}")
    with caplog.at_level(logging.INFO):
        model = build(config)
    found, start = model.state_dict(), load_file(f"{base}/model.safetensors")
    config.model.init_from = None
    whole = build(config)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in whole.state_dict().items()
    }
    assert {name: getattr(model.config, name) for name in vars(config.model.architecture)} == vars(
        config.model.architecture
    )
    unkept = {name for name, tensor in found.items() if name not in start or not equal(tensor, start[name])}
    initialized = {name for name in found if any(re.match(NAMES[part], name) for part in INITIALIZED[ablation])}
    # Biases and norms are initialized to the same constants.
    assert (
        {name for name in initialized if found[name].unique().numel() > 1} <= unkept <= initialized | {"lm_head.weight"}
    )
    again = build(configured(data_root, f"ablation={ablation}", f"model.init_from={base}")).state_dict()
    assert all(torch.equal(found[name], again[name]) for name in found)
    for name in initialized:
        assert name in caplog.text, "the log lists what was initialized"


def equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("ablation", [name for name, parts in INITIALIZED.items() if parts])
def test_a_mismatched_part_is_an_error_that_names_the_setting_to_allow_it(data_root, base, ablation):
    config = configured(data_root, f"ablation={ablation}", f"model.init_from={base}", "model.init_fresh=[]")
    with pytest.raises(ConfigError, match=r"set model\.init_fresh=\[([a-z_,]+)\]") as caught:
        build(config)
    written = str(caught.value).partition("model.init_fresh=[")[2].partition("]")[0]
    assert written.split(",") == INITIALIZED[ablation]
    config.model.init_fresh = written.split(",")
    build(config)


@pytest.mark.parametrize(
    "change",
    [
        "num_hidden_layers=3",
        "hidden_size=64",
        "rope_theta=10",
        "rms_norm_eps=0.1",
        "num_visual_prompts=3",
        "attention_bias=false",
    ],
)
def test_another_decoder_or_vocabulary_is_an_error_whatever_is_allowed(data_root, base, change):
    config = configured(data_root, f"{ARCHITECTURE}{change}", f"model.init_from={base}")
    assert config.model.init_fresh == list(FRESH_PARTS)
    with pytest.raises(ConfigError, match=rf"differ in .*{change.partition('=')[0]}"):
        build(config)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_tensors_that_the_start_lacks_or_has_too_many_are_an_error_whatever_is_allowed(
    data_root, base, tmp_path, damage
):
    weights = load_file(f"{base}/model.safetensors")
    if damage == "missing":
        del weights["mask_head.seg_projector.0.weight"]
    else:
        weights["mask_head.absent.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{base}/config.json", tmp_path)
    for overrides in ((), ("ablation=stride_8",)):
        with pytest.raises(ValueError, match=r"mask_head\.(seg_projector\.0|absent)\.weight"):
            build(configured(data_root, f"model.init_from={tmp_path}", *overrides))


def test_a_part_that_does_not_exist_cannot_be_initialized():
    with pytest.raises(ConfigError, match=r"model\.init_fresh: found \['decoder'\]"):
        load_config("train", TrainConfig, [CARD, "model.init_fresh=[decoder,mask_head]"])


def test_a_start_in_several_files_is_the_start_in_one(data_root, base, tmp_path):
    whole = load_model(base)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = build(configured(data_root, f"model.init_from={tmp_path}")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.state_dict().items())

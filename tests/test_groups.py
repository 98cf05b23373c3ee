"""Parameter groups: which parameters are trained at which learning rate, which are frozen, and which are exported."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import launcher, load_tool, start
from safetensors.torch import load_file
from test_train import log_lines

from pixel_sail.config import CONFIG_FOLDER, ConfigError, GroupConfig, LoraConfig, OptimConfig, TrainConfig, load_config
from pixel_sail.losses.total import Counts, LossConfig, combine, loss_sums
from pixel_sail.model.lora import LoraLinear, add_lora, fold_lora
from pixel_sail.model.modeling_pixel_sail import load_model
from pixel_sail.training import checkpoint
from pixel_sail.training.build import add_training_parts, lora_targets
from pixel_sail.training.optim import build_optimizer, group_of_parameters, set_learning_rate

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@pytest.fixture
def batch(make_sample, processor, make_batch):
    """Two rows: an image with masks beside one without, and text alone."""
    rng = np.random.default_rng(0)
    rows = [[((48, 40), (2, 1)), ((40, 64), (0,))], [(None, (0,))]]
    examples = []
    for row in rows:
        samples = [make_sample(rng, size_hw=size, masks_per_turn=masks) for size, masks in row]
        examples.append([processor.encode_sample(sample, image, independent_turns=False) for sample, image in samples])
    return make_batch(*examples)


@pytest.fixture
def text_batch(make_sample, processor, make_batch):
    sample, image = make_sample(np.random.default_rng(1), size_hw=None, masks_per_turn=(0,))
    return make_batch([processor.encode_sample(sample, image, independent_turns=False)])


def tuned(tiny_model, tuning, **changes):
    """Return a tiny model as a configuration trains it, and the optimizer's part of that configuration."""
    config = load_config("train", TrainConfig, ["name=x", f"tuning={tuning}"])
    model = tiny_model(**changes).train()
    add_training_parts(model, config.model.lora, seed=0, teachers={})
    return model, config.optim


def expected_to_train(tuning, name):
    in_decoder, is_adapter = name.startswith("decoder."), name.split(".")[-1] in ("lora_A", "lora_B")
    return {
        "full": True,
        "lora": is_adapter or not in_decoder,
        "decoder_frozen": not in_decoder,
        "mask_head_only": name.startswith("mask_head."),
        "patch_embedding_only": name == "patch_embedding.patch_projection.weight",
    }[tuning]


TUNINGS = sorted(path.stem for path in (CONFIG_FOLDER / "tuning").glob("*.yaml"))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_trains_exactly_the_parts_it_names_once(tiny_model, tuning):
    model, optim = tuned(tiny_model, tuning)
    optimizer = build_optimizer(model, optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    expected = {name for name in names.values() if expected_to_train(tuning, name)}
    assert sorted(grouped) == sorted(expected)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_trained_parameter_gets_a_gradient_from_any_batch_and_no_frozen_one(
    tiny_model, batch, text_batch, tuning
):
    """Without it, processes would wait forever for each other's gradients."""
    for data in (batch, text_batch):
        model, optim = tuned(tiny_model, tuning)
        build_optimizer(model, optim)
        output = model(**data.model_inputs())
        terms = loss_sums(output, data, LossConfig())
        (combine(terms, Counts(tokens=9, masks=3, samples=3), LossConfig()) + output.zero_loss).backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == {name for name, _ in model.named_parameters() if expected_to_train(tuning, name)}


def test_the_first_match_wins_and_the_rest_is_the_default_group(tiny_model):
    groups = {
        "norms": GroupConfig(match=[r".*norm\.weight"]),
        "first_layer": GroupConfig(match=[r"decoder\.layers\.0\.", "lm_head_is_tied|decoder.norm"]),
        "head": GroupConfig(match=["mask_head"]),
    }
    group_of = group_of_parameters(tiny_model(), groups)
    assert group_of["decoder.layers.0.input_layernorm.weight"] == "norms"
    assert group_of["decoder.norm.weight"] == "norms"
    assert group_of["decoder.layers.0.mlp.up_proj.weight"] == "first_layer"
    assert group_of["decoder.layers.1.mlp.up_proj.weight"] == "default"
    assert group_of["mask_head.seg_projector.0.bias"] == "head"
    assert group_of.keys() == dict(tiny_model().named_parameters()).keys()


def test_groups_have_separate_rate_and_decay_and_norms_do_not_decay(tiny_model):
    groups = {"head": GroupConfig(match=["mask_head"], lr_scale=10.0, weight_decay=0.3)}
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(groups=groups, weight_decay=0.05))
    assert set_learning_rate(optimizer, 1e-3) == {"optim/lr": 1e-3, "optim/lr/head": 1e-2}
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "mask_head.seg_projector.0.weight": (1e-2, 0.3),
        "mask_head.seg_projector.0.bias": (1e-2, 0.0),
        "decoder.layers.0.mlp.up_proj.weight": (1e-3, 0.05),
        "decoder.norm.weight": (1e-3, 0.0),
        "embed_tokens.weight": (1e-3, 0.0),
    }
    assert {name: of[id(model.get_parameter(name))] for name in expected} == expected


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"head": GroupConfig(match=["maskhead"])}, r"optim\.groups\.head.*'maskhead'.*mask_head\."),
        ({"head": GroupConfig(match=["mask_head", "lm_head"])}, "'lm_head' matches none"),
        (
            {"all": GroupConfig(match=[""]), "head": GroupConfig(match=["mask_head"])},
            r"optim\.groups\.head.*earlier groups \['all'\]",
        ),
        ({"all": GroupConfig(match=[""], frozen=True)}, "every parameter is frozen"),
    ],
)
def test_a_group_that_matches_nothing_or_everything_is_an_error(tiny_model, groups, named):
    with pytest.raises(ConfigError, match=named):
        build_optimizer(tiny_model(), OptimConfig(groups=groups))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+optim.groups={a: {match: ['(']}}", "not a regular expression"),
        ("+optim.groups={a: {match: []}}", "is empty"),
        ("+optim.groups={a: {match: [x], lr_scale: 0}}", "lr_scale is 0"),
        ("+optim.groups={a: {match: [x], freeze: true}}", "freeze"),
        ("+optim.groups={default: {match: [x]}}", "'default'"),
        ("optim.ema_decay=1.0", r"ema_decay is 1\.0"),
        ("model.lora.rank=-1", "rank is -1"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(override, named):
    with pytest.raises(ConfigError, match=named):
        load_config("train", TrainConfig, ["name=x", override])


def test_adapters_sit_on_every_linear_layer_of_the_decoder_by_default(tiny_model):
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS]
    assert sorted(lora_targets(tiny_model(), LoraConfig())) == sorted(layers)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: 'decoder\.q_proj'.*q_proj"):
        lora_targets(tiny_model(), LoraConfig(targets=["decoder.q_proj"]))


def adapted(model):
    """Return a copy with adapters that change something."""
    changed = copy.deepcopy(model)
    add_lora(changed, lora_targets(changed, LoraConfig()), rank=3, alpha=6.0, seed=0)
    for name, parameter in changed.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return changed


def test_adapters_start_at_exactly_the_given_model(tiny_model, batch):
    model = tiny_model()
    with_adapters = copy.deepcopy(model)
    add_lora(with_adapters, lora_targets(model, LoraConfig()), rank=3, alpha=6.0, seed=0)
    thin = {name: value for name, value in with_adapters.named_parameters() if name.endswith("lora_B")}
    assert thin and not any(value.any() for value in thin.values())
    # An adapted feed-forward network is computed differently, so rounding may differ.
    found, expected = (own(**batch.model_inputs()).logits for own in (with_adapters, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.any() for name, parameter in with_adapters.named_parameters() if name.endswith("lora_A"))


def test_adapters_are_initialized_from_the_seed_and_each_its_own(tiny_model):
    initialized = []
    for seed in (0, 0, 1, 2):
        model = tiny_model()
        add_lora(model, lora_targets(model, LoraConfig()), rank=3, alpha=6.0, seed=seed)
        initialized.append([value for name, value in model.named_parameters() if name.endswith("lora_A")])
    first, again, other, third = initialized
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    for one, two, three in zip(first, other, third, strict=True):
        assert not torch.equal(one, two) and not torch.equal(one, three) and not torch.equal(two, three)
    assert not torch.equal(first[0], first[1][: len(first[0])])


def test_an_adapted_layer_adds_its_thin_product(tiny_model):
    layer = adapted(tiny_model()).decoder.layers[0].mlp.up_proj
    assert isinstance(layer, LoraLinear)
    x = torch.randn(5, layer.in_features)
    expected = torch.stack([layer.weight @ row + 6.0 / 3 * (layer.lora_B @ (layer.lora_A @ row)) for row in x])
    torch.testing.assert_close(layer(x), expected)


def test_a_folded_model_gives_the_same_answers_as_its_adapters(tiny_model, batch):
    model = tiny_model()
    changed = adapted(model)
    folded = fold_lora(changed, dict(changed.named_parameters()))
    assert folded.keys() == dict(model.named_parameters()).keys()
    plain = tiny_model(seed=5)
    checkpoint.load_parameters(plain, folded)
    inputs = batch.model_inputs()
    found, expected, before = plain(**inputs), changed(**inputs), model(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert (expected.logits - before.logits).abs().max() > 0.1


PLAIN = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"))


def test_the_average_follows_the_weights_and_is_what_validation_sees(tiny_model):
    model = adapted(tiny_model()).train()
    optimizer = build_optimizer(model, OptimConfig())
    bias = model.get_parameter("mask_head.seg_projector.0.bias")
    for step, value in enumerate((1.0, 2.0, 4.0)):
        with torch.no_grad():
            bias.fill_(value)
        checkpoint.average_weights(optimizer, decay=0.1, step=step)
    # Memories 0, 1/11 and 0.1 (2/12 is more than the decay allows).
    expected = 0.1 * (1 / 11 * 1.0 + 10 / 11 * 2.0) + 0.9 * 4.0
    seen = checkpoint.plain_copy(model, optimizer, PLAIN)
    torch.testing.assert_close(
        seen.get_parameter("mask_head.seg_projector.0.bias"), torch.full_like(bias, expected), rtol=1e-6, atol=0
    )
    assert bias.tolist() == [4.0] * len(bias)
    assert seen.state_dict().keys() == tiny_model().state_dict().keys()


def test_without_an_average_validation_sees_the_model_itself(tiny_model):
    model = tiny_model().train()
    assert checkpoint.plain_copy(model, build_optimizer(model, OptimConfig()), PLAIN) is model


def test_a_plan_counts_what_is_trained(capsys):
    tool = load_tool("plan_run")
    arguments = ["model=sail_0_5b", "data=refcoco", "sequences=0", "gpus=8", "optim.ema_decay=0.99", "--json", "-"]
    plans = []
    for tuning in ("full", "lora"):
        assert tool.main([*arguments, f"tuning={tuning}"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    full, lora = (plan["parameters"] for plan in plans)
    # Rank 16 times inputs plus outputs of q, k, v, o and the three layers of the SwiGLU, in 24 layers.
    widths = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)
    assert lora["adapters"] == 24 * 16 * widths and full["adapters"] == 0
    assert full["trained"] == full["total"] == lora["total"] - lora["adapters"]
    assert lora["trained"] == lora["total"] - lora["decoder"]
    zero2 = next(row for row in plans[1]["memory"] if row["sharding"] == "zero2")
    assert zero2["moments"] == pytest.approx(12 * lora["trained"] / 8)
    assert plans[1]["disk"]["checkpoint"] == pytest.approx(4 * lora["total"] + 12 * lora["trained"], rel=1e-3)


SMALL = (
    "experiment=quickstart",
    "optim=adamw",
    "distillation=none",
    "deepspeed=zero2",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.mask_dim=16",
    "data.packing.seq_len=512",
    "data.global_batch_size=4",
    "data.micro_batch_size=2",
    "loss.points.num_points=64",
    "log.every=1",
    "log.tensorboard=false",
    "log.progress=false",
    "evals=[]",
)
GROUPS = (
    "tuning=lora",
    "model.lora.rank=4",
    "optim.groups.adapters.lr_scale=5",
    "+optim.groups={head: {match: [mask_head], lr_scale: 2, weight_decay: 0.2}, embedding: {match: [embed_tokens]}}",
    "optim.ema_decay=0.5",
    "optim.steps=4",
    "checkpoint.every=2",
)


def train(data_root, run_dir, *overrides, by="python"):
    done = start([*launcher(by), "scripts/train.py", *SMALL, f"run_dir={run_dir}", *overrides], data_root)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def base(data_root, tmp_path_factory):
    """A trained model to start from."""
    run_dir = tmp_path_factory.mktemp("base")
    train(data_root, run_dir, "deepspeed=none", "optim.steps=1")
    return run_dir / "export"


@pytest.fixture(scope="module")
def tuned_run(data_root, base, tmp_path_factory):
    """Four steps with adapters, four trained groups and an average, ZeRO-2 on two processes."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    train(data_root, run_dir, *GROUPS, f"model.init_from={base}", by="torchrun")
    return run_dir


def test_frozen_weights_are_saved_as_they_were_and_have_no_moments(tuned_run, base):
    saved = load_file(tuned_run / "checkpoints" / "step_00000004" / "model.safetensors")
    moments = load_file(tuned_run / "checkpoints" / "step_00000004" / "optimizer.safetensors")
    start_weights = load_file(base / "model.safetensors")
    trained = {name for name in saved if expected_to_train("lora", name)}
    assert moments.keys() == {f"{key}.{name}" for key in (*checkpoint.MOMENTS, "average") for name in trained}
    for name in saved.keys() - trained:
        assert torch.equal(saved[name], start_weights[name]), name
    for name in trained & start_weights.keys():
        assert not torch.equal(saved[name], start_weights[name]), name
        assert not torch.equal(moments[f"average.{name}"], saved[name]), name
        # The data has no marked regions.
        assert moments[f"exp_avg_sq.{name}"].any() == (name != "patch_embedding.prompt_projection.weight"), name
    line = log_lines(tuned_run)[1]
    assert line["optim/lr/adapters"] == 5 * line["optim/lr"] and line["optim/lr/head"] == 2 * line["optim/lr"]


def test_an_export_has_averaged_weights_with_merged_adapters(tuned_run, base):
    exported = load_model(tuned_run / "export")
    assert exported.config.averaged_weights is True
    assert load_model(base).config.averaged_weights is False
    folder = tuned_run / "checkpoints" / "step_00000004"
    saved = load_file(folder / "model.safetensors")
    averages = {
        name.removeprefix("average."): tensor
        for name, tensor in load_file(folder / "optimizer.safetensors").items()
        if name.startswith("average.")
    }
    trained = load_model(base)
    add_lora(trained, lora_targets(trained, LoraConfig()), rank=4, alpha=32.0, seed=0)
    checkpoint.load_parameters(trained, saved | averages)
    tokens = torch.arange(12).view(1, 12)
    one = torch.zeros_like(tokens)
    patches = torch.zeros(0, 768, dtype=torch.uint8)
    inputs = (tokens, torch.arange(12.0).expand(2, 1, 12), one, one, one.bool(), one - 1, one - 1, patches)
    expected, found = trained(*inputs).logits, exported(*inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - load_model(base)(*inputs).logits).abs().max() > 1e-3


def test_a_checkpoint_is_exported_as_its_run_exports_it(tuned_run, tmp_path, capsys):
    tool = load_tool("export_checkpoint")
    assert tool.main([str(tuned_run), "--to", str(tmp_path / "new" / "out")]) == 0
    names = sorted(path.name for path in (tuned_run / "export").iterdir())
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "new" / "out" / name).read_bytes() == (tuned_run / "export" / name).read_bytes(), name
    assert tool.main([str(tuned_run), "--to", str(tmp_path / "new" / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert tool.main([str(tuned_run), "--step", "3"]) == 2
    assert "found ['step_00000002', 'step_00000004'], expected step 3" in capsys.readouterr().err
    shutil.copytree(tuned_run, tmp_path / "run")
    with (tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors").open("ab") as file:
        file.write(b"0")
    assert tool.main([str(tmp_path / "run"), "--step", "2"]) == 2
    assert "the file was damaged or changed" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "exports").iterdir())


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_with_groups_adapters_and_average_continues(data_root, tuned_run, base, tmp_path, stage):
    shutil.copytree(tuned_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "run" / "export")
    train(data_root, tmp_path / "run", *GROUPS, f"model.init_from={base}", f"deepspeed={stage}", by="torchrun")
    exports = [run / "export" / "model.safetensors" for run in (tuned_run, tmp_path / "run")]
    if stage == "zero2":
        assert log_lines(tmp_path / "run") == log_lines(tuned_run)
        assert exports[0].read_bytes() == exports[1].read_bytes()
        return
    for line, expected in zip(log_lines(tmp_path / "run"), log_lines(tuned_run), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    first, second = map(load_file, exports)
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


def test_frozen_weights_leave_a_half_precision_run_unrounded(data_root, base, tmp_path):
    overrides = ("tuning=decoder_frozen", f"model.init_from={base}", "optim.precision=bf16", "optim.steps=1")
    train(data_root, tmp_path, *overrides, "deepspeed=zero2")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    decoder = [name for name in before if name.startswith("decoder.")]
    assert all(torch.equal(before[name], after[name]) for name in decoder)
    assert any(not torch.equal(before[name], before[name].bfloat16().float()) for name in decoder)
    assert not torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])

"""Orthogonal updates for exactly the weights of the table, independent of rank count and ZeRO stage; and the schedule
that may be extended."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from muon_stages import gradient
from running import launcher, load_tool, start
from safetensors.torch import load_file
from test_eve import EVE
from test_groups import GROUPS
from test_train import SMALL, log_lines, train

from pixel_sail.config import (
    ConfigError,
    DeepSpeedConfig,
    GroupConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
    load_config,
)
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.planning.memory import training_state
from pixel_sail.training import muon
from pixel_sail.training.build import add_training_parts
from pixel_sail.training.muon import MuonAdamW, orthogonal_all
from pixel_sail.training.optim import build_optimizer, set_learning_rate
from pixel_sail.training.roles import PARAMETER_ROLES, is_orthogonal
from pixel_sail.training.schedule import is_stable, learning_rate

MUON = OptimConfig(optimizer="muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))

ORTHOGONAL_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("patch_projection", "piece_projection", "transposed", "mixed", "shuffled", "pointwise"),
    *(f"{name}.{index}" for name in ("pre_projector", "pixel_projector", "seg_projector") for index in (0, 2)),
)

KINDS = {
    "sail": {},
    "untied": {"tie_word_embeddings": False},
    "eve": EVE,
    "bilinear": {"upsampler": "bilinear"},
    "pixel_shuffle": {"upsampler": "pixel_shuffle"},
}


def orthogonal_names(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}


def expected_names(model):
    weights = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name for name in weights if name.removesuffix(".weight").endswith(ORTHOGONAL_LAYERS)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_one_role_and_is_trained_once(tiny_model, kind):
    model = tiny_model(**KINDS[kind])
    optimizer = build_optimizer(model, MUON)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert orthogonal_names(model, optimizer) == expected_names(model) != set()
    for name, parameter in model.named_parameters():
        matching = [role for role in PARAMETER_ROLES if re.fullmatch(role.pattern, name)]
        assert len(matching) == (1 if parameter.ndim > 1 else 0), name


def test_adapters_layers_towards_teachers_and_frozen_weights_are_not_orthogonal(tiny_model):
    model = tiny_model()
    add_training_parts(model, LoraConfig(rank=3), seed=0, teachers={"map": DistillSite(site="pixel_map", channels=5)})
    groups = {"frozen": GroupConfig(match=[r".*self_attn\.\w_proj\.weight", r".*mlp\.\w+_proj\.weight"], frozen=True)}
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", groups=groups))
    found = orthogonal_names(model, optimizer)
    assert found == expected_names(model)
    assert not any("lora_" in name or "distill" in name or name.startswith("decoder") for name in found)


def test_a_matrix_without_a_role_is_an_error(tiny_model):
    with pytest.raises(KeyError, match=r"new\.weight.*roles\.py"):
        is_orthogonal("new.weight", torch.Size((2, 3)))
    assert not is_orthogonal("new.bias", torch.Size((2,)))


def test_groups_keep_their_rate_and_decay_for_both_kinds(tiny_model):
    groups = {"head": GroupConfig(match=["mask_head"], lr_scale=10.0, weight_decay=0.3)}
    settings = OptimConfig(optimizer="muon", groups=groups, weight_decay=0.05, decay_all=True)
    settings.muon.lr_scale = 2.0
    model = tiny_model()
    optimizer = build_optimizer(model, settings)
    rates = set_learning_rate(optimizer, 1e-3)
    assert rates == {"optim/lr": 1e-3, "optim/lr/head": 1e-2, "optim/lr/head.muon": 2e-2, "optim/lr/default.muon": 2e-3}
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "mask_head.seg_projector.0.weight": (2e-2, 0.3),
        "mask_head.seg_projector.0.bias": (1e-2, 0.3),
        "decoder.layers.0.mlp.up_proj.weight": (2e-3, 0.05),
        "embed_tokens.weight": (1e-3, 0.05),
    }
    assert {name: of[id(model.get_parameter(name))] for name in expected} == expected


@pytest.mark.parametrize("steps", [1, 5])
def test_stacked_matrices_equal_single_ones_and_the_iteration(steps):
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4), (4, 6)]
    matrices = [torch.randn(shape) for shape in shapes]
    found = orthogonal_all(matrices, steps)
    for matrix, result in zip(matrices, found, strict=True):
        # On singular values, the iteration is a polynomial and needs no matrix product.
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(result.double(), u * s @ v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result, orthogonal_all([matrix], steps)[0], rtol=1e-5, atol=1e-6)


def test_large_stacks_are_cut(monkeypatch):
    matrices = [torch.randn(4, 6) for _ in range(5)]
    expected = orthogonal_all(matrices, 5)
    monkeypatch.setattr(muon, "STACK_ELEMENTS", 50)
    for found, whole in zip(orthogonal_all(matrices, 5), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def give_gradients(model, step):
    for name, parameter in model.named_parameters():
        parameter.grad = gradient(name, parameter.shape, step)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_update_equals_torch(tiny_model, monkeypatch, dtype, tolerance):
    """Three steps on the same gradients. torch computes in bfloat16, which is replaced for the exact comparison."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(muon, "working_dtype", lambda device: dtype)
    model = tiny_model()
    other = copy.deepcopy(model)
    optimizer = build_optimizer(model, MUON)
    names = sorted(name for name in orthogonal_names(model, optimizer) if model.get_parameter(name).ndim == 2)
    assert len(names) > 15
    reference = torch.optim.Muon(
        [other.get_parameter(name) for name in names], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    set_learning_rate(optimizer, 1e-2)
    for step in range(3):
        with torch.no_grad():
            give_gradients(model, step)
            for name in names:
                other.get_parameter(name).grad = model.get_parameter(name).grad.clone()
        optimizer.step()
        reference.step()
    for name in names:
        found, expected = (own.get_parameter(name).detach() - before[name] for own in (model, other))
        assert (found - expected).norm() < tolerance * expected.norm(), name


def test_all_other_weights_are_those_of_adamw_bit_for_bit(tiny_model):
    model = tiny_model()
    other = copy.deepcopy(model)
    optimizer = build_optimizer(model, MUON)
    plain = build_optimizer(other, OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98)))
    assert type(plain) is torch.optim.AdamW and isinstance(optimizer, MuonAdamW)
    for own in (optimizer, plain):
        set_learning_rate(own, 1e-2)
    for step in range(3):
        for own, stepped in ((model, optimizer), (other, plain)):
            give_gradients(own, step)
            stepped.step()
    orthogonal = orthogonal_names(model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) == (name not in orthogonal), name
        keys = {"momentum_buffer"} if name in orthogonal else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter].keys() == keys, name


def test_a_weight_without_gradient_or_with_a_zero_one_is_unchanged(tiny_model):
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.0))
    first, second = (model.get_parameter(f"decoder.layers.{layer}.mlp.up_proj.weight") for layer in range(2))
    second.grad = torch.zeros_like(second)
    before = first.detach().clone(), second.detach().clone()
    optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])


STAGES = ("none", "zero0", "zero1", "zero2", "zero1-bf16", "zero2-bf16")


@pytest.fixture(scope="module")
def updates(data_root, tmp_path_factory):
    """Weights before and after two updates, by number of processes and stage."""
    found = {}
    for ranks, by in ((1, "python"), (2, "torchrun")):
        folder = tmp_path_factory.mktemp(by)
        done = start([*launcher(by), "tests/muon_stages.py", str(folder), *STAGES], data_root)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found |= {(ranks, stage): load_file(folder / f"{stage}.safetensors") for stage in STAGES}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_right_weights_get_orthogonal_updates_at_every_stage(updates, ranks, stage):
    """Gradients have singular values 0.3 .. 1; Newton-Schulz maps them to 0.7 .. 1.2. With bfloat16, the float32
    master weights are compared."""
    tensors = updates[ranks, stage]
    names = {name.removeprefix("0.") for name in tensors if name.startswith("0.")}
    rate = 1e-2 * 8 / 3
    orthogonal = set()
    for name in names:
        before, after = tensors[f"0.{name}"], tensors[f"1.{name}"]
        if before.ndim < 2:
            continue
        update = ((1 - rate * 0.1) * before - after).flatten(1) / (rate * 0.2 * max(before.flatten(1).shape) ** 0.5)
        values = torch.linalg.svdvals(update)
        if values.min() > 0.65 and values.max() < 1.25:
            orthogonal.add(name)
    assert orthogonal == {name for name in names if name.removesuffix(".weight").endswith(ORTHOGONAL_LAYERS)}
    assert len(orthogonal) == 23


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_all_stages_and_numbers_of_processes_make_the_same_updates(updates, ranks, stage):
    """Two updates, so that the momentum counts. Stacks contain different matrices, so rounding differs."""
    expected, found = updates[1, "none"], updates[ranks, stage]
    assert expected.keys() == found.keys()
    for name in (name for name in expected if name.startswith("0.")):
        assert torch.equal(found[name], expected[name]), name
        for step in (1, 2):
            own = f"{step}.{name.removeprefix('0.')}"
            assert not torch.equal(found[own], found[name]), own
            torch.testing.assert_close(found[own], expected[own], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_run_with_groups_and_average_continues_bit_for_bit_and_elsewhere(data_root, tmp_path):
    """With ZeRO-2 on two processes equal to an uninterrupted run, on one process without DeepSpeed up to rounding."""
    whole = tmp_path / "whole"
    own = tuple(item for item in GROUPS if not item.startswith(("tuning=", "model.lora", "optim.groups.adapters")))
    own = ("optim=muon", *own)
    train(data_root, whole, *own, by="torchrun")
    for stage, by in (("zero2", "torchrun"), ("none", "python")):
        shutil.copytree(whole, tmp_path / stage)
        shutil.rmtree(tmp_path / stage / "checkpoints" / "step_00000004")
        shutil.rmtree(tmp_path / stage / "export")
        train(data_root, tmp_path / stage, *own, f"deepspeed={stage}", by=by)
        exports = [run / "export" / "model.safetensors" for run in (whole, tmp_path / stage)]
        if stage == "zero2":
            assert log_lines(tmp_path / stage) == log_lines(whole)
            assert exports[0].read_bytes() == exports[1].read_bytes()
        for line, expected in zip(log_lines(tmp_path / stage), log_lines(whole), strict=True):
            numbers = {key: value for key, value in line.items() if key != "data/padding_fraction"}
            assert numbers == pytest.approx({key: expected[key] for key in numbers}, rel=1e-4)
        first, second = map(load_file, exports)
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)
    line = log_lines(whole)[1]
    assert line["optim/lr/default.muon"] == pytest.approx(8 / 3 * line["optim/lr"])
    assert line["optim/lr/head.muon"] == pytest.approx(2 * 8 / 3 * line["optim/lr"])
    moments = load_file(whole / "checkpoints" / "step_00000004" / "optimizer.safetensors")
    keys = {name.partition(".")[0] for name in moments if name.endswith("q_proj.weight")}
    assert keys == {"momentum_buffer", "average"}


def test_plain_training_allocates_exactly_these_bytes(tiny_model):
    model = tiny_model().train()
    optimizer = build_optimizer(model, MUON)
    give_gradients(model, 0)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    count = sum(parameter.numel() for parameter in model.parameters())
    orthogonal = sum(model.get_parameter(name).numel() for name in orthogonal_names(model, optimizer))
    plain = DeepSpeedConfig(enabled=False)
    said = training_state(count, plain, precision="fp32", world_size=1, largest_gathered=0, orthogonal=orthogonal)
    assert held == said.moments == 8 * count - 4 * orthogonal


def test_a_plan_counts_the_moments_without_stage_3(capsys):
    tool = load_tool("plan_run")
    plans = []
    for optimizer in ("adamw", "muon"):
        own = ("sequences=0", "gpus=8", f"optim={optimizer}")
        assert tool.main(["model=sail_0_5b", "data=refcoco", *own, "--json", "-"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    adamw, mine = plans
    assert [row["sharding"] for row in mine["memory"]] == ["none", "zero0", "zero1", "zero2"]
    plain, saved = (plan["memory"][0]["moments"] for plan in plans)
    # Nearly all of the decoder's weights are matrices.
    assert plain - saved == pytest.approx(4 * mine["parameters"]["decoder"], rel=0.05)
    assert adamw["disk"]["checkpoint"] - mine["disk"]["checkpoint"] == pytest.approx(plain - saved)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("optim=muon", "deepspeed=zero3"), r"optim\.optimizer is 'muon' and deepspeed\.stage is 3.*expected.*zero2"),
        (("optim.optimizer=sgd",), r"optim\.optimizer is 'sgd'"),
        (("optim=default",), "adamw"),
        (("optim.muon.momentum=1",), r"optim\.muon\.momentum is 1"),
        (("optim.muon.lr_scale=0",), r"optim\.muon\.lr_scale is 0"),
        (("optim.muon.ns_steps=0",), r"optim\.muon\.ns_steps is 0"),
        (("optim.schedule=step",), r"optim\.schedule is 'step'"),
        (("optim.schedule=wsd", "optim.decay_fraction=0.97"), r"decay_fraction 0\.97, expected at most 1 together"),
        (("optim.decay_fraction=2",), r"optim\.decay_fraction is 2"),
    ],
)
def test_impossible_settings_are_rejected_by_name(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load_config("train", TrainConfig, ["name=x", *overrides])


def test_muon_without_deepspeed_may_have_any_stage_written_down():
    config = load_config("train", TrainConfig, ["name=x", "optim=muon", "deepspeed=none", "deepspeed.stage=3"])
    assert config.optim.optimizer == "muon" and config.optim.weight_decay == 0.05


def test_wsd_warms_up_stays_and_decays_linearly():
    config = OptimConfig(steps=100, lr=1.0, final_lr=0.2, warmup_fraction=0.1, schedule="wsd", decay_fraction=0.25)
    rates = np.array([learning_rate(step, config) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert (rates[10:76] == 1.0).all()
    np.testing.assert_allclose(rates[75:], 1.0 - 0.8 * np.arange(26) / 25)
    assert [step for step in range(101) if is_stable(step, config)] == list(range(10, 76))
    assert not is_stable(50, OptimConfig(steps=100))


@pytest.mark.slow
def test_a_stable_run_can_be_extended_and_equals_the_longer_run(data_root, tmp_path):
    wsd = ("deepspeed=none", "optim.schedule=wsd", "checkpoint.every=3")
    long = (*wsd, "optim.steps=8", "optim.decay_fraction=0.5", "optim.final_lr=1e-5")
    train(data_root, tmp_path / "whole", *long)
    short = (*wsd, "optim.steps=6", "optim.decay_fraction=0.34")
    train(data_root, tmp_path / "trunk", *short)
    shutil.copytree(tmp_path / "trunk" / "checkpoints" / "step_00000003", tmp_path / "run/checkpoints/step_00000003")
    train(data_root, tmp_path / "run", *long)
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")[3:]
    exports = [tmp_path / run / "export" / "model.safetensors" for run in ("whole", "run")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    for name, overrides in {"trunk": long, "whole": (*long, "optim.steps=9"), "run": (*long, "seed=4")}.items():
        command = [*launcher("python"), "scripts/train.py", *SMALL, f"run_dir={tmp_path / name}", *overrides]
        refused = start(command, data_root)
        assert refused.returncode == 2 and "another configuration" in refused.stderr, refused.stderr[-2000:]
        assert ("seed" if name == "run" else "optim.steps") in refused.stderr

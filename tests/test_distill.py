"""Distillation: the released losses, exact parts of a global mean, gradients only for the student, and runs with
and without teachers."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from one_device import step_on_one_device
from running import load_tool, start
from safetensors.torch import load_file
from shared_data import parity_folder
from test_train import SMALL, log_lines, train
from tiny_teachers import MASK2FORMER, SAM2

from pixel_sail.config import build
from pixel_sail.data.flat_batch import flatten_batch, unflatten_batch
from pixel_sail.distillation.cache import StudentGrid
from pixel_sail.distillation.choice import TeacherChoice
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.distillation.teachers import Teachers, load_teachers
from pixel_sail.losses.distill import DistillTerm, distill_loss, distill_losses, resized_features
from pixel_sail.losses.mask import PointSampling
from pixel_sail.losses.total import Counts, LossConfig, combine, count, loss_sums
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.types import TeacherTarget

CONFIG = LossConfig(points=PointSampling(num_points=32, oversample_ratio=1.0, importance_ratio=0.0))
SITES = {
    "map": DistillSite(site="pixel_map", channels=5),
    "states": DistillSite(site="patch_states", channels=3),
}
TERMS = (DistillTerm(name="map", weight=0.5), DistillTerm(name="states", weight=2.0))


def bilinear_by_hand(features, size):
    """Read an array [E, h, w] at the centers of `size` cells, repeating the border."""
    channels, rows, columns = features.shape
    resized = np.zeros((channels, *size))
    for y in range(size[0]):
        for x in range(size[1]):
            at = [(y + 0.5) * rows / size[0] - 0.5, (x + 0.5) * columns / size[1] - 0.5]
            at = [min(max(value, 0), limit - 1) for value, limit in zip(at, (rows, columns), strict=True)]
            low = [math.floor(value) for value in at]
            high = [min(value + 1, limit - 1) for value, limit in zip(low, (rows, columns), strict=True)]
            dy, dx = at[0] - low[0], at[1] - low[1]
            top = features[:, low[0], low[1]] * (1 - dx) + features[:, low[0], high[1]] * dx
            bottom = features[:, high[0], low[1]] * (1 - dx) + features[:, high[0], high[1]] * dx
            resized[:, y, x] = top * (1 - dy) + bottom * dy
    return resized


@pytest.mark.parametrize("size", [(6, 4), (3, 5), (2, 2)])
def test_the_loss_is_the_mean_square_against_bilinearly_resized_features(size):
    rng = np.random.default_rng(0)
    student, features = rng.standard_normal((*size, 2)), rng.standard_normal((2, 3, 5))
    expected = ((student - bilinear_by_hand(features, size).transpose(1, 2, 0)) ** 2).mean()
    found = distill_loss(torch.from_numpy(student), torch.from_numpy(features))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine", "normalized_mse", "kl"])
def test_images_of_one_size_have_together_the_loss_that_each_has_alone(kind):
    generator = torch.Generator().manual_seed(0)
    students = torch.randn(3, 4, 6, 5, generator=generator)
    features = torch.rand(3, 5, 2, 3, generator=generator)
    alone = torch.stack([distill_loss(*pair, kind) for pair in zip(students, features, strict=True)])
    torch.testing.assert_close(distill_losses(students, features, kind), alone)
    assert alone.std() > 0.001


def test_losses_by_hand():
    student = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    features = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])  # (1, 0) in both cells
    assert distill_loss(student, features).item() == pytest.approx((4 + 0 + 1 + 4) / 4)
    assert distill_loss(student, features, "cosine").item() == pytest.approx((0 + 1) / 2)
    # Mean 0 and variance 1 over the channels: (1, -1) in both cells.
    assert distill_loss(student, features, "normalized_mse").item() == pytest.approx((4 + 1 + 1 + 9) / 4, rel=1e-3)


def test_the_divergence_takes_channels_as_fractions_of_classes():
    # Cells: half of class 0 and half of class 1; all of class 1. Maps need not sum to 1.
    features = torch.tensor([[[3.0, 0.0]], [[3.0, 0.2]]])
    student = torch.tensor([[[0.0, 0.0], [0.0, math.log(3.0)]]])
    assert distill_loss(student, features, "kl").item() == pytest.approx((0.0 - math.log(0.75)) / 2, abs=1e-6)
    exact = torch.tensor([[[0.0, 0.0], [-50.0, 50.0]]])
    assert distill_loss(exact, features, "kl").item() == pytest.approx(0.0, abs=1e-6)
    assert distill_loss(student, torch.zeros(2, 1, 2), "kl").item() == 0.0


def test_the_cosine_does_not_see_lengths_and_half_precision_is_computed_in_float32():
    student, features = torch.randn(2, 3, 4), torch.randn(4, 2, 3)
    first, second = (distill_loss(student * factor, features * 7, "cosine") for factor in (1, 50))
    assert first.item() == pytest.approx(second.item(), rel=1e-5)
    assert distill_loss(student.bfloat16(), features.half()).dtype == torch.float32
    assert resized_features(features.half(), (2, 3)).dtype == torch.float32


def test_different_channels_are_rejected():
    with pytest.raises(ValueError, match="student has 4 channels, teacher 5"):
        distill_loss(torch.zeros(2, 3, 4), torch.zeros(5, 2, 3))


@pytest.fixture
def examples(processor, make_sample):
    """Three samples: with masks, with an image but no mask, without an image."""
    rng = np.random.default_rng(0)
    sampled = [
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(1, 2), sample_id="masks"),
        make_sample(rng, size_hw=(24, 16), masks_per_turn=(0,), sample_id="no masks"),
        make_sample(rng, size_hw=None, masks_per_turn=(), sample_id="text"),
    ]
    sampled[2] = (replace(sampled[2][0], turns=(replace(sampled[0][0].turns[0], answer="no", masks=()),)), None)
    return [
        (processor.encode_sample(s, image, independent_turns=True), None if image is None else np.array(image))
        for s, image in sampled
    ]


def with_targets(examples, chosen):
    """Return the examples with random stored features of the teachers that `chosen` names for each."""
    rng = np.random.default_rng(1)
    result = []
    for (example, _), names in zip(examples, chosen, strict=True):
        targets = []
        for name in names:
            features = torch.from_numpy(rng.standard_normal((SITES[name].channels, 3, 4))).half()
            targets.append(TeacherTarget(teacher=name, features_EYX=features))
        result.append(replace(example, teacher_targets=tuple(targets)))
    return result


NO_NETWORKS = Teachers(networks={})
EVERY_COMBINATION = [(["map", "states"], ["map"], []), ([], ["states"], []), (["states"], [], []), ([], [], [])]


def student(tiny_model):
    model = tiny_model()
    model.add_distill_head(SITES, seed=3)
    return model.train()


@pytest.mark.parametrize("chosen", EVERY_COMBINATION)
def test_a_step_runs_on_any_single_device(tiny_model, make_batch, examples, chosen):
    batch = make_batch(with_targets(examples, chosen))
    assert step_on_one_device(student(tiny_model), batch, torch.float32, CONFIG, TERMS) == []


@pytest.mark.parametrize("chosen", EVERY_COMBINATION)
def test_the_total_is_the_formula(tiny_model, make_batch, examples, chosen):
    model, batch = student(tiny_model), make_batch(with_targets(examples, chosen))
    output = model(**batch.model_inputs())
    sums = loss_sums(output, batch, CONFIG, TERMS, NO_NETWORKS.maps(batch))
    counts = count(batch, TERMS)
    total = combine(sums, counts, CONFIG, TERMS)
    plain = make_batch([example for example, _ in examples])
    without = loss_sums(model(**plain.model_inputs()), plain, CONFIG)
    expected = combine(without, count(plain), CONFIG).item()
    assert counts.distilled == tuple(sum(name in names for names in chosen) for name in ("map", "states"))
    hidden = output.hidden_BTD[0]
    for term in TERMS:
        losses = []
        for index, names in enumerate(chosen):
            if term.name not in names:
                continue
            grid, example = examples[index][0].grid_hw, examples[index][0]
            if term.name == "states":
                own = (batch.sample_index_BT[0] == index) & (batch.patch_index_BT[0] >= 0)
                read = hidden[own].view(*grid, -1)
            else:
                read = output.pixel_features[batch.image_samples.index(index)]
            layer = model.distill_head[f"{term.name}_distill_linear"]
            predicted = read @ layer.weight.T + layer.bias
            features = next(
                t.features_EYX for t in with_targets(examples, chosen)[index].teacher_targets if t.teacher == term.name
            )
            scale = 2 if term.name == "map" else 1
            assert predicted.shape[:2] == (grid[0] * scale, grid[1] * scale), example.sample_id
            target = bilinear_by_hand(features.float().numpy(), predicted.shape[:2]).transpose(1, 2, 0)
            losses.append(((predicted.detach().numpy() - target) ** 2).mean())
            assert sums.distill_SX[index, TERMS.index(term)].item() == pytest.approx(losses[-1], rel=1e-4)
        if losses:
            expected += term.weight * sum(losses) / len(losses)
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chosen", EVERY_COMBINATION)
def test_the_fast_way_has_the_losses_and_gradients_of_the_reference(tiny_model, make_batch, examples, chosen):
    found = []
    for kernels in (REFERENCE, Kernels()):
        model, batch = student(tiny_model), make_batch(with_targets(examples, chosen))
        model.use(kernels)
        output = model(**batch.model_inputs())
        sums = loss_sums(output, batch, CONFIG, TERMS, NO_NETWORKS.maps(batch))
        total = combine(sums, count(batch, TERMS), CONFIG, TERMS)
        (total + output.zero_loss).backward()
        found.append({"total": total.detach()} | {name: weight.grad for name, weight in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("chosen", EVERY_COMBINATION)
def test_every_parameter_has_a_gradient_whatever_was_chosen(tiny_model, make_batch, examples, chosen):
    model, batch = student(tiny_model), make_batch(with_targets(examples, chosen))
    output = model(**batch.model_inputs())
    sums = loss_sums(output, batch, CONFIG, TERMS, NO_NETWORKS.maps(batch))
    (combine(sums, count(batch, TERMS), CONFIG, TERMS) + output.zero_loss).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name, site in SITES.items():
        moved = model.distill_head[f"{name}_distill_linear"].weight.grad.abs().sum().item() > 0
        assert moved == any(name in names for names in chosen), site


def test_text_alone_leaves_the_linear_layers_with_a_zero_gradient(tiny_model, make_batch, examples):
    model, batch = student(tiny_model), make_batch([examples[2][0]])
    output = model(**batch.model_inputs())
    sums = loss_sums(output, batch, CONFIG, TERMS, {})
    (combine(sums, count(batch, TERMS), CONFIG, TERMS) + output.zero_loss).backward()
    for layer in model.distill_head.values():
        assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_two_micro_batches_with_global_counts_equal_one_batch(tiny_model, make_batch, examples):
    model = student(tiny_model)
    chosen = with_targets(examples, (["map", "states"], ["map"], []))
    batches = [make_batch([chosen[0]]), make_batch([chosen[1], chosen[2]])]
    shares = [count(batch, TERMS) for batch in batches]
    whole = Counts(
        tokens=sum(c.tokens for c in shares),
        masks=sum(c.masks for c in shares),
        samples=sum(c.samples for c in shares),
        distilled=tuple(map(sum, zip(*(c.distilled for c in shares), strict=True))),
    )

    def total(batch):
        sums = loss_sums(model(**batch.model_inputs()), batch, CONFIG, TERMS, NO_NETWORKS.maps(batch))
        return combine(sums, whole, CONFIG, TERMS)

    together = total(make_batch(chosen))
    torch.testing.assert_close(sum(total(batch) for batch in batches), together, rtol=1e-5, atol=1e-6)


def test_means_of_samples_count_a_sample_without_features_with_zero(tiny_model, make_batch, examples):
    model, config = student(tiny_model), replace(CONFIG, mean="sample")
    batch = make_batch(with_targets(examples, (["map", "states"], ["map"], [])))
    output = model(**batch.model_inputs())
    sums = loss_sums(output, batch, config, TERMS, NO_NETWORKS.maps(batch))
    plain = combine(replace(sums, distill_SX=torch.zeros(3, 2)), count(batch, TERMS), config, TERMS)
    expected = sum(term.weight * column.sum() / 3 for term, column in zip(TERMS, sums.distill_SX.T, strict=True))
    torch.testing.assert_close(
        combine(sums, count(batch, TERMS), config, TERMS) - plain, expected, rtol=1e-5, atol=1e-6
    )
    assert [int(n) for n in (sums.distill_SX > 0).sum(0)] == [2, 1]


def test_a_batch_crosses_processes_with_maps_scales_and_images(make_batch, examples):
    rng = np.random.default_rng(2)
    levels = torch.from_numpy(rng.integers(-127, 128, (5, 4, 6)).astype(np.int8))
    targets = (
        TeacherTarget(teacher="map", features_EYX=levels, scales_E=torch.rand(5)),
        TeacherTarget(teacher="states", features_EYX=None),
    )
    image = torch.from_numpy(examples[1][1])
    batch = make_batch(
        [examples[2][0], replace(examples[0][0], teacher_targets=targets[:1])],
        [replace(examples[1][0], teacher_targets=targets, image_HW3=image)],
    )
    assert batch.teacher_names == ("map", "map", "states") and batch.teacher_images == (0, 1, 1)
    assert batch.original_image_index == (1,) and torch.equal(batch.original_images[0], image)
    assert batch.model_inputs()["distilled_images"] == {"map": (0, 1), "states": (1,)}
    arrived = unflatten_batch(flatten_batch(batch)).to("cpu")
    for name, value in vars(batch).items():
        found = getattr(arrived, name)
        if isinstance(value, tuple):
            assert len(found) == len(value)
            for one, other in zip(value, found, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, found) and value.dtype == found.dtype


def test_a_batch_without_teachers_asks_the_model_for_nothing_new(make_batch, examples):
    assert "distilled_images" not in make_batch([examples[0][0]]).model_inputs()


def settings(**changes):
    model = {
        "_target_": "pixel_sail.distillation.mask2former.mask2former",
        "random": True,
        "architecture": MASK2FORMER,
        "shortest_edge": 64,
        "longest_edge": 110,
    }
    return TeacherSettings(**({"model": model, "channels": 32} | changes))


def test_gradients_reach_the_student_and_never_the_teacher(tiny_model, tiny_config, make_batch, examples):
    teachers = load_teachers(
        {"mask2former": settings()},
        tiny_config,
        build,
        sources=[],
        allow_random=True,
        device=torch.device("cpu"),
    )
    network = teachers.networks["mask2former"].network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = tiny_model()
    model.add_distill_head({"mask2former": DistillSite(site="pixel_map", channels=32)}, seed=0)
    target = TeacherTarget(teacher="mask2former", features_EYX=None)
    example, image = examples[0]
    batch = make_batch([replace(example, teacher_targets=(target,), image_HW3=torch.from_numpy(image))])
    terms = (DistillTerm(name="mask2former"),)
    maps = teachers.maps(batch)
    assert not maps["mask2former"][0].requires_grad
    sums = loss_sums(model(**batch.model_inputs()), batch, CONFIG, terms, maps)
    sums.distill_SX.sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    for parameter in (model.embed_tokens.weight, model.mask_head.pixel_projector[0].weight):
        assert parameter.grad.abs().sum() > 0
    assert not [name for name, _ in model.named_modules() if "teacher" in name]


def test_the_head_changes_no_other_weight_and_no_random_number(tiny_model):
    plain = tiny_model(seed=5)
    model = tiny_model(seed=5)
    before = torch.get_rng_state()
    model.add_distill_head(SITES, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    own, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert list(own)[: len(expected)] == list(expected)
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert [name for name in own if name not in expected] == [
        f"distill_head.{name}_distill_linear.{part}" for name in ("map", "states") for part in ("weight", "bias")
    ]
    again = tiny_model(seed=6)
    again.add_distill_head({"states": SITES["states"]}, seed=5)
    states = "distill_head.states_distill_linear.weight"
    assert torch.equal(dict(again.named_parameters())[states], own[states])


GRID = StudentGrid(site="pixel_map", patch_size=8, max_long_side=64, cells_per_patch=2)


def test_images_are_sampled_by_seed_epoch_and_index_in_the_given_fraction():
    choices = [TeacherChoice(name=name, fraction=0.3, grid=GRID) for name in ("a", "b")]
    seeds = np.random.default_rng(0).integers(2**62, size=4000).tolist()
    first, second = ([c.takes("s", point_seed=seed, has_masks=False) for seed in seeds] for c in choices)
    assert first == [choices[0].takes("s", point_seed=seed, has_masks=True) for seed in seeds]
    assert np.mean(first) == pytest.approx(0.3, abs=0.03)
    # Independent, so that two teachers do not always occur together.
    assert np.mean(np.logical_and(first, second)) == pytest.approx(0.09, abs=0.02)


def test_sources_and_masks_restrict_the_choice():
    choice = TeacherChoice(name="a", sources=frozenset({"x"}), masks_only=True, grid=GRID)
    taken = [(s, m) for s in "xy" for m in (True, False) if choice.takes(s, point_seed=1, has_masks=m)]
    assert taken == [("x", True)]


def teacher_overrides(*, loss="mse"):
    """Return command-line words for two tiny random teachers."""

    def node(values):
        if isinstance(values, dict):
            return "{" + ",".join(f"{key}:{node(value)}" for key, value in values.items()) + "}"
        if isinstance(values, list):
            return "[" + ",".join(map(node, values)) + "]"
        return json.dumps(values) if not isinstance(values, str) else values

    mask2former = settings().model
    sam2 = {"_target_": "pixel_sail.distillation.sam2.sam2", "random": True, "side": 64, "architecture": SAM2}
    return (
        "distillation=sam2_mask2former",
        "allow_random_teachers=true",
        f"+distillation.mask2former.model={node(mask2former)}",
        "distillation.mask2former.channels=32",
        "distillation.mask2former.fraction=0.5",
        f"distillation.mask2former.loss={loss}",
        "distillation.mask2former.precision=fp32",
        f"+distillation.sam2.model={node(sam2)}",
        "distillation.sam2.channels=16",
        "distillation.sam2.sources=[refshapes]",
        "distillation.sam2.precision=fp32",
        "distillation.sam2.weight=1",
    )


def test_a_run_with_teachers_continues_bit_for_bit_and_exports_without_them(data_root, tmp_path):
    overrides = ("deepspeed=none", "optim.steps=4", *teacher_overrides())
    train(data_root, tmp_path / "whole", *overrides)
    train(data_root, tmp_path / "parts", *overrides, "checkpoint.stop_after=2", "data.num_workers=1")
    saved = load_file(next((tmp_path / "parts" / "checkpoints").rglob("model.safetensors")))
    assert {name for name in saved if "distill" in name} == {
        f"distill_head.{name}_distill_linear.{part}" for name in ("mask2former", "sam2") for part in ("weight", "bias")
    }
    train(data_root, tmp_path / "parts", *overrides)
    lines = log_lines(tmp_path / "parts")
    assert lines == log_lines(tmp_path / "whole")
    assert all(line["loss/distill/sam2"] > 0 for line in lines)
    assert all(0 < line["data/distill/mask2former_images"] < line["data/samples"] for line in lines[:1])
    assert all(line["data/distill/sam2_images"] == line["refshapes/samples"] for line in lines)
    assert any("refshapes/distill/sam2" in line for line in lines)
    assert not any("groupshapes/distill/sam2" in line for line in lines)
    for line in lines:
        parts = (
            line["loss/text"] + 2 * line["loss/bce"] + 2 * line["loss/dice"] + 0.5 * line["loss/distill/mask2former"]
        )
        assert line["loss/total"] == pytest.approx(parts + line["loss/distill/sam2"], rel=1e-6)
    exported = load_file(tmp_path / "whole" / "export" / "model.safetensors")
    assert not [name for name in exported if "distill" in name]
    assert "distill" not in (tmp_path / "whole" / "export" / "config.json").read_text()


def test_teachers_leave_the_first_losses_of_a_run_as_they_are_and_add_their_own(data_root, tmp_path):
    # A teacher of the pixel map keeps the mask head's last layer apart: with folded masks the last bits differ.
    both = ("deepspeed=none", "optim.steps=1", "kernels.mask_head=maps")
    train(data_root, tmp_path / "none", *both)
    train(data_root, tmp_path / "some", *both, *teacher_overrides())
    (none,), (some,) = log_lines(tmp_path / "none"), log_lines(tmp_path / "some")
    assert not [key for key in none if "distill" in key]
    assert {key: some[key] for key in none if key not in ("loss/total", "optim/grad_norm")} == {
        key: none[key] for key in none if key not in ("loss/total", "optim/grad_norm")
    }
    assert some["loss/total"] > none["loss/total"]
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    assert config["distillation"] == {}
    (state,) = (tmp_path / "none" / "checkpoints").rglob("state.json")
    # A run without teachers can be resumed by a version without them, and vice versa.
    assert not {"distillation", "allow_random_teachers"} & json.loads(state.read_text())["config"].keys()


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(data_root, tmp_path):
    overrides = ("optim.steps=3", *teacher_overrides(loss="cosine"))
    train(data_root, tmp_path / "one", *overrides)
    train(data_root, tmp_path / "two", *overrides, by="torchrun")
    for line, expected in zip(log_lines(tmp_path / "two"), log_lines(tmp_path / "one"), strict=True):
        without = {key: value for key, value in line.items() if key != "data/padding_fraction"}
        assert without == pytest.approx({key: expected[key] for key in without}, rel=1e-4)


def test_a_run_with_random_teachers_is_rejected_unless_allowed(data_root, tmp_path):
    overrides = [item for item in teacher_overrides() if "allow_random" not in item]
    done = start([sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", *overrides], data_root)
    assert done.returncode == 2 and "its weights are random" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def parity_tool():
    return load_tool("check_parity")


@pytest.mark.parametrize("name", ["p16_tied", "p32_untied"])
def test_recorded_losses_of_the_released_code_are_reproduced(parity_tool, name):
    folder = parity_folder(name)
    model, cases = parity_tool.load_reference(folder, False), parity_tool.load_cases(folder)
    report = parity_tool.Report()
    parity_tool.compare_forward(report, cases, model)
    for teacher in ("mask2former", "sam2", "radio"):
        assert report.errors[f"distill.{teacher}"] <= 1e-6
    assert all(f"distill.{teacher}.loss" in case for case in cases for teacher in ("mask2former", "sam2", "radio"))
    # The comparison detects a teacher changed by a thousandth, and compares these losses to 1e-5.
    cases[0]["distill.sam2.teacher"] = cases[0]["distill.sam2.teacher"] * 1.001
    parity_tool.compare_forward(report, cases, model)
    assert report.errors["distill.sam2"] > 1e-5
    assert not parity_tool.print_report("distillation", report, 1e-4)

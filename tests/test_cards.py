"""Planned costs in cards and stages equal the planner's, and schedules marked as the release's equal the release's."""

import json
import re

import pytest
from running import ROOT, load_tool
from test_configs import names
from test_released import recipe

from pixel_sail.config import TrainConfig, load_config

CARDS = [name for name in names("experiment") if name.startswith("pixel_sail_")]


def header(card):
    """Return the comments of a card as one line."""
    lines = (ROOT / "configs" / "experiment" / f"{card}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def plan(arguments, capsys):
    """Return what tools/plan_run.py plans."""
    assert load_tool("plan_run").main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def cost_of(planned):
    """Return the cost as written in a card."""
    time = planned["time"]
    (chosen,) = [row for row in planned["memory"] if row["chosen"]]
    hours = f"{time['hours']:.2f} h, {time['gpu_hours']:.1f} GPU-hours"
    spent = hours if time["hours"] >= 0.1 else f"{60 * time['hours']:.1f} minutes"
    machine = f"{time['gpus']} {time['gpu'].upper()} at an assumed MFU of {time['mfu']}"
    return f"planned {spent} on {machine}, {chosen['peak'] / 1e9:.1f} GB on each"


@pytest.mark.parametrize("card", CARDS)
def test_the_cost_line_of_a_card_is_what_its_command_plans(card, capsys):
    text = header(card)
    (command,) = re.findall(r"\(tools/plan_run\.py ([^)]*)\)", text)
    assert command.split()[0] == f"experiment={card}"
    cost = cost_of(plan(command.split(), capsys))
    assert cost in text, f"configs/experiment/{card}.yaml must say: {cost}"


CHECKPOINTED = "optim.activation_checkpointing=layers"
MASKLESS = "images_with_masks=0"
STAGES = {
    "`pretrain`, patch": ("stage=pretrain", MASKLESS),
    "`pretrain`, everything": ("stage=pretrain", MASKLESS),
    "`sft`": ("stage=sft", MASKLESS),
    "`cotrain`": ("stage=cotrain", "distillation=sam2_mask2former"),
    "`finetune`": ("stage=finetune",),
}
"""Row of docs/stages.md -> overrides of the planned runs that the row lists."""
SIZES = {
    "sail_0_5b": {"always": (), "`cotrain`": ()},
    "sail_3b": {"always": (CHECKPOINTED,), "`cotrain`": ("data=cotrain_3b", "data.samples_per_step=256")},
}


def test_the_gpu_hours_of_the_stages_are_those_of_the_planner(capsys):
    page = (ROOT / "docs" / "stages.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(STAGES)
    planned = {}
    for row, (start, overrides) in zip(rows, STAGES.items(), strict=True):
        assert row.startswith(f"| {start}")
        for column, (model, own) in enumerate(SIZES.items()):
            arguments = ("name=x", f"model={model}", *overrides, *own["always"], *own.get(start, ()))
            if arguments not in planned:
                machine = ("gpu=a100", "gpus=32", "mfu=0.4", "sequences=0")
                planned[arguments] = plan([*arguments, *machine], capsys)["time"]["gpu_hours"]
            found = row.strip("| ").split(" | ")[4 + column]
            assert found == f"{planned[arguments]:.1f}", f"docs/stages.md, {start}, {model}"


@pytest.mark.parametrize(
    "overrides", [*([f"experiment={card}"] for card in CARDS), ["stage=cotrain"], ["stage=finetune"]]
)
def test_schedules_marked_as_released_are_the_released_one(overrides):
    optim = load_config("train", TrainConfig, ["model=sail_0_5b", *overrides]).optim
    found = (optim.lr, optim.final_lr, optim.warmup_fraction, optim.weight_decay, optim.decay_all, optim.max_grad_norm)
    assert found == (4e-5, 0.0, 0.05, 0.05, True, 1.0)
    assert tuple(optim.betas) == (0.9, 0.999) and not optim.groups


RELEASED = {
    **{f"pixel_sail_{size}": (8, 512) for size in ("0_5b", "3b")},
    "pixel_sail_7b": (8, 256),
    "pixel_sail_0_5b_refcoco": (32, 512),
    "pixel_sail_0_5b_grefcoco": (32, 512),
    "pixel_sail_0_5b_reasonseg": (4, 512),
    "pixel_sail_0_5b_refcocog_captions": (8, 256),
    "pixel_sail_3b_refcoco": (16, 512),
    "pixel_sail_3b_grefcoco": (32, 512),
    "pixel_sail_3b_refcocog_captions": (8, 256),
}
"""Card -> accumulated micro-batches and mask width of the released configuration."""


@pytest.mark.parametrize("card", CARDS)
def test_a_card_lists_its_differences_from_the_release(card):
    architecture = load_config("train", TrainConfig, [f"experiment={card}"]).model.architecture
    accumulation, width = RELEASED[card]
    ours = "as here" if width == architecture.mask_dim else f"(ours: {architecture.mask_dim}"
    assert f"released accumulation {accumulation}, mask width {width} {ours}" in re.sub(" +", " ", header(card))


@pytest.mark.parametrize("card", CARDS)
def test_a_card_and_the_recipe_cover_all_differences_from_the_release(card):
    """Each setting of the recipe is the card's, or named in its line of differences from the release."""
    text = header(card)
    plain = load_config("train", TrainConfig, [f"experiment={card}"])
    assert f"scripts/train.py experiment={card} recipe=released" in text.replace("\\ ", "")
    assert re.search(rf"scripts/evaluate\.py checkpoint=runs/{card} [^#]*recipe=released", text)
    assert "docs/faq.md lists every difference" in text
    for setting in recipe("train"):
        is_own = load_config("train", TrainConfig, [f"experiment={card}", setting]) == plain
        assert is_own or f"{setting} (by itself: " in text, setting


PASS = {
    "": {"0_5b": 139_416 * 16, "3b": 72_136 * 32, "7b": 72_136 * 32},
    "refcoco": 4 * (16_994 + 16_992 + 21_899),
    "grefcoco": 4 * 16_994,
    "reasonseg": 16 * 239,
    "refcocog_captions": 4 * 21_899,
}
"""Samples of a pass. Co-training: iterations of the released checkpoint times GPUs, inferred. Fine-tunings: one for
each image of the train split, times the released repeats."""
RELEASED_GPUS = {"0_5b": 16, "3b": 32, "7b": 32}
"""Inferred from the names of checkpoints, see docs/stages.md; for the 7B model our choice."""


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_one_pass_in_steps_of_the_released_size(card, capsys):
    size, dataset = re.fullmatch(r"pixel_sail_(0_5b|3b|7b)_?(.*)", card).groups()
    items = PASS[dataset] if dataset else PASS[""][size]
    text = header(card)
    (command,) = re.findall(r"\(tools/plan_run\.py ([^)]*)\)", text)
    length = plan(command.split(), capsys)["length"]
    assert length["items"] == items and length["is_assumed"]
    assert length["passes"] == pytest.approx(1.0, abs=0.02)
    samples = RELEASED[card][0] * RELEASED_GPUS[size]
    assert length["wanted_samples_per_step"] == samples
    assert length["samples_per_step"] == pytest.approx(samples, rel=0.02)
    assert f"{length['steps']:,} steps" in text and f"{samples:,} samples a step" in text
    assert f"{length['global_batch_size']} sequences of at most 4 samples" in text
    assert size == "7b" or "Inferred: " in text


@pytest.mark.parametrize("stage", ["pretrain", "sft", "cotrain", "finetune"])
def test_a_stage_is_one_pass(stage, capsys):
    arguments = ["name=x", "model=sail_0_5b", f"stage={stage}", "gpus=32", "sequences=0"]
    length = plan(arguments, capsys)["length"]
    assert length["passes"] == pytest.approx(1.0, abs=0.02)
    assert f"{length['steps']:,}" in (ROOT / "docs" / "stages.md").read_text()


@pytest.mark.parametrize("card", CARDS)
def test_a_card_describes_training_and_evaluation(card):
    text = header(card)
    assert f"scripts/train.py experiment={card} " in text
    assert f"scripts/evaluate.py checkpoint=runs/{card} " in text
    is_row = "Pixel-SAIL" in text and re.fullmatch(r"pixel_sail_(0_5b|3b|7b)", card)
    assert not is_row or re.search(rf"tools/make_tables\.py \S+=runs/{card} ", text)

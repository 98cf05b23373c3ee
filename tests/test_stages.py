"""Training stages: each starts from the previous one, all configs compose, and the rehearsal covers their losses."""

import json
import re

import pytest
from running import load_tool
from test_configs import bind_targets, names

from pixel_sail.config import FRESH_PARTS, ConfigError, TrainConfig, build, load_config

START_OF = {"pretrain": None, "sft": "stage_pretrain", "cotrain": "stage_sft", "finetune": "stage_cotrain"}
SIZES = ("sail_0_5b", "sail_3b")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", names("stage"))
def test_a_stage_starts_from_the_export_of_the_previous_one_of_its_size(stage, size):
    config = load_config("train", TrainConfig, [f"model={size}", f"stage={stage}", "paths.runs=r"])
    assert config.name == f"stage_{stage}_{size}" + ("_refcoco" if stage == "finetune" else "")
    assert config.run_dir == f"r/{config.name}"
    start = START_OF[stage]
    assert config.model.init_from == (start and f"r/{start}_{size}/export")
    bind_targets(config.data.sources)


def test_runs_of_other_sizes_and_datasets_have_other_folders():
    found = [
        load_config("train", TrainConfig, [f"model={size}", "stage=finetune", f"data={data}"]).run_dir
        for size in SIZES
        for data in ("refcoco", "grefcoco", "reasonseg", "refcocog_captions")
    ]
    assert len(set(found)) == len(found)


def test_data_of_the_command_line_override_those_of_a_stage():
    config = load_config("train", TrainConfig, ["model=sail_0_5b", "stage=finetune", "data=grefcoco"])
    assert list(config.data.sources) == ["grefcoco"]


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if name.startswith("pixel_sail_")])
def test_the_header_of_a_card_names_its_own_command_and_start(experiment):
    config = load_config("train", TrainConfig, [f"experiment={experiment}", "paths.runs=r"])
    size, _, dataset = experiment.removeprefix("pixel_sail_").partition("b")
    is_eve = config.model.architecture.base == "eve"
    base = "evev2_base" if is_eve else f"stage_sft_sail_{size}b/export"
    start = f"pixel_sail_{size}b/export" if dataset else base
    # A base may have another architecture, a model trained on masks may not.
    assert config.model.init_fresh == ([] if dataset else list(FRESH_PARTS))
    assert config.model.init_from == f"r/{start}"
    assert bool(config.distillation) == (not dataset and not is_eve)
    assert (config.optim.precision, config.optim.lr, config.optim.warmup_fraction) == ("bf16", 4e-5, 0.05)
    assert config.model.architecture.mask_dim == (256 if is_eve else 512)


def test_the_rehearsal_composes_and_holds_out_its_evaluation_data(data_root, tmp_path):
    tool = load_tool("rehearse_stages")
    stages = tool.stages(data_root, 2)
    assert [stage.name for stage in stages] == ["pretrain_patches", "pretrain", "sft", "cotrain", "finetune"]
    for stage in stages:
        trained = load_config("train", TrainConfig, [*tool.COMMON, *stage.overrides])
        judged = load_config("train", TrainConfig, [*tool.COMMON, *stage.overrides, *stage.held_out])
        sources = [name for name in judged.data.sources if judged.data.repeats.get(name, 1.0) > 0]
        assert sources and all(judged.data.sources[name] != trained.data.sources[name] for name in sources)
    # Data of each loss: text for captions and chat, both for the mix, masks for referring segmentation.
    figures = {stage.name: stage.figures for stage in stages}
    assert figures["pretrain_patches"] == figures["pretrain"] == figures["sft"] == ("text",)
    assert figures["cotrain"] == ("text", "bce", "dice") and figures["finetune"] == ("bce", "dice")
    tool.NUM_HELD_OUT = 4
    tool.write_files(data_root, tmp_path)
    for name in ("captions", "chat", "questions"):
        train, held = (json.loads((tmp_path / f"{name}{kind}.json").read_text()) for kind in ("", "_held_out"))
        assert len(held) == 4 and len(train) > 4 and not [one for one in held if one in train]


def test_the_stages_train_one_after_another(data_root, tmp_path, monkeypatch, capsys):
    """Two steps each, four with masks: every stage runs, starts from the previous one and prints its losses."""
    tool = load_tool("rehearse_stages")
    monkeypatch.setattr(tool, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(tool, "BATCHES", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tool.main(["--data", str(data_root), "--out", str(tmp_path), "--steps", "2"]) in (0, 1)
    reported = re.findall(r"^(\w+) +held-out (\w+) +([\d.]+) -> ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    stages = tool.stages(data_root, 2)
    assert [(name, figure) for name, figure, _, _ in reported] == [
        (own.name, one) for own in stages for one in own.figures
    ]
    assert all(float(before) > 0 and float(after) > 0 and before != after for _, _, before, after in reported)
    start = None
    for stage in stages:
        run_dir = tmp_path / stage.name
        assert json.loads((run_dir / "config.json").read_text())["model"]["init_from"] == start
        last = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])
        assert last["step"] == (4 if "bce" in stage.figures else 2)
        start = str(run_dir / "export")


def test_a_reported_loss_is_the_mean_over_tokens_and_masks(data_root):
    tool = load_tool("rehearse_stages")
    overrides = ["experiment=quickstart", f"paths.data={data_root}", "data.micro_batch_size=2"]
    found = tool.held_out_losses(overrides)
    # An untrained model of 448 words gives every token about the logarithm of their number; masks start at chance.
    assert found["text"] == pytest.approx(6.1, abs=0.4)
    assert 0.3 < found["bce"] < 2.0 and 0.3 < found["dice"] < 1.0


def test_an_entry_without_a_function_is_rejected_by_name():
    with pytest.raises(ConfigError, match=r"data\.sources\.refshapes: found no _target_"):
        build({"question_style": "short"}, "data.sources.refshapes")

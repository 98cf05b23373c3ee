"""Files that commit bb2d4bb wrote are still read: runs resume, and exports, predictions, logs and sweeps are used.

`tests/old_format/README.md` says how the files were made. This file has today's names only; the old names are in those
files, and `pixel_sail/renamed.py` maps one to the other.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, environment, load_tool
from safetensors.torch import load_file

from pixel_sail import config
from pixel_sail.config import ConfigError, EvalConfig, TrainConfig, load_config
from pixel_sail.evaluation.run import run_evals
from pixel_sail.predict_files import predict_command_config, predict_files
from pixel_sail.renamed import current_log_line, renamed_override
from pixel_sail.training.average import AVERAGE
from pixel_sail.training.log import TIMING_FIELDS

OLD = Path(__file__).parent / "old_format"
STOPPED, FINISHED = Path("runs/run"), Path("runs/whole")

RUN = {
    "experiment": "quickstart",
    "model": "tiny",
    "optim": "adamw",
    "model.init_from": "teacher",
    "model.architecture.hidden_size": 8,
    "model.architecture.intermediate_size": 16,
    "model.architecture.num_hidden_layers": 2,
    "model.architecture.num_attention_heads": 2,
    "model.architecture.num_key_value_heads": 1,
    "model.architecture.initializer_range": 0.2,
    "model.architecture.patch_size": 8,
    "model.architecture.max_long_side": 64,
    "model.architecture.mask_dim": 8,
    "data": "refshapes",
    "source@data.sources": "[refshapes,groupshapes,osprey_short_form]",
    "data.sources.refshapes.expressions_per_image": 6,
    "data.sources.refshapes.question_style": "short",
    "data.sources.groupshapes.expressions_per_image": 12,
    "data.sources.groupshapes.question_style": "short",
    "data.sources.osprey_short_form.annotations": "data/refshapes/osprey/osprey_short_form.json",
    "data.sources.osprey_short_form.image_dirs": "[data/refshapes/images/train2014]",
    "data.repeats.groupshapes": 0.5,
    "data.decontamination.held_out": "[{root: data/refshapes, dataset: refshapes, split_by: unc, splits: [val,testA]}]",
    "data.packing.seq_len": 640,
    "data.packing.independent_turns": "true",
    "data.packing.max_samples": 2,
    "data.packing.packing_buffer": 2,
    "data.packing.balance": "flops",
    "data.global_batch_size": 2,
    "data.micro_batch_size": 1,
    "data.stream_rounds": 2,
    "data.max_skipped_fraction": 0.01,
    "data.num_workers": 0,
    "loss.points.num_points": 32,
    "loss.points.oversample_ratio": 1.0,
    "loss.points.importance_ratio": 0.0,
    "loss.dice": 2.0,
    "distillation": "sam2_mask2former",
    "distillation.mask2former.model._target_": "pixel_sail.distillation.ours.ours",
    "distillation.mask2former.model.weights": "teacher",
    "distillation.mask2former.channels": 8,
    "distillation.mask2former.precision": "fp32",
    "distillation.mask2former.fraction": 0.75,
    "distillation.sam2.model._target_": "pixel_sail.distillation.ours.ours",
    "distillation.sam2.model.weights": "teacher",
    "distillation.sam2.channels": 8,
    "distillation.sam2.precision": "fp32",
    "distillation.sam2.loss": "cosine",
    "distillation.sam2.cache": "cache/sam2",
    "allow_random_teachers": "false",
    "kernels.recompute_elementwise": "false",
    "kernels.attention": "segments",
    "kernels.experts": "mixed",
    "optim.steps": 6,
    "optim.lr": 1e-4,
    "optim.betas": "[0.9,0.98]",
    "optim.ema_decay": 0.9,
    "deepspeed": "none",
    "checkpoint.max_rollbacks": 2,
    "checkpoint.every": 100,
    "metric_bounds.loss_at_600.after": 2,
    "metric_bounds.loss_at_600.low": 0,
    "metric_bounds.loss_at_600.high": 0.01,
    "metric_bounds.loss_at_1600.metric": "loss/text",
    "metric_bounds.loss_at_1600.after": 5,
    "metric_bounds.loss_at_1600.low": 0,
    "metric_bounds.loss_at_1600.high": 100,
    "metric_bounds.loss_at_1600.action": "stop",
    "evals": "[refshapes_val]",
    "validation.every": 3,
    "validation.max_images": 1,
    "predict.answer": "forced",
    "predict.prompt": "short",
    "predict.max_batch_tokens": 4096,
    "log.every": 1,
    "log.tensorboard": "false",
    "log.progress": "false",
    "name": "run",
    "seed": 0,
}
"""The settings of the run of `old_format/make.sh` under today's keys, including those of its `experiment`."""

FORCED = ("predict.answer=forced", "predict.max_batch_tokens=4096")
EVALS = {
    "refshapes_val": FORCED,
    "refshapes_val_language_blind": FORCED,
    "refshapes_region_choice": ("predict.max_new_tokens=4",),
}
"""Today's name of each eval that was scored, and how it was asked."""


TOLERANCE = 1e-5
"""Relative: since commit ad1a7c1 the mask losses of all images are summed at once, which rounds differently."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change into a copy of the old files: they refer to each other by relative paths."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("PIXEL_SAIL_DATA", "data")
    monkeypatch.setenv("PIXEL_SAIL_RUNS", "runs")
    return tmp_path / "old"


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run):
    """Return the lines of a log under today's names, without what depends on the machine."""
    lines = map(current_log_line, read_lines(run / "log.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def test_a_stopped_run_resumes_to_the_log_lines_and_weights_of_the_old_code(folder):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *(f"{key}={value}" for key, value in RUN.items())]
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PIXEL_SAIL_RUNS": "runs"}
    done = subprocess.run(command, env=environment(Path("data")) | own, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "continuing from runs/run/checkpoints/step_00000003" in done.stderr
    assert "rollback to step 3" in done.stderr
    found, expected = numbers(STOPPED), numbers(FINISHED)
    assert [line["step"] for line in expected] == [1, 2, 2, 3, 3, 4, 5, 6, 6]
    for line, then in zip(found, expected, strict=True):
        assert line == pytest.approx(then, rel=TOLERANCE) if "metric_bounds" not in then else line == then
    tensors = [load_file(run / "export" / "model.safetensors") for run in (STOPPED, FINISHED)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        torch.testing.assert_close(tensors[0][name], tensor, rtol=TOLERANCE, atol=1e-7)


def test_the_old_export_gives_the_old_predictions_and_scores(folder, capsys):
    for name, how in EVALS.items():
        options = [f"checkpoint={FINISHED}", "output=new", f"evals=[{name}]", "resamples=20", "examples=0", *how]
        run_evals(load_config("evaluate", EvalConfig, [*options, "progress=false"]))
    rows = [
        {row["eval"]: row for row in read_lines(where / "results.jsonl")}
        for where in (FINISHED / "evaluation", Path("new"))
    ]
    for old, new in zip(rows[0].values(), rows[1].values(), strict=True):
        files = [FINISHED / "evaluation" / old["eval"], Path("new") / new["eval"]]
        assert read_lines(files[1] / "predictions.jsonl") == read_lines(files[0] / "predictions.jsonl")
        for key in ("scores", "intervals", "count", "weights_sha256", "questions_sha256"):
            assert new[key] == old[key], (old["eval"], key)
    capsys.readouterr()
    assert load_tool("compare_runs").main([str(FINISHED / "evaluation"), "new"]) == 0
    said = capsys.readouterr().out
    assert "refshapes_val (A " in said and "refshapes_region_choice (A " in said


def test_old_predictions_are_scored_again(folder, capsys):
    for row in read_lines(FINISHED / "evaluation" / "results.jsonl"):
        assert load_tool("score").main(["--evaluated", str(FINISHED / "evaluation" / row["eval"])]) == 0
        assert json.loads(capsys.readouterr().out) == row["scores"]


def test_the_predictor_gives_the_old_output(folder):
    (old,) = [json.loads(path.read_text()) for path in Path("predict").glob("*.json")]
    arguments = [
        f"checkpoint={FINISHED}",
        "--image=data/refshapes/images/train2014/COCO_train2014_000000000001.jpg",
        f"--question={old['question']}",
        *FORCED,
    ]
    list(predict_files(predict_command_config([*arguments, "--box=10,20,90,80", "output=new"])))
    (new,) = [json.loads(path.read_text()) for path in Path("new").glob("*.json")]
    assert {**new, "timing": None} == {**old, "timing": None}


def test_an_old_log_is_plotted(folder, capsys):
    tool = load_tool("plot_run")
    assert tool.main([str(FINISHED), "--out=curves.png"]) == 0
    run = tool.read_run(FINISHED, "old")
    old = [line for line in read_lines(FINISHED / "log.jsonl") if "total" in line]
    for key in set(old[-1]) - {"step", "seconds"}:
        (name,) = current_log_line({key: 0.0})
        assert run.series[name].items() >= {line["step"]: line[key] for line in old if key in line}.items(), key
    assert {key for key in tool.DEFAULT_KEYS if "*" not in key} - run.series.keys() == {"perf/mfu"}
    assert run.scores and capsys.readouterr().out.endswith("curves.png\n")


def test_an_old_run_gets_a_model_card(folder):
    assert load_tool("publish_model").main([str(FINISHED), "--license=mit"]) == 0
    card = (FINISHED / "export" / "README.md").read_text()
    assert "| groupshapes | refer groupshapes train | 0.5 x per epoch |" in card
    assert "| refshapes_val | " in card and "| from step 3 | code bb2d4bb" in card


def test_an_old_checkpoint_is_exported(folder):
    assert load_tool("export_checkpoint").main([str(STOPPED), "--to=exported"]) == 0
    saved = load_file(STOPPED / "checkpoints" / "step_00000003" / "optimizer.safetensors")
    weights = load_file("exported/model.safetensors")
    assert len(weights) > 10
    assert all(torch.equal(tensor, saved[f"{AVERAGE}.{name}"]) for name, tensor in weights.items())


def test_an_old_sweep_gets_its_tables(folder, capsys):
    assert load_tool("make_tables").main(["--sweep=sweep", "--baseline=1"]) == 0
    said = capsys.readouterr().out
    for path in sorted(Path("sweep").glob("*/evaluation/results.jsonl")):
        (row,) = read_lines(path)
        assert f" {row['scores']['ciou']:.3f} (1) " in said


def test_an_old_override_is_refused_with_the_new_one(folder):
    """Every override of the old run is accepted, or the error gives the one that is."""
    old = read_lines(STOPPED / "starts.jsonl")[0]["command"][1:]
    assert "experiment=quickstart" in old and len(old) > 50
    today = [renamed_override(override) or override for override in old]
    for before, now in zip(old, today, strict=True):
        if before != now:
            with pytest.raises(ConfigError) as caught:
                load_config("train", TrainConfig, [before])
            assert f"found {before!r}, which was renamed; write {now}" in str(caught.value)
    loaded = load_config("train", TrainConfig, today)
    wanted = load_config("train", TrainConfig, [f"{key}={value}" for key, value in RUN.items()])
    assert loaded.data.packing == wanted.data.packing and loaded.distillation == wanted.distillation
    assert loaded.kernels == wanted.kernels and loaded.metric_bounds == wanted.metric_bounds


def test_the_errors_about_an_old_yaml_file_give_its_new_keys(folder, monkeypatch):
    shutil.copytree(config.CONFIG_FOLDER, "configs")
    monkeypatch.setattr(config, "CONFIG_FOLDER", folder / "configs")
    text = Path("quickstart.yaml").read_text()
    for _ in range(20):
        Path("configs/experiment/mine.yaml").write_text(text)
        try:
            loaded = load_config("train", TrainConfig, ["experiment=mine"])
            break
        except ConfigError as error:
            keys = re.search(r"; (\S+) was renamed to (\S+)", str(error))
            value = re.search(r"(metric) is '(\S+)', which was renamed; write (\S+)", str(error))
            assert keys or value, error
            old, new = (
                (name.rpartition(".")[2] + ":" for name in keys.groups())
                if keys
                else (f"{value[1]}: {name}" for name in value.groups()[1:])
            )
            assert text.count(old) >= 1, error
            text = re.sub(rf"\b{re.escape(old)}", new, text)
    assert (loaded.data.packing.seq_len, loaded.data.global_batch_size) == (512, 16)
    assert loaded.metric_bounds["loss_at_600"].metric == "loss/total"

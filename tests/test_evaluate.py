"""Evaluation scores every expression once, resumes after a kill, and equals other rank counts and the scoring tool."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import ROOT, launcher, start

from pixel_sail.config import ConfigError, EvalConfig, PredictCommandConfig, PredictConfig, load_config
from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation import refer_seg
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.predictions import read_predictions
from pixel_sail.evaluation.run import run_evals
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import load_tokenizer, model_token_ids
from pixel_sail.predict_files import predict_files
from pixel_sail.types import DataError


@pytest.fixture(scope="module")
def checkpoint(data_root, tmp_path_factory):
    """An exported random model whose every answer contains [SEG], so that there are masks to score."""
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    tokenizer = load_tokenizer(data_root / "refshapes" / "tokenizer", num_visual_prompts=15)
    config = PixelSailConfig(
        vocab_size=len(tokenizer),
        token_ids=model_token_ids(tokenizer, num_visual_prompts=15),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        mask_dim=16,
        initializer_range=0.2,
    )
    model = PixelSailForSegmentation(config).eval()
    model.save_pretrained(folder)
    PixelSailProcessor.for_model(tokenizer, config).save_pretrained(folder)
    return folder


def evaluate(checkpoint, data_root, output, *overrides, by="python"):
    command = [*launcher(by), "scripts/evaluate.py", f"checkpoint={checkpoint}", f"output={output}"]
    options = ("evals=[refshapes_val,grefshapes_val]", "predict.answer=forced", "progress=false")
    done = start([*command, *options, *overrides], data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(output: Path, name: str) -> list[str]:
    return (output / name / "predictions.jsonl").read_text().splitlines()


def test_one_and_two_processes_write_the_same_predictions(checkpoint, data_root, tmp_path):
    evaluate(checkpoint, data_root, tmp_path / "one")
    evaluate(checkpoint, data_root, tmp_path / "two", by="torchrun")
    for name in ("refshapes_val", "grefshapes_val"):
        assert lines(tmp_path / "one", name) == lines(tmp_path / "two", name)
        assert len(lines(tmp_path / "one", name)) > 5


def test_the_scoring_tool_prints_the_numbers_of_the_evaluation(checkpoint, data_root, tmp_path):
    printed = json.loads(evaluate(checkpoint, data_root, tmp_path / "out"))
    command = [sys.executable, "tools/score.py", "--predictions", tmp_path / "out/refshapes_val/predictions.jsonl"]
    command += ["--refer-root", data_root / "refshapes", "--dataset", "refshapes", "--split", "val"]
    scored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(scored.stdout) == printed["refshapes_val"]


def test_an_interrupted_evaluation_asks_only_what_is_missing(checkpoint, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    # max_batch_tokens makes every image a separate batch.
    options = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "evals=[refshapes_val]", "progress=false"]
    config = load_config("evaluate", EvalConfig, [*options, "predict.max_batch_tokens=1"])
    whole = run_evals(config)
    expected = lines(tmp_path / "out", "refshapes_val")
    part = tmp_path / "out" / "refshapes_val" / "part-0.jsonl"
    written = part.read_bytes().splitlines(keepends=True)
    images = [json.loads(line)["image_id"] for line in written]
    kept = images.index(images[-1]) + 1  # whole images, and the first line of the last one
    assert 1 < kept < len(written)
    part.write_bytes(b"".join(written[:kept]) + written[kept][:20])
    asked = []
    ask = BatchPredictor.ask_many

    def counting(self, requests):
        asked.extend(question for request in requests for question in request.questions)
        return ask(self, requests)

    monkeypatch.setattr(BatchPredictor, "ask_many", counting)
    assert run_evals(config) == whole
    assert lines(tmp_path / "out", "refshapes_val") == expected
    assert len(asked) == images.count(images[-1])


def test_predictions_of_other_weights_are_not_continued(checkpoint, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    options = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "evals=[refshapes_val]", "progress=false"]
    run_evals(load_config("evaluate", EvalConfig, options))
    with pytest.raises(ConfigError, match=r"protocol\.json"):
        run_evals(load_config("evaluate", EvalConfig, [*options, "predict.mask=first"]))


def test_expressions_asked_together_get_the_answers_they_get_alone(checkpoint, data_root):
    predictor = BatchPredictor.from_pretrained(checkpoint, config=PredictConfig(max_new_tokens=6))
    items = refer_seg.load(root=data_root / "refshapes", dataset="refshapes", split="val")
    group = refer_seg.by_image(items)[0]
    together = list(refer_seg.predict_image(predictor, group))
    alone = [next(iter(refer_seg.predict_image(predictor, [item]))) for item in group]
    assert [p.answer for p in together] == [p.answer for p in alone]


def test_a_missing_checkpoint_and_a_wrong_split_are_named(checkpoint, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    with pytest.raises(ConfigError, match="nowhere"):
        run_evals(load_config("evaluate", EvalConfig, ["checkpoint=nowhere", "evals=[refshapes_val]"]))
    options = [f"checkpoint={checkpoint}", "evals=[refshapes_val]", "evals.refshapes_val.split=validation"]
    with pytest.raises(DataError, match="validation"):
        run_evals(load_config("evaluate", EvalConfig, options))


def test_a_question_about_an_image_leaves_json_and_image(checkpoint, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    options = [f"checkpoint={checkpoint}", f"image={tmp_path / 'image.png'}", f"output={tmp_path / 'out'}"]
    options += ["question='Please segment the star.'", "predict.answer=forced", "boxes=[[5,5,40,30]]"]
    ((path, output),) = list(predict_files(load_config("predict", PredictCommandConfig, options)))
    assert path.name == "image.png" and output.masks_NHW.shape == (1, 60, 90)
    record = json.loads((tmp_path / "out" / "image.json").read_text())
    assert (decode_rle(record["masks"][0]) == output.masks_NHW[0]).all()
    assert Image.open(tmp_path / "out" / "image.png").size == (90, 60)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ("boxes=[[5,5,400,30]]", DataError, r"prompt 0: found Box\(.*inside the image of 90 x 60"),
        ("points=[[-1,3]]", DataError, r"prompt 0: found Point\(.*inside the image of 90 x 60"),
        ("boxes=[[5,5]]", ConfigError, "boxes: found .5, 5., expected x0, y0, x1, y1"),
        ("boxes=[1,2,3,4]", ConfigError, "boxes: found 1, expected x0, y0, x1, y1 in a list"),
        ("boxes=[null]", ConfigError, "boxes: found None, expected"),
        ("points=[7]", ConfigError, "points: found 7, expected x, y in a list"),
        ("points=[[5]]", ConfigError, "points: found .5., expected x, y"),
    ],
)
def test_a_visual_prompt_outside_the_image_is_an_error(checkpoint, tmp_path, option, error, message):
    Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
    options = [f"checkpoint={checkpoint}", f"image={tmp_path / 'image.png'}", f"output={tmp_path / 'out'}"]
    with pytest.raises(error, match=message):
        list(predict_files(load_config("predict", PredictCommandConfig, [*options, "question=x", option])))
    assert not (tmp_path / "out").exists()


def test_predictions_carry_what_was_asked_and_answered(checkpoint, data_root, tmp_path):
    evaluate(checkpoint, data_root, tmp_path / "out")
    predictions = read_predictions(tmp_path / "out" / "refshapes_val" / "predictions.jsonl")
    items = refer_seg.load(root=data_root / "refshapes", dataset="refshapes", split="val")
    assert [(p.ref_id, p.sent_id, p.text) for p in predictions] == [(i.ref_id, i.sent_id, i.text) for i in items]
    assert all(p.answer.startswith("It is [SEG].") and p.segmentation is not None for p in predictions)

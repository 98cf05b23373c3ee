"""Real human expressions end to end: the evals gref_mini and refcocos_local, and the box reader of the latter."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from running import start
from shared_data import SHARED_CONFIGS, shared_data

from pixel_sail.config import EvalConfig, build, load_config
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.sources import boxed_expressions
from pixel_sail.evaluation.predictions import read_predictions
from pixel_sail.evaluation.run import run_evals
from pixel_sail.types import DataError

MAX_IMAGES = 7


@pytest.fixture(scope="module")
def checkpoint(tiny_model, processor, tmp_path_factory):
    """An exported random model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def gref_mini_file():
    """Return (image id, text, whether it has a target) of every sentence, in file order."""
    refs = json.loads((shared_data("derived_gref_mini") / "grefcoco" / "grefs(unc).json").read_text())
    return [(ref["image_id"], sent["sent"], not ref["no_target"]) for ref in refs for sent in ref["sentences"]]


def refcocos_file():
    records = json.loads((shared_data("derived_refcocos_on_local_images") / "refcocos_local.json").read_text())
    return [(record["image_id"], record["expression"], record["bbox_xyxy"] is not None) for record in records]


def evaluate(checkpoint, folder, name, *overrides):
    options = [f"checkpoint={checkpoint}", f"output={folder}", f"evals=[{name}]", "progress=false", "examples=2"]
    return run_evals(load_config("evaluate", EvalConfig, [*options, *SHARED_CONFIGS, *overrides]))[name]


@pytest.mark.parametrize(
    ("name", "read_file", "num_sentences", "num_without_target"),
    [("gref_mini", gref_mini_file, 27, 5), ("refcocos_local", refcocos_file, 33, 5)],
)
def test_human_expressions_are_asked_and_scored(
    checkpoint, tmp_path, name, read_file, num_sentences, num_without_target
):
    sentences = read_file()
    assert len(sentences) == num_sentences
    assert sum(not has_target for *_, has_target in sentences) == num_without_target
    first_images = sorted({image_id for image_id, *_ in sentences})[:MAX_IMAGES]
    expected = Counter((image_id, text) for image_id, text, _ in sentences if image_id in first_images)
    targets = [has_target for image_id, _, has_target in sentences if image_id in first_images]
    options = ("predict.answer=forced", f"max_images={MAX_IMAGES}")
    scores = evaluate(checkpoint, tmp_path, name, *options)
    predictions = read_predictions(tmp_path / name / "predictions.jsonl")
    assert Counter((prediction.image_id, prediction.text) for prediction in predictions) == expected
    assert (scores["count"], scores["missing"]) == (len(targets), 0)
    assert 0 < sum(targets) < len(targets), "the first images hold both kinds, so that both are scored"
    # A random model marks pixels in every image, so every expression without a target is wrong.
    marked = [decode_rle(prediction.segmentation).any() for prediction in predictions]
    assert all(marked) and (scores["n_acc"], scores["t_acc"]) == (0.0, 1.0)
    assert 0 < scores["ciou"] < 1
    assert name in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("name", "read_file"), [("gref_mini", gref_mini_file), ("refcocos_local", refcocos_file)])
def test_all_human_expressions_are_items(name, read_file):
    sentences = read_file()
    node = load_config("evaluate", EvalConfig, ["checkpoint=x", f"evals=[{name}]", *SHARED_CONFIGS]).evals[name]
    items = build(node, name)
    assert sorted((item.image_id, item.text, item.target is not None) for item in items) == sorted(sentences)
    assert all(item.image_path.is_file() for item in items)


def test_the_experiment_on_four_real_images_makes_a_step(data_root, tmp_path):
    shared_data("derived_refer_mini")
    folders = [f"paths.runs={tmp_path}", f"model.tokenizer={data_root / 'refshapes' / 'tokenizer'}"]
    command = ["scripts/train.py", "experiment=refer_mini", *SHARED_CONFIGS, *folders, "deepspeed=none", "--dry-run"]
    done = start([sys.executable, *command], data_root)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = re.search(r"^step 1: total ([\d.]+), text ([\d.]+), bce ([\d.]+), dice ([\d.]+)", done.stdout, re.M)
    assert losses is not None and all(float(loss) > 0 for loss in losses.groups()), done.stdout
    assert "4 samples" in done.stdout


# The reader.


def record(**changes):
    return {"image_id": 7, "local_image": "a.jpg", "expression": "the cat", "bbox_xyxy": [1.5, 0, 3.4, 2.6],
            "height": 4, "width": 5} | changes  # fmt: skip


def read(tmp_path, *records):
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(records))
    return boxed_expressions.load(annotations=file, image_dir="images")


def test_a_box_covers_the_pixels_whose_centers_are_inside(tmp_path):
    first, none, corner = read(tmp_path, record(), record(bbox_xyxy=None), record(bbox_xyxy=[4, 3, 5, 4]))
    # Centres of columns are 0.5, 1.5, 2.5, ...: 1.5 to 3.4 holds 1.5 and 2.5; rows 0.5, 1.5 and 2.5.
    expected = np.zeros((4, 5), dtype=bool)
    expected[0:3, 1:3] = True
    assert np.array_equal(decode_rle(first.target), expected)
    assert none.target is None
    assert np.argwhere(decode_rle(corner.target)).tolist() == [[3, 4]]
    assert [(item.ref_id, item.sent_id) for item in (first, none, corner)] == [(0, 0), (1, 0), (2, 0)]
    assert str(first.image_path) == "images/a.jpg" and first.image_hw == (4, 5)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"bbox_xyxy": [1, 1, 6, 2]}, r"bbox_xyxy = \[1, 1, 6, 2\], expected .* inside the image of \(4, 5\)"),
        ({"bbox_xyxy": [3, 1, 3, 2]}, "expected .left, top, right, bottom"),
        ({"bbox_xyxy": [1, 1, True, 2]}, "expected .left, top, right, bottom"),
        ({"bbox_xyxy": [1, 2, 3]}, "expected .left, top, right, bottom"),
        ({"bbox_xyxy": [1.6, 1, 2.4, 2]}, "without a pixel"),
        ({"bbox_xyxy": "nothing"}, "bbox_xyxy = 'nothing', expected"),
        ({"expression": " "}, "empty expression"),
        ({"expression": None}, "expression = None, expected str"),
        ({"height": None, "width": None}, "neither height nor width"),
        ({"image_id": "7"}, "image_id = '7', expected int"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, changes, found):
    with pytest.raises(DataError, match=rf"boxes\.json\[1\]: found .*{found}|boxes\.json\[1\]: found {found}"):
        read(tmp_path, record(), record(**changes))


def test_a_record_that_does_not_say_whether_there_is_a_box_is_named(tmp_path):
    damaged = record()
    del damaged["bbox_xyxy"]
    with pytest.raises(DataError, match=r"boxes\.json\[0\]: found bbox_xyxy = 'nothing', expected"):
        read(tmp_path, damaged)

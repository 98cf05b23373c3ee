"""tools/compare_runs.py on two hand-written evaluations: differences, intervals, rejected inputs."""

import json
import runpy
import shutil
from dataclasses import replace

import numpy as np
import pytest
from running import ROOT

from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation import refer_seg, region_choice
from pixel_sail.evaluation.comparison import compare
from pixel_sail.evaluation.item_predictions import ITEM_PREDICTIONS, ItemPrediction
from pixel_sail.evaluation.predictions import PREDICTIONS
from pixel_sail.evaluation.record_files import RecordWriter
from pixel_sail.evaluation.stored import read_stored
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError, Prediction


def node_of(data_root):
    return {
        "_target_": "pixel_sail.evaluation.refer_seg.load",
        "root": str(data_root / "refshapes"),
        "dataset": "refshapes",
        "split": "val",
        "max_images": 0,
    }


@pytest.fixture()
def items(data_root):
    return refer_seg.load(root=data_root / "refshapes", dataset="refshapes", split="val")


def write_eval(folder, node, records, *, record_format=PREDICTIONS, **changes):
    """Write one eval in the format of the evaluation."""
    folder.mkdir(parents=True)
    protocol = {"eval": node, "questions_sha256": "same", "weights_sha256": folder.parent.name,
                "predict": {"prompt": "standard"}}  # fmt: skip
    (folder / "protocol.json").write_text(json.dumps(protocol | changes))
    with RecordWriter(folder / "predictions.jsonl", record_format) as writer:
        for record in records:
            writer.write(record)
    (folder.parent / "results.jsonl").write_text(json.dumps({"eval": folder.name, "code": "1a2b"}) + "\n")


def answers_of(items, masks):
    return [
        Prediction(ref_id=item.ref_id, sent_id=item.sent_id, image_id=item.image_id, text=item.text, segmentation=mask)
        for item, mask in zip(items, masks, strict=True)
    ]


def half(rle):
    """Return the upper half of a mask's pixels."""
    mask = decode_rle(rle)
    kept = np.zeros_like(mask)
    rows, columns = np.nonzero(mask)
    kept[rows[: len(rows) // 2], columns[: len(rows) // 2]] = True
    return encode_mask(kept)


@pytest.fixture()
def runs(tmp_path, data_root, items):
    """Run a marks half of every target; run b marks all of it, but has no prediction for the first two items."""
    node = node_of(data_root)
    write_eval(tmp_path / "a" / "val", node, answers_of(items, [half(item.target) for item in items]))
    better = [None if number < 2 else item.target for number, item in enumerate(items)]
    write_eval(tmp_path / "b" / "val", node, answers_of(items, better))
    return tmp_path


@pytest.fixture()
def command(capsys):
    """Return a function from arguments to the exit status, output and errors of the tool."""
    tool = runpy.run_path(str(ROOT / "tools" / "compare_runs.py"))

    def call(*arguments):
        status = tool["main"](list(map(str, arguments)))
        return status, *capsys.readouterr()

    return call


def test_a_run_compared_with_itself_differs_in_nothing(runs, items):
    for difference in compare(runs / "a" / "val", runs / "a" / "val", resamples=50):
        assert difference.a == difference.b
        assert difference.interval == pytest.approx((0.0, 0.0), abs=1e-12)
        assert (difference.a_better, difference.b_better, difference.equal) == (0, 0, len(items))


def test_differences_count_items_and_have_paired_intervals(runs, items):
    found = {difference.score: difference for difference in compare(runs / "a" / "val", runs / "b" / "val")}
    giou = found["giou"]
    halves = [decode_rle(item.target).sum() // 2 / decode_rle(item.target).sum() for item in items]
    assert giou.a == pytest.approx(np.mean(halves)) and giou.b == pytest.approx(1 - 2 / len(items))
    assert (giou.a_better, giou.b_better, giou.equal) == (2, len(items) - 2, 0)
    low, high = giou.interval
    assert low < giou.b - giou.a < high and low > 0
    hits = found["p90"]
    assert (hits.a, hits.a_better, hits.b_better, hits.equal) == (0.0, 0, len(items) - 2, 2)
    assert "count" not in found and {"ciou", "paper_ciou", "paper_giou"} <= found.keys()
    again = compare(runs / "a" / "val", runs / "b" / "val")
    assert again == list(found.values())
    few = [compare(runs / "a" / "val", runs / "b" / "val", resamples=3, seed=seed) for seed in range(4)]
    assert any(other != few[0] for other in few)


def test_the_command_prints_a_table_and_writes_json(runs, command):
    status, output, errors = command(runs / "a", runs / "b", "--json", runs / "difference.json", "--resamples", 30)
    assert (status, errors) == (0, "")
    assert "val (A a, B b)" in output
    line = next(line for line in output.splitlines() if line.startswith("giou "))
    written = json.loads((runs / "difference.json").read_text())
    giou = next(score for score in written["evals"]["val"]["scores"] if score["score"] == "giou")
    assert line.split()[1:4] == [f"{giou['a']:.4f}", f"{giou['b']:.4f}", f"{giou['difference']:+.4f}"]
    assert giou["difference"] == giou["b"] - giou["a"]
    assert written["resamples"] == 30 and written["evals"]["val"]["code"] == ["1a2b", "1a2b"]


def test_runs_with_different_questions_are_rejected(runs, data_root, command):
    write_eval(runs / "c" / "val", node_of(data_root) | {"max_images": 1}, [], questions_sha256="other")
    status, _, errors = command(runs / "a", runs / "c", "--json", runs / "difference.json")
    assert status == 2 and not (runs / "difference.json").exists()
    assert "found different questions" in errors and "['max_images']" in errors


def test_runs_without_a_common_eval_are_rejected(runs, data_root, command):
    write_eval(runs / "c" / "test", node_of(data_root), [])
    for arguments in ((runs / "a", runs / "c"), (runs / "a", runs / "b", "--evals", "test"), (runs / "a", runs)):
        status, output, errors = command(*arguments)
        assert (status, output) == (2, "") and errors.startswith("DataError: ")


def test_copies_of_the_annotations_may_be_elsewhere_but_must_agree(runs, data_root, items):
    copy = runs / "copy"
    shutil.copytree(data_root / "refshapes" / "refshapes", copy / "refshapes")
    node = node_of(data_root) | {"root": str(copy)}
    write_eval(runs / "c" / "val", node, answers_of(items, [item.target for item in items]))
    found = compare(runs / "a" / "val", runs / "c" / "val", resamples=5)
    assert [difference.b for difference in found] == pytest.approx([1.0] * len(found), abs=1e-4)
    file = copy / "refshapes" / "instances.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == items[0].image_id:
            annotation["segmentation"] = [[0, 0, 9, 0, 9, 9, 0, 9]]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="another target or answer"):
        compare(runs / "a" / "val", runs / "c" / "val", resamples=5)


def test_an_unfinished_or_changed_eval_is_rejected(runs, data_root, items):
    file = runs / "b" / "val" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=f"found {len(items) - 1} predictions, 0 of them to no item"):
        read_stored(runs / "b" / "val")
    file.unlink()
    with pytest.raises(DataError, match="the evaluation was not finished"):
        read_stored(runs / "b" / "val")


def test_only_functions_of_the_package_are_called(runs, tmp_path):
    node = {"_target_": "os.mkdir", "path": str(tmp_path / "made"), "max_images": 0}
    write_eval(runs / "c" / "val", node, [])
    with pytest.raises(DataError, match=r"found the loader 'os\.mkdir'"):
        compare(runs / "a" / "val", runs / "c" / "val")
    with pytest.raises(DataError, match=r"found the loader 'os\.mkdir'"):
        read_stored(runs / "c" / "val")
    assert not (tmp_path / "made").exists()


def test_choices_are_compared_question_by_question(tmp_path, data_root):
    folder = data_root / "refshapes"
    files = {"annotations": str(folder / "perbench" / "STBench_MCQ.json"),
             "image_dir": str(folder / "images" / "train2014")}  # fmt: skip
    items = region_choice.load(**files).items
    right = [ItemPrediction(item_id=item.item_id, question="", answer=item.answer) for item in items]
    silent = [replace(answer, answer="") for answer in right]
    node = {"_target_": "pixel_sail.evaluation.region_choice.load", **files, "max_images": 0}
    write_eval(tmp_path / "a" / "mcq", node, [*silent[:1], *right[1:]], record_format=ITEM_PREDICTIONS)
    write_eval(tmp_path / "b" / "mcq", node, right, record_format=ITEM_PREDICTIONS)
    standard, released = compare(tmp_path / "a" / "mcq", tmp_path / "b" / "mcq", resamples=200)
    for difference in (standard, released):
        assert (difference.a_better, difference.b_better, difference.equal) == (0, 1, len(items) - 1)
        assert difference.b - difference.a == pytest.approx(1 / len(items))


def test_the_scoring_tool_rescores_an_evaluation(runs, items, capsys):
    score = runpy.run_path(str(ROOT / "tools" / "score.py"))["main"]
    assert score(["--evaluated", str(runs / "b" / "val")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == read_stored(runs / "b" / "val").measure().scores
    assert (scores["missing"], scores["count"]) == (2, len(items))
    assert score(["--evaluated", str(runs / "b" / "absent")]) == 2
    assert "found no protocol" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score(["--predictions", "x", "--dataset", "refcoco"])

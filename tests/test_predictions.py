"""Prediction files survive a killed run, reject damage, and score the same from Python and from the tool."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.evaluation.predictions import (
    PredictionWriter,
    measure_predictions,
    read_predictions,
    score_predictions,
)
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError, Expression, Prediction

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE_HW = (6, 8)


def _box(top, left, bottom, right):
    mask = np.zeros(SIZE_HW, dtype=bool)
    mask[top:bottom, left:right] = True
    return encode_mask(mask)


TARGETS = {(1, 10): _box(0, 0, 2, 4), (1, 11): _box(0, 0, 2, 4), (2, 20): _box(2, 2, 6, 8), (3, 30): None}


def _expressions():
    return [
        Expression(
            ref_id=ref_id,
            sent_id=sent_id,
            image_id=100,
            image_path=Path("absent.jpg"),
            image_hw=SIZE_HW,
            text=f"thing {sent_id}",
            target=target,
        )
        for (ref_id, sent_id), target in TARGETS.items()
    ]


def _perfect(items=None):
    return [
        Prediction(
            ref_id=e.ref_id,
            sent_id=e.sent_id,
            image_id=e.image_id,
            text=e.text,
            segmentation=e.target if e.target is not None else encode_mask(np.zeros(e.image_hw, dtype=bool)),
            answer="It is [SEG].",
        )
        for e in (items if items is not None else _expressions())
    ]


def _write(path, predictions):
    with PredictionWriter(path) as writer:
        for prediction in predictions:
            writer.write(prediction)
    return path


def _run_tool(*arguments):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "score.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_records_come_back_as_written(tmp_path):
    written = [*_perfect(), replace(_perfect()[0], ref_id=9, segmentation=None, answer="", text="caf\u00e9 \u2028")]
    path = _write(tmp_path / "new" / "a.jsonl", written)
    assert read_predictions(path) == written
    first = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"ref_id", "sent_id", "image_id", "text", "segmentation", "answer"}


def test_every_record_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "a.jsonl"
    with PredictionWriter(path) as writer:
        for number, prediction in enumerate(_perfect(), start=1):
            writer.write(prediction)
            assert len(read_predictions(path)) == number


def test_answer_is_optional(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"ref_id": 1, "sent_id": 2, "image_id": 3, "text": "x", "segmentation": null}\n')
    assert read_predictions(path) == [Prediction(ref_id=1, sent_id=2, image_id=3, text="x", segmentation=None)]


def test_run_killed_at_any_byte_can_be_resumed(tmp_path, caplog):
    predictions = _perfect()
    whole = _write(tmp_path / "whole.jsonl", predictions).read_bytes()
    path = tmp_path / "cut.jsonl"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        done = read_predictions(path)
        assert len(done) == sum(end - 1 <= length for end in ends), "a record without its newline is complete"
        _write(path, predictions[len(done) :])
        assert path.read_bytes() == whole
    assert "dropped an incomplete last line" in caplog.text
    assert "truncated an incomplete last line" in caplog.text


def test_malformed_line_before_the_end_is_an_error_with_its_number(tmp_path):
    lines = _write(tmp_path / "a.jsonl", _perfect()).read_text().splitlines()
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"b\.jsonl:2: found no JSON"):
        read_predictions(path)
    path.write_text("\n".join([lines[0], lines[1][:40]]) + "\n")
    with pytest.raises(DataError, match=r"b\.jsonl:2: found no JSON"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ref_id": "1"}, "ref_id = '1', expected int"),
        ({"ref_id": True}, "ref_id = True, expected int"),
        ({"text": None}, "text = None, expected str"),
        ({"score": 0.5}, r"unknown fields \['score'\]"),
        ({"segmentation": {"size": [6, 8], "counts": "zz"}}, "do not parse"),
        ({"segmentation": {"size": [6, 9], "counts": _box(0, 0, 2, 4)["counts"]}}, "cover 48 pixels"),
        ({"segmentation": [[0, 0, 1, 1, 0, 1]]}, "expected a compressed RLE"),
    ],
)
def test_wrong_field_is_an_error_with_file_and_line(tmp_path, change, reason):
    good = _write(tmp_path / "a.jsonl", _perfect()).read_text()
    record = {**json.loads(good.splitlines()[0]), "sent_id": 77, **change}
    path = tmp_path / "b.jsonl"
    path.write_text(good + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=rf"b\.jsonl:5: .*{reason}"):
        read_predictions(path)


def test_absent_field_is_named(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"ref_id": 1, "sent_id": 2, "image_id": 3, "text": "x"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: .*no \['segmentation'\]"):
        read_predictions(path)


def test_identical_repeats_count_once_and_different_ones_are_rejected(tmp_path):
    predictions = _perfect()
    path = _write(tmp_path / "a.jsonl", [*predictions, predictions[0]])
    assert read_predictions(path) == predictions
    _write(path, [replace(predictions[1], segmentation=None)])
    with pytest.raises(DataError, match=r"a\.jsonl:6: .*second, different record.*\(1, 11\)"):
        read_predictions(path)
    with pytest.raises(DataError, match="second, different record"):
        score_predictions(_expressions(), [*predictions, replace(predictions[1], segmentation=None)])


def test_writer_rejects_a_damaged_mask(tmp_path):
    damaged = replace(_perfect()[0], segmentation={"size": [6, 8], "counts": "12"})
    with PredictionWriter(tmp_path / "a.jsonl") as writer, pytest.raises(DataError, match="cover 3 pixels"):
        writer.write(damaged)
    assert read_predictions(tmp_path / "a.jsonl") == []


def test_perfect_predictions_score_one_through_the_file(tmp_path):
    path = _write(tmp_path / "a.jsonl", _perfect())
    scores = score_predictions(_expressions(), read_predictions(path)).summary()
    assert scores == {
        **dict.fromkeys(("ciou", "giou", "p50", "p60", "p70", "p80", "p90", "n_acc", "t_acc"), 1.0),
        "count": 4,
        "missing": 0,
    }


def test_absent_prediction_and_absent_mask_both_count_as_missing(caplog):
    first, second, third, _ = _perfect()
    scores = score_predictions(_expressions(), [first, replace(second, segmentation=None), third]).summary()
    assert (scores["count"], scores["missing"]) == (4, 2)
    assert scores["ciou"] == (8 + 24) / (8 + 8 + 24)
    assert scores["giou"] == 3 / 4
    assert "1 of 4 expressions have no prediction" in caplog.text


def test_order_of_predictions_does_not_matter():
    predictions = _perfect()
    predictions[0] = replace(predictions[0], segmentation=_box(0, 0, 1, 4))
    forward = score_predictions(_expressions(), predictions)
    assert forward == score_predictions(_expressions(), predictions[::-1])
    assert (forward.intersection, forward.union) == (4 + 8 + 24, 8 + 8 + 24)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sent_id": 99}, r"\(1, 99\) and 0 others"),
        ({"image_id": 7}, "ref_id 1, sent_id 10: found a prediction for image 7, expected image 100"),
        (
            {"segmentation": encode_mask(np.zeros((8, 6), dtype=bool))},
            r"ref_id 1, sent_id 10: found a mask of size \[8, 6\]",
        ),
    ],
)
def test_predictions_of_something_else_are_rejected(change, reason):
    with pytest.raises(DataError, match=reason):
        score_predictions(_expressions(), [replace(_perfect()[0], **change)])


def test_size_is_checked_for_no_target_expressions_too():
    wrong = replace(_perfect()[3], segmentation=encode_mask(np.zeros((8, 6), dtype=bool)))
    with pytest.raises(DataError, match="ref_id 3, sent_id 30"):
        score_predictions(_expressions(), [wrong])


def test_tool_prints_the_numbers_of_the_function(tmp_path):
    root = shared_data("derived_gref_mini")
    items = expressions(load_refer(root, "grefcoco", "val"))
    predictions = _perfect(items)[:-2]
    everything = encode_mask(np.ones(items[0].image_hw, dtype=bool))
    predictions[0] = replace(predictions[0], segmentation=everything)
    path = _write(tmp_path / "a.jsonl", predictions)
    result = _run_tool(
        "--predictions", path, "--refer-root", root, "--dataset", "grefcoco", "--split", "val", "--split-by", "unc"
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == measure_predictions(items, predictions).scores
    assert 0 < printed["ciou"] < 1
    assert (printed["count"], printed["missing"]) == (27, 2)


def test_tool_reports_wrong_data_on_stderr_with_exit_code_2(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "refs(unc).p").write_bytes(pickle.dumps([{"ref_id": 1, "split": "val"}]))
    path = _write(tmp_path / "a.jsonl", _perfect())
    result = _run_tool("--predictions", path, "--refer-root", tmp_path, "--dataset", "toy", "--split", "testA")
    assert (result.returncode, result.stdout) == (2, "")
    assert "val (1 refs), expected 'testA'" in result.stderr
    assert "Traceback" not in result.stderr

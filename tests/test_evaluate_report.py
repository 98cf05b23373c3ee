"""Evaluation reports: both protocols on hand-computed examples, rows, tables, images, missing data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixel_sail.config import ConfigError, EvalConfig, load_config
from pixel_sail.data.masks import decode_rle, summed_as_released
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.evaluation import refer_seg, results, visual_referring
from pixel_sail.evaluation.item_predictions import ItemPrediction
from pixel_sail.evaluation.paper_tables import FILE, paper_tables
from pixel_sail.evaluation.predict import PredictorOutput
from pixel_sail.evaluation.predictions import (
    PREDICTIONS,
    PredictionWriter,
    measure_predictions,
    read_predictions,
    released_prediction,
    score_prediction,
)
from pixel_sail.evaluation.result_examples import ranked
from pixel_sail.evaluation.results import Cost, Resampled, append_row, perbench_row, read_rows, result_row
from pixel_sail.evaluation.run import plan_evals, run_evals
from pixel_sail.evaluation.tables import guesses_table, scores_table
from pixel_sail.evaluation.task_scores import TaskScores
from pixel_sail.metrics.released_iou import released_target
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError, Expression, MissingDataError, Prediction, VisualReferring

ROOT = Path(__file__).resolve().parent.parent


# Both protocols in one table.


def row_mask(*pixels):
    """Return a mask of one row of ten pixels."""
    mask = np.zeros((1, 10), dtype=bool)
    mask[0, list(pixels)] = True
    return encode_mask(mask)


def expression(target=(), *, ignored=None, released=None):
    return Expression(
        ref_id=1, sent_id=1, image_id=1, image_path=ROOT / "absent.jpg", image_hw=(1, 10), text="x",
        target=row_mask(*target) if target else None, ignored=None if ignored is None else row_mask(*ignored),
        released_target=None if released is None else row_mask(*released),
    )  # fmt: skip


def prediction(union=None, *, first=None):
    return Prediction(
        ref_id=1, sent_id=1, image_id=1, text="x",
        segmentation=None if union is None else row_mask(*union),
        first_segmentation=None if first is None else row_mask(*first),
    )  # fmt: skip


NOT_COUNTED = (0, 0, 0.0)

PROTOCOLS = {
    # (expression, prediction), then (intersection, union, IoU) by protocol; to five decimals the constants vanish.
    "one mask, 2 of 6 pixels right": (
        (expression((2, 3, 4, 5)), prediction((0, 1, 2, 3))),
        *[(2, 6, 1 / 3)] * 3,
    ),
    "no target, empty mask": ((expression(), prediction(())), *[(0, 0, 1.0)] * 3),
    "no target, no answer": ((expression(), prediction()), (0, 0, 1.0), (0, 0, 1.0), NOT_COUNTED),
    "no target, 3 pixels": ((expression(), prediction((0, 1, 2))), *[(0, 3, 0.0)] * 3),
    "target of 4, empty mask": ((expression((0, 1, 2, 3)), prediction(())), *[(0, 4, 0.0)] * 3),
    "target of 4, no answer": (
        (expression((0, 1, 2, 3)), prediction()),
        *[(0, 4, 0.0)] * 2,
        NOT_COUNTED,
    ),
    "two masks, together right": (
        (expression((0, 1, 4, 5)), prediction((0, 1, 4, 5), first=(0, 1))),
        *((4, 4, 1.0), (2, 4, 0.5), (2, 4, 0.5)),
    ),
    "target beside 2 ignored pixels, both marked": (
        (expression((0, 1), ignored=(2, 3)), prediction((0, 1, 2, 3))),
        *((2, 2, 1.0), (2, 10, 0.2), (2, 10, 0.2)),
    ),
    "polygons overlap in 2 of 4 pixels": (
        (expression((0, 1, 2, 3), released=(0, 3)), prediction((0, 1, 2, 3))),
        *((4, 4, 1.0), (2, 4, 0.5), (2, 4, 0.5)),
    ),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_count_as_computed_by_hand(name):
    pair, *expected = PROTOCOLS[name]
    found = [score_prediction(*pair), *(released_prediction(*pair, missing=rule) for rule in ("empty", "skipped"))]
    assert [(sums.intersection, sums.union) for sums in found] == [counts[:2] for counts in expected]
    assert [sums.iou_sum for sums in found] == pytest.approx([iou for _, _, iou in expected], abs=1e-5)


def test_the_documentation_shows_the_same_table():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for name, (_, *counts) in PROTOCOLS.items():
        shown = [f"{a} / {b}, {iou:.2f}" if (a, b, iou) != NOT_COUNTED else "left out, 0.00" for a, b, iou in counts]
        cells = " | ".join(shown)
        assert f"| {name} | {cells} |" in text


def test_scores_of_several_expressions_in_both_protocols():
    chosen = [PROTOCOLS[name][0] for name in ("target of 4, no answer", "two masks, together right")]
    items = [replace(item, sent_id=number) for number, (item, _) in enumerate(chosen)]
    answers = [replace(answer, sent_id=number) for number, (_, answer) in enumerate(chosen)]
    scores = measure_predictions(items, answers).scores
    assert (scores["ciou"], scores["giou"], scores["missing"]) == (0.5, 0.5, 1)
    assert scores["paper_ciou"] == pytest.approx(2 / 8)
    assert scores["paper_giou"] == pytest.approx(0.25, abs=1e-5)
    skipped = measure_predictions(items, answers, missing_as_released="skipped").scores
    assert skipped["paper_ciou"] == pytest.approx(2 / 4)
    assert skipped["paper_giou"] == pytest.approx(0.25, abs=1e-5)
    assert {name: scores[name] for name in ("ciou", "giou")} == {name: skipped[name] for name in ("ciou", "giou")}


def test_reasonseg_leaves_missing_answers_out_as_released(data_root):
    task = refer_seg.load_reasonseg(root=data_root / "refshapes" / "reason_seg", split="val")
    right = [
        Prediction(ref_id=item.ref_id, sent_id=item.sent_id, image_id=item.image_id, text="", segmentation=item.target)
        for item in task.items
    ]
    plain = [number for number, item in enumerate(task.items) if item.ignored is None]
    answers = [replace(answer, segmentation=None) if number != plain[0] else answer
               for number, answer in enumerate(right)]  # fmt: skip
    scores = task.score(task.items, answers)
    assert scores["paper_ciou"] == pytest.approx(1.0)
    assert scores["ciou"] < 0.9
    assert scores["paper_giou"] == pytest.approx(1 / len(right), abs=1e-5)


def test_ignored_pixels_damage_the_released_target_along_the_columns():
    target, ignored = np.zeros((2, 2, 4), dtype=bool)
    target[:, 0], ignored[0, 1] = True, True
    # Down the columns: 1 1, 255 0, 0 0, 0 0. Runs begin at the first 1, at 255 and at the first 0 after it.
    expected = np.array([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    assert (decode_rle(released_target(encode_mask(target), encode_mask(ignored))) == expected).all()
    # A run of 255 that ends at a 0 becomes a target, also for expressions without target.
    assert (decode_rle(released_target(None, encode_mask(ignored))) == ignored).all()
    assert released_target(encode_mask(target), None) == encode_mask(target)
    with pytest.raises(DataError, match=r"size \[2, 4\] and ignored pixels of size \[4, 2\]"):
        released_target(encode_mask(target), encode_mask(ignored.T.copy()))


def test_overlapping_polygons_are_summed_as_released():
    squares = [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]]
    expected = np.zeros((4, 4), dtype=bool)
    expected[:2, :2] = expected[1:3, 1:3] = True
    expected[1, 1] = False
    assert (decode_rle(summed_as_released([squares], (4, 4), "x")) == expected).all()
    apart = [squares[0], [2, 2, 4, 2, 4, 4, 2, 4]]
    assert summed_as_released([apart], (4, 4), "x") is None
    assert summed_as_released([squares[:1]], (4, 4), "x") is None
    assert summed_as_released([encode_mask(expected)], (4, 4), "x") is None
    assert summed_as_released([], (4, 4), "x") is None


def square(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def toggled(values_HW):
    """Encode as the released code does: a new run wherever the value changes, down the columns."""
    flat = values_HW.T.ravel()
    toggles = np.cumsum(np.concatenate([[flat[0] > 0], flat[1:] != flat[:-1]]))
    return (toggles % 2 == 1).reshape(values_HW.T.shape).T


def test_instances_of_grefcoco_are_united_bit_by_bit_after_their_polygons_are_summed():
    one = [square(0, 0, 5, 5), square(3, 3, 6, 6)]
    other = [square(0, 3, 4, 8)]
    sums = np.zeros((8, 8), dtype=np.uint8)
    sums[:5, :5] += 1
    sums[3:6, 3:6] += 1
    values = sums.copy()
    values[3:8, :4] |= 1
    assert set(np.unique(values)) == {0, 1, 2, 3}
    summed = decode_rle(summed_as_released([one, other], (8, 8), "x"))
    assert (summed == toggled(values)).all() and not (summed == (values > 0)).all()
    # Two instances that overlap each other are no sum of polygons: 1 or 1 is 1.
    assert summed_as_released([one[:1], other], (8, 8), "x") is None
    everything = {"size": [8, 8], "counts": [0, 64]}
    assert (decode_rle(summed_as_released([one, everything], (8, 8), "x")) == toggled(sums | 1)).all()


def test_the_target_of_grefcoco_as_released_loses_what_two_polygons_of_an_instance_share(tmp_path):
    crowd = {"size": [12, 12], "counts": [0, 12, 132]}
    rows = [([square(0, 0, 6, 5), square(4, 3, 8, 7)], 0), ([square(8, 8, 10, 10)], 0), (crowd, 1)]
    folder = tmp_path / "grefcoco"
    folder.mkdir()
    image = {"id": 1, "height": 12, "width": 12, "file_name": "a.jpg"}
    annotations = [
        {"id": number, "image_id": 1, "segmentation": segmentation, "iscrowd": iscrowd}
        for number, (segmentation, iscrowd) in enumerate(rows, start=1)
    ]
    (folder / "instances.json").write_text(json.dumps({"images": [image], "annotations": annotations}))
    meant = [[1, 2], [2], [2, 3], [3], [-1]]
    grefs = [
        {"ref_id": number, "image_id": 1, "ann_id": ann_ids, "split": "val",
         "sentences": [{"sent_id": number, "sent": "x", "raw": "x"}]}
        for number, ann_ids in enumerate(meant)
    ]  # fmt: skip
    (folder / "grefs(unc).json").write_text(json.dumps(grefs))
    items = expressions(load_refer(tmp_path, "grefcoco", "val"))
    damaged, alone, beside_crowd, only_crowd, nothing = items
    areas = [decode_rle(rle).sum() for rle in (damaged.target, damaged.released_target)]
    assert areas == [46, 42]
    perfect = Prediction(ref_id=0, sent_id=0, image_id=1, text="x", segmentation=damaged.target)
    assert score_prediction(damaged, perfect).iou_sum == 1.0
    assert released_prediction(damaged, perfect).iou_sum == pytest.approx(42 / 46, abs=1e-5)
    assert alone.released_target is None and nothing.released_target is None
    # A crowd belongs to the target of ours and to none of the released ones.
    assert (decode_rle(beside_crowd.target).sum(), decode_rle(beside_crowd.released_target).sum()) == (16, 4)
    assert (decode_rle(only_crowd.target).sum(), decode_rle(only_crowd.released_target).sum()) == (12, 0)


def test_no_synthetic_target_is_damaged(data_root):
    items = expressions(load_refer(data_root / "refshapes", "refshapes", "val"))
    assert len(items) > 5 and all(item.released_target is None for item in items)


# The mask of the first [SEG], and the union.


def record_of(masks, rule="union"):
    masks = np.array(masks, dtype=bool).reshape(len(masks), 1, 10)
    output = PredictorOutput(answer="[SEG]", masks_NHW=masks, scores=(1.0,) * len(masks))
    task = refer_seg.task_of([expression((0,))])
    return task.record(task.request(task.items[0], "standard"), output, rule)


def test_the_first_mask_is_kept_only_where_it_is_not_the_union(tmp_path):
    one, two = [1] * 3 + [0] * 7, [0] * 6 + [1] * 4
    several = record_of([one, two])
    assert several.first_segmentation == row_mask(0, 1, 2)
    assert several.segmentation == row_mask(0, 1, 2, 6, 7, 8, 9)
    assert record_of([one]).first_segmentation is None
    assert record_of([one, one]).first_segmentation is None
    assert record_of([one, two], rule="first") == record_of([one])
    assert record_of([]).segmentation is None and record_of([]).first_segmentation is None
    with PredictionWriter(tmp_path / "a.jsonl") as writer:
        writer.write(several)
        writer.write(replace(record_of([one]), sent_id=2))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert ["first_segmentation" in line for line in lines] == [True, False]
    assert read_predictions(tmp_path / "a.jsonl")[0] == several


def test_a_damaged_first_mask_is_rejected(tmp_path):
    line = PREDICTIONS.to_json(record_of([[1] + [0] * 9, [0, 1] + [0] * 8]), "x")
    line["first_segmentation"] = {"size": [1, 10], "counts": "zz"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: found RLE counts"):
        read_predictions(tmp_path / "a.jsonl")
    wrong = replace(record_of([[1] * 10]), first_segmentation=encode_mask(np.ones((2, 10), dtype=bool)))
    with pytest.raises(DataError, match=r"found a mask of size \[2, 10\]"):
        released_prediction(expression((0,)), wrong)


def test_every_score_of_masks_is_the_sum_over_its_items():
    items = [
        VisualReferring(
            item_id=str(number), image_path=ROOT, image_hw=(1, 10), question="q", regions=(), prompt_ids=(),
            answer="", targets=targets,
        )
        for number, targets in enumerate([(row_mask(0, 1), row_mask(2)), (row_mask(4, 5),), (row_mask(7),)])
    ]  # fmt: skip
    masks = [(row_mask(0),), (row_mask(4), row_mask(8)), ()]
    answers = [ItemPrediction(item_id=item.item_id, question="", answer="", masks=own)
               for item, own in zip(items, masks, strict=True)]  # fmt: skip
    measured = visual_referring._measure(items, answers)
    assert {"each_giou", "paper_ciou", "paper_giou", "ciou"} <= measured.fractions.keys()
    for name, value in measured.fractions.items():
        ratio = value.numerators_N.sum() / value.denominators_N.sum() if value.denominators_N.sum() else None
        assert ratio is None or ratio == pytest.approx(measured.scores[name], abs=1e-9)


# Choice of shown items.


def test_a_third_each_is_best_median_and_worst():
    values = np.arange(30) / 30
    shown = ranked(values, list(range(30)), 12)
    assert [rank for rank, _ in shown] == ["best"] * 4 + ["median"] * 4 + ["worst"] * 4
    assert [index for _, index in shown[:4]] == [29, 28, 27, 26]
    assert sorted(index for _, index in shown[4:8]) == [13, 14, 15, 16]
    assert [index for _, index in shown[8:]] == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "ranks"), [(0, []), (1, ["best"]), (2, ["best", "worst"]), (9, ["best"] * 2)])
def test_few_images_or_few_items_are_shown_once(number, ranks):
    shown = ranked(np.array([0.5, 0.1, 0.9, 0.2]), ["a", "b", "c", "d"], number)
    assert [rank for rank, _ in shown][: len(ranks)] == ranks
    assert len({index for _, index in shown}) == len(shown) == min(number, 4)


def test_one_image_fills_no_rank_as_long_as_there_are_others():
    values = np.array([0.9, 0.89, 0.88, 0.5, 0.4, 0.3])
    shown = ranked(values, ["a", "a", "a", "b", "c", "c"], 6)
    assert shown[:2] == [("best", 0), ("best", 3)]
    assert shown[-2:] == [("worst", 5), ("worst", 2)]


# Tables.


def test_the_papers_rows_fit_their_columns_and_each_other():
    tables = {table["number"]: table for table in json.loads(FILE.read_text())["tables"]}
    assert sorted(tables) == [1, 2, 3, 4]
    for table in tables.values():
        assert all(len(row) == len(table["columns"]) + 1 for row in table["rows"])
        assert len({row[0] for row in table["rows"]}) == len(table["rows"])
    for name, meteor, accuracy, ciou, giou, overall in tables[3]["rows"]:
        assert (meteor + 100 * accuracy + (ciou + giou) / 2) / 3 == pytest.approx(overall, abs=0.06), name
    evals = load_config("evaluate", EvalConfig, ["checkpoint=x", "evals=paper"]).evals
    named = {column["eval"] for number in (1, 2, 3) for column in tables[number]["columns"]}
    assert named == {*evals, results.PERBENCH_OVERALL}
    asked = {path.stem for path in (ROOT / "pixel_sail" / "vqa" / "tasks").glob("*.yaml")}
    assert {column["eval"] for column in tables[4]["columns"]} <= asked


def test_a_checkpoint_has_the_first_rows_and_what_was_not_run_is_empty():
    scores = {"refcoco_val": {"ciou": 0.5, "paper_ciou": 0.4987}, "perbench_choice": {"paper_accuracy": 0.256}}
    first, third = paper_tables(scores, prompt="short", limit=7)
    assert "Table 1 (protocols paper and standard, only the first 7 images" in first.heading
    place = first.columns.index("RefCOCO val")
    assert [row[0] for row in first.rows[:3]] == [
        "this checkpoint (paper)",
        "this checkpoint (standard)",
        "Pixel-SAIL 0.5B",
    ]
    assert [row[1][place] for row in first.rows[:3]] == ["49.9", "50.0", "77.9"]
    assert sum(bool(cell) for cell in first.rows[0][1]) == 1
    assert third.num_own == 1 and third.rows[0][1] == ("", "0.26", "", "", "")
    assert "predict.prompt=short" in third.note
    assert paper_tables({"refshapes_val": {"ciou": 1.0}}, prompt="short", limit=0) == []


def test_intervals_follow_the_scores_and_html_is_escaped():
    table = scores_table("A <b>", {"x": {"count": 3, "ciou": 0.5}, "y": {"n_acc": 1.0}}, {"x": {"ciou": (0.4, 0.61)}})
    assert table.markdown() == [
        *("## A <b>", ""),
        *("| | ciou | n_acc | count |", "|---|---:|---:|---:|"),
        *("| x | 0.500 (0.400-0.610) |  | 3 |", "| y |  | 1.000 |  |"),
    ]
    assert "<h2>A &lt;b&gt;</h2>" in table.html()
    own = replace(table, num_own=1).markdown()
    assert own[-2] == "| **x** | **0.500 (0.400-0.610)** |  | **3** |"


def test_a_table_of_guesses_has_the_chance_level_in_every_row():
    guesses = {"every object": {"ciou": 0.25, "giou": 0.3}, "random object": {"ciou": 0.1, "giou": 0.2}}
    scores = {"x": {"ciou": 0.5, "giou": 0.6, "p50": 0.7, "count": 3}}
    table = guesses_table("By kind", scores, {"x": guesses})
    assert table.columns == ("count", "ciou", "giou", "every object", "random object")
    assert table.rows == (("x", ("3", "0.500", "0.600", "0.250 / 0.300", "0.100 / 0.200")),)


# Rows.

PROTOCOL = {
    "checkpoint": "runs/a/export", "weights_sha256": "w", "model_sha256": "m", "questions_sha256": "q",
    "precision": "fp32", "predict": {"prompt": "paper"}, "eval": {"max_images": 0},
}  # fmt: skip


def resampled(**samples):
    values = {name: np.array(value, dtype=np.float64) for name, value in samples.items()}
    return Resampled(samples=values, num_images=5, resamples=2, seed=1)


def row_of(name, scores, samples, **changes):
    measured = TaskScores(scores={"count": 4, **scores}, fractions={})
    cost = Cost(asked=4, asking_s=1.23456, scoring_s=0.5)
    return result_row(name, "kind", measured, samples, cost, PROTOCOL | changes)


def test_a_row_records_its_provenance(tmp_path):
    row = row_of("a", {"ciou": 0.5, "paper_ciou": 0.25, "missing": 1}, resampled(ciou=[0.4, 0.6]))
    assert row["intervals"] == {"ciou": pytest.approx((0.405, 0.595))}
    assert row["protocols"] == {"standard": ["ciou"], "paper": ["paper_ciou"]}
    assert (row["count"], row["missing"], row["prompt"], row["precision"]) == (4, 1, "paper", "fp32")
    assert row["seconds"] == {"asking": 1.23, "scoring": 0.5}
    assert len(row["config_sha256"]) == 64 and row["config_sha256"] != row_of(
        "a", {}, resampled(), precision="bf16"
    )["config_sha256"]  # fmt: skip
    assert "limit_images" not in row
    assert row_of("a", {}, resampled(), eval={"max_images": 9})["limit_images"] == 9
    append_row(tmp_path, row)
    append_row(tmp_path, row_of("b", {"ciou": 0.1}, resampled()))
    append_row(tmp_path, row_of("a", {"ciou": 0.75}, resampled()))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    assert {name: read["scores"]["ciou"] for name, read in read_rows(tmp_path).items()} == {"a": 0.75, "b": 0.1}
    (tmp_path / "results.jsonl").write_text('{"scores": {}}\n')
    with pytest.raises(DataError, match=r"results\.jsonl: found no readable results"):
        read_rows(tmp_path)


def test_perbench_has_a_row_with_an_interval_where_all_parts_have_one():
    parts = {
        "perbench_caption": ({"meteor": 0.3, "paper_meteor": 0.2}, resampled(paper_meteor=[0.1, 0.3])),
        "perbench_choice": (
            {"accuracy": 0.6, "paper_accuracy": 0.8},
            resampled(accuracy=[0.5, 0.7], paper_accuracy=[0.8, 0.8]),
        ),
        "perbench_visual_referring": (
            {"ciou": 0.3, "giou": 0.1, "paper_ciou": 0.4, "paper_giou": 0.2},
            resampled(ciou=[0.3, 0.3], giou=[0.1, 0.1], paper_ciou=[0.4, 0.4], paper_giou=[0.2, 0.2]),
        ),
    }
    rows = {name: row_of(name, *part) for name, part in parts.items()}
    samples = {name: part[1] for name, part in parts.items()}
    row = perbench_row(rows, samples)
    assert row["scores"] == {"overall": pytest.approx(1.1 / 3), "paper_overall": pytest.approx(1.3 / 3)}
    # Resamples (0.1 + 0.8 + 0.3) / 3 = 0.4 and (0.3 + 0.8 + 0.3) / 3.
    low, high = 0.4, 1.4 / 3
    middle = (high - low) * 0.025
    assert row["intervals"] == {"paper_overall": pytest.approx((low + middle, high - middle))}
    assert (row["eval"], row["count"], row["prompt"]) == ("perbench_overall", 12, "paper")
    del rows["perbench_choice"]
    assert perbench_row(rows, samples) is None


# Missing files.


def plan(data_root, monkeypatch, *overrides):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    return plan_evals(load_config("evaluate", EvalConfig, ["checkpoint=x", *overrides]))


def test_all_evals_without_files_are_named_at_once(data_root, monkeypatch):
    with pytest.raises(MissingDataError) as error:
        plan(data_root, monkeypatch, "evals=[refshapes_val,refcoco_family,gcg_val,reasonseg_val]")
    message = str(error.value)
    assert message.startswith("evals: found no files for 13 of 14:\n")
    assert f"\n  refcoco_plus_testB: {data_root}/ref_seg/refcoco+: found no such folder" in message
    assert "\n  gcg_val: " in message and "\n  reasonseg_val: " in message and "refshapes_val" not in message
    assert "missing_data=skip" in message


def test_evals_with_data_are_run_on_request(data_root, monkeypatch, caplog):
    found = plan(data_root, monkeypatch, "evals=[refcoco_val,refshapes_val]", "missing_data=skip")
    assert list(found.tasks) == ["refshapes_val"] and list(found.skipped) == ["refcoco_val"]
    assert "evals.refcoco_val is skipped" in caplog.text
    with pytest.raises(MissingDataError, match="no files for 1 of 1"):
        plan(data_root, monkeypatch, "evals=[refcoco_val]", "missing_data=skip")
    with pytest.raises(ConfigError, match="missing_data is 'ignore'"):
        plan(data_root, monkeypatch, "evals=[refcoco_val]", "missing_data=ignore")


def test_a_damaged_file_is_not_a_missing_one(data_root, monkeypatch):
    with pytest.raises(DataError, match="validation") as error:
        plan(data_root, monkeypatch, "evals=[refshapes_val]", "evals.refshapes_val.split=validation",
             "missing_data=skip")  # fmt: skip
    assert not isinstance(error.value, MissingDataError)


def test_missing_images_are_found_before_the_first_question(data_root, monkeypatch, tmp_path):
    with pytest.raises(MissingDataError, match=rf"refshapes_val: found 3 of 3 images missing, the first is {tmp_path}"):
        plan(data_root, monkeypatch, "evals=[refshapes_val]", f"+evals.refshapes_val.image_dir={tmp_path}")


# All of it.


@pytest.fixture(scope="module")
def evaluated(data_root, tiny_model, processor, tmp_path_factory):
    """Folder and scores of two evals by a random model."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny_model().save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXEL_SAIL_DATA", str(data_root))
        options = [f"checkpoint={folder}", "evals=[refshapes_val,grefshapes_val,refcoco_val]", "missing_data=skip"]
        options += ["predict.answer=forced", "progress=false", "examples=4", "max_images=2", "resamples=50"]
        return folder / "evaluation", run_evals(load_config("evaluate", EvalConfig, options))


def test_rows_of_a_run_have_scores_intervals_and_provenance(evaluated):
    folder, scores = evaluated
    rows = read_rows(folder)
    assert list(rows) == list(scores) == ["refshapes_val", "grefshapes_val"]
    row = rows["grefshapes_val"]
    assert row["scores"] == scores["grefshapes_val"] and row["scores"]["n_acc"] >= 0
    low, high = row["intervals"]["ciou"]
    assert low <= row["scores"]["ciou"] <= high
    assert row["resampled"] == {"by": "image", "images": 2, "resamples": 50, "level": 0.95,
                                "seed": row["resampled"]["seed"]}  # fmt: skip
    assert (row["limit_images"], row["asked"], row["world_size"]) == (2, row["count"], 1)
    assert row["protocols"]["paper"] == ["paper_ciou", "paper_giou"]
    assert {"code", "device", "seconds", "config_sha256", "questions_sha256", "weights_sha256"} <= row.keys()


def test_the_report_names_protocols_limits_and_what_was_skipped(evaluated):
    text = (evaluated[0] / "report.md").read_text()
    assert "Scores named paper_... follow the protocol `paper`" in text
    assert "Only the first 2 images of each eval" in text and "- Skipped: refcoco_val: " in text
    assert text.count("### Best") == text.count("### Worst") == 2
    page = (evaluated[0] / "report.html").read_text()
    assert "<h3>Median</h3>" in page and page.count("<figure>") == 8


def test_a_sheet_has_a_row_of_images_for_each_rank(evaluated):
    with Image.open(evaluated[0] / "sheets" / "refshapes_val.png") as sheet:
        width, height = sheet.size
    # Of four images, two are the best, one the median, one the worst.
    assert width == 2 * (480 + 16) and height > 3 * 44

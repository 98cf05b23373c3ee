"""MUSE: every question becomes a turn, every object a mask; unusable records are named or counted."""

import json

import numpy as np
import pytest

from pixel_sail.data.sources import muse
from pixel_sail.data.templates.muse import MASK_REQUESTS, listed, muse_answer
from pixel_sail.types import DataError

HW = (6, 8)


def rng(seed=0):
    return np.random.default_rng(seed)


def box(rows, columns):
    mask = np.zeros(HW, dtype=bool)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = True
    return mask


LEFT, RIGHT, OVER = box((0, 3), (0, 3)), box((0, 3), (5, 8)), box((1, 4), (2, 6))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def muse_object(mask=LEFT, name="mug", **rest):
    (y0, x0), (y1, x1) = np.argwhere(mask).min(axis=0).tolist(), (np.argwhere(mask).max(axis=0) + 1).tolist()
    return {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], "category_name": name, **rest}


def muse_record(**changes):
    return {
        "file_name": "COCO_train2014_000000000009.jpg", "height": 6, "width": 8, "ann_list": [{"category_id": 1}],
        "questions": ["What holds tea?", " And what else?"], "text_answers": ["The mug {seg}, the pot {seg}.", None],
        "answers": [[muse_object(), muse_object(RIGHT, "pot")], [muse_object(OVER, "Jug", rephrased_name="a Can")]],
        **changes,
    }  # fmt: skip


def muse_source(tmp_path, *records):
    folders = [tmp_path / "train2014", tmp_path / "val2017"]
    return muse.load(annotations=write(tmp_path / "muse.json", list(records)), image_dir=folders)


def test_muse_questions_become_turns_and_slots_become_masks(tmp_path):
    sample = muse_source(tmp_path, muse_record()).get(0, rng())
    first, second = sample.turns
    assert first.answer == "The mug [SEG], the pot [SEG]."
    assert first.question.removeprefix("What holds tea? ") in MASK_REQUESTS
    assert second.question.startswith("And what else? ")
    for mask, expected in zip([*first.masks, *second.masks], [LEFT, RIGHT, OVER], strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert sample.image_path == tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"


def test_muse_masks_may_be_uncompressed_runs_and_polygons_are_united(tmp_path):
    runs = {"size": list(HW), "counts": [0, 3, 45]}
    twice = [[0, 0, 3, 0, 3, 3, 0, 3], [1, 0, 3, 0, 3, 3, 1, 3]]
    objects = [{"segmentation": runs, "category_name": "a"}, {"segmentation": twice, "category_name": "b"}]
    record = muse_record(questions=["x"], answers=[objects], text_answers=["{seg}{seg}"])
    column, united = muse_source(tmp_path, record).get(0, rng()).turns[0].masks
    assert column.sum(axis=0).tolist() == [3, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(united, LEFT)


def test_muse_images_of_both_years_are_found(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000000009.jpg").touch()
    new = muse_record(coco_url="http://images.cocodataset.org/val2017/000000000009.jpg")
    del new["file_name"]
    source = muse_source(tmp_path, new, muse_record())
    assert source.image_path(0) == source.image_path(1) == tmp_path / "val2017" / "000000000009.jpg"


def test_muse_names_are_rephrased_nine_times_in_ten(tmp_path):
    source = muse_source(tmp_path, muse_record())
    answers = [source.get(0, rng(seed)).turns[1].answer.lower() for seed in range(400)]
    fraction = sum("a can" in answer for answer in answers) / len(answers)
    assert 0.85 < fraction < 0.95
    assert all(("a can" in answer) != ("jug" in answer) for answer in answers)


def test_muse_without_worded_answers_is_worded_here(tmp_path):
    record = muse_record()
    del record["text_answers"]
    first = muse_source(tmp_path, record).get(0, rng()).turns[0]
    assert (first.answer.count("[SEG]"), len(first.masks)) == (2, 2)
    assert first.answer.lower().index("mug") < first.answer.lower().index("pot")


def test_muse_leaves_out_what_has_no_object_and_counts_it(tmp_path, caplog):
    half = muse_record(answers=[[], [muse_object()]])
    records = [muse_record(ann_list=[]), half, muse_record(questions=[], answers=[], text_answers=[])]
    source = muse_source(tmp_path, *records)
    assert (len(source), len(source.get(0, rng()).turns)) == (1, 1)
    assert "skipped 2 of 3 images without a question about an object, and 1 of 2 questions" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_answers": ["one {seg}", None]}, r"question 0: found 1 slots \{seg\} in the text answer and 2 objects"),
        ({"text_answers": ["{seg}{seg}"]}, "found 2 questions, 2 answers and 1 text_answers"),
        ({"answers": [[muse_object()]]}, "found 2 questions, 1 answers and 2 text_answers"),
        ({"questions": ["a", 3]}, "found 3 among questions"),
        ({"answers": [{}, []]}, "found an answer of type dict"),
        ({"height": None, "width": None}, "found no height and width"),
        ({"answers": [["x", "y"], []]}, "found an object without segmentation"),
        ({"answers": [[muse_object(), {"segmentation": [[1, 2]]}], []]}, "question 0: polygon 0: found 2 numbers"),
        ({"answers": [[muse_object()], []], "text_answers": None, "file_name": None}, "found file_name = None"),
        ({"answers": [[muse_object(name=None)], []], "text_answers": None}, "found category_name = None"),
    ],
)  # fmt: skip
def test_a_malformed_muse_record_is_named_when_read(tmp_path, changes, reason):
    with pytest.raises(DataError, match=r"muse\.json\[0\].*" + reason):
        muse_source(tmp_path, muse_record(**changes)).get(0, rng())


def test_muse_answers_name_all_objects_in_order_with_one_mask_each():
    for names in (["mug"], ["mug", "pot"], ["mug", "pot", "can {odd}"]):
        answers = {muse_answer(names, rng(seed)) for seed in range(300)}
        assert len(answers) >= 6
        for answer in answers:
            assert answer.count("[SEG]") == len(names)
            assert [answer.lower().index(name) for name in names] == sorted(answer.lower().index(n) for n in names)
            assert answer.endswith(".")
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == ("a", "a and b", "a, b and c")

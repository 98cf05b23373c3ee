"""Values in error messages: truncated to fit at any size; lone surrogates are not written anywhere else."""

import pickle
import time
from pathlib import Path

import pytest

from pixel_sail.texts import MAX_MESSAGE_CHARS, limited, shown
from pixel_sail.types import DataError, Expression, GroundedCaption, RegionCaption, Sample, Turn

HALF = "\ud800 star"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        -1.5,
        float("nan"),
        "a 'b'",
        b"\x00",
        [],
        (),
        {},
        (1,),
        [1, [2, {"a": (3, 4)}]],
        {"a": 1, 2: [None]},
    ],
)
def test_a_small_value_is_shown_as_python_writes_it(value):
    assert shown(value) == repr(value)


def test_a_long_value_is_truncated_to_the_limit_with_dots():
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown(list(range(1000)), 20) == "[0, 1, 2, 3, 4, 5..."
    assert shown({"size": [480, 640], "counts": "x" * 10**6}).startswith("{'size': [480, 640], 'counts': 'xxx")
    assert shown(10**5000) == "an integer of 16610 bits"


def test_shared_and_recursive_values_are_shown_quickly():
    value = ["ha"] * 10
    for _ in range(100):
        value = [value, value]
    endless = {}
    endless["self"] = endless
    start = time.perf_counter()
    assert len(shown(value)) <= 60 and len(shown(endless)) <= 60 and len(shown([value, {1: value}], 4000)) <= 4000
    assert time.perf_counter() - start < 1


def test_a_message_is_limited_printable_and_survives_pickling():
    error = DataError(f"file.json: found {'x' * 10**6} {HALF}, repair the file")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert len(str(error)) < MAX_MESSAGE_CHARS + 10
    assert str(error).startswith("file.json: found xxx") and str(error).endswith("repair the file")
    assert "\\ud800 star" in str(error).encode("utf-8").decode()
    assert limited("as it is") == "as it is"


def sample(turn):
    return Sample(sample_id="s/1", source="s", image_path=None, image_hw=None, turns=(turn,))


def texts_of(kind, text):
    rle, path = {"size": [1, 1], "counts": "01"}, Path("a.jpg")
    if kind == "question":
        return Sample(
            sample_id="s/1", source="s", image_path=None, image_hw=None, turns=(Turn(question=text, answer="a"),)
        )
    if kind == "answer":
        return Sample(
            sample_id="s/1", source="s", image_path=None, image_hw=None, turns=(Turn(question="a", answer=text),)
        )
    if kind == "expression":
        return Expression(ref_id=1, sent_id=2, image_id=3, image_path=path, image_hw=(1, 1), text=text, target=None)
    if kind == "reference":
        return RegionCaption(item_id="s/1", image_path=path, image_hw=(1, 1), region=rle, references=("a", text))
    return GroundedCaption(
        image_id="s/1", image_path=path, image_hw=(1, 1), captions=("a",), phrases=(text,), masks=(rle,)
    )


@pytest.mark.parametrize("kind", ["question", "answer", "expression", "reference", "phrase"])
def test_a_lone_surrogate_is_rejected_with_its_item_and_a_pair_is_not(kind):
    texts_of(kind, "\U0001f600 \u2603 \x00")
    with pytest.raises(DataError, match=r"(s/1|ref_id 1, sent_id 2).*half a character in '\\ud800 star'"):
        texts_of(kind, HALF)

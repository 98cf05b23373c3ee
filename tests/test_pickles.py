"""Pickles of plain data load, with any Python version; all others are rejected, and no code is executed."""

import os
import pickle
import tracemalloc
from collections import OrderedDict
from datetime import date

import numpy as np
import pytest

from pixel_sail.data.pickles import load_plain_pickle
from pixel_sail.types import DataError

PLAIN = [
    {"ref_id": 7, "box": (1.5, -2, True, None), "text": "caf\u00e9", "ids": {1, 2}, "more": frozenset({"a"})},
    b"x",
]


class _RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_is_rejected_and_not_executed(tmp_path, protocol):
    trace = tmp_path / "executed"
    hostile = pickle.dumps([_RunsACommand(f"touch '{trace}'")], protocol=protocol)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(hostile)

    with pytest.raises(DataError, match=rf"refs\(unc\)\.p: found a request for {os.system.__module__}\.system"):
        load_plain_pickle(path)
    assert not trace.exists()

    pickle.loads(hostile)
    assert trace.exists(), "the pickle must execute code, or the test proves nothing"


def test_stack_global_is_rejected(tmp_path):
    path = tmp_path / "a.p"
    path.write_bytes(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x0511*11\x85R.")
    with pytest.raises(DataError, match=r"request for builtins\.eval"):
        load_plain_pickle(path)


def doubled(times):
    value = ["ha"] * 10
    for _ in range(times):
        value = [value, value]
    return value


def endless():
    value = []
    value.append([value])
    return value


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps([{"ref_id": doubled(40)}]), "found shared values that come to more than"),
        (pickle.dumps([["x" * 10**5] * 10**4] * 2), "found shared values that come to more than"),
        (pickle.dumps(endless()), "found a container that holds itself"),
        (pickle.dumps(nested(60)), "found values nested deeper than 50"),
        # Tuples and frozen sets as keys of a dict, doubled 40 times: their hash would never be computed to its end.
        (b"\x80\x02}K\x01\x85" + b"2\x86" * 40 + b"K\x01s.", "found shared values that come to more than"),
        (b"\x80\x04}(K\x01\x91" + b"2\x86" * 40 + b"K\x01s.", "found shared values that come to more than"),
    ],
)
def test_values_larger_than_their_file_are_rejected_at_once(tmp_path, content, reason):
    (tmp_path / "a.p").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=reason) as caught:
        load_plain_pickle(tmp_path / "a.p")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 400
    assert peak < 20_000_000


def test_texts_that_are_shared_as_in_published_files_are_read(tmp_path):
    refs = [
        {"ref_id": i, "split": "train", "sentences": [{"sent": "the tie", "raw": "the tie"}] * 3} for i in range(500)
    ]
    (tmp_path / "a.p").write_bytes(pickle.dumps(refs, protocol=2))
    assert load_plain_pickle(tmp_path / "a.p") == refs


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (OrderedDict(a=1), "collections.OrderedDict"),
        (date(2020, 1, 1), "datetime.date"),
        (np.zeros(2), "numpy"),
        (1j, "builtins.complex"),
    ],
)
def test_objects_are_rejected_by_name(tmp_path, value, name):
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises(DataError, match=name):
        load_plain_pickle(path)


@pytest.mark.parametrize("data", [b"Pobject 1\n.", b"\x80\x02U\x01aQ."])
def test_persistent_ids_are_rejected(tmp_path, data):
    path = tmp_path / "a.p"
    path.write_bytes(data)
    with pytest.raises(DataError, match="persistent id"):
        load_plain_pickle(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_containers_load_unchanged(tmp_path, protocol):
    content = PLAIN if protocol > 3 else [{"ref_id": 7, "text": "caf\u00e9"}, b"x"]
    path = tmp_path / "a.p"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_plain_pickle(path) == content


@pytest.mark.parametrize(
    "data",
    [
        b"(lp0\n(dp1\nS'ref_id'\np2\nI7\nsS'raw'\np3\nS'a caf\\xc3\\xa9'\np4\nsa.",
        b"\x80\x02]q\x00}q\x01(U\x06ref_idq\x02K\x07U\x03rawq\x03U\x07a caf\xc3\xa9q\x04ua.",
    ],
)
def test_python2_pickle_loads_with_byte_strings_as_text(tmp_path, data):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    assert load_plain_pickle(path) == [{"ref_id": 7, "raw": "a caf\u00e9"}]


def test_python2_byte_string_of_unknown_encoding_is_rejected_not_misread(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02U\x04caf\xe9.")
    with pytest.raises(DataError, match="UnicodeDecodeError"):
        load_plain_pickle(path)


def test_every_truncation_is_rejected(tmp_path):
    data = pickle.dumps(PLAIN, protocol=4)
    path = tmp_path / "cut.p"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cut\.p"):
            load_plain_pickle(path)


def test_random_bytes_never_raise_anything_but_data_errors(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.p"
    refused = 0
    for _ in range(300):
        path.write_bytes(bytes([*rng.integers(0, 256, size=40).tolist(), 0xFF]))
        with pytest.raises(DataError):
            load_plain_pickle(path)
        refused += 1
    assert refused == 300


@pytest.mark.parametrize("number", [b"r\xff\xff\xff\x7f", b"p99999999999\n"])
def test_a_memo_number_takes_no_memory(tmp_path, number):
    path = tmp_path / "a.p"
    path.write_bytes(b"\x80\x02]" + number + b".")
    tracemalloc.start()
    assert load_plain_pickle(path) == []
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_absent_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no readable file"):
        load_plain_pickle(tmp_path / "none.p")

"""JSON files are read record by record with the result of a full read, by any number of concurrent processes."""

import codecs
import json
import math
import multiprocessing
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import shared_data

from pixel_sail import paths
from pixel_sail.data import records as records_module
from pixel_sail.data.record_scan import MAX_FIELDS
from pixel_sail.data.records import cache_folder, open_records
from pixel_sail.types import DataError

ROWS = [{"id": 7, "text": "caf\u00e9 \U0001f3a9", "n": 1}, {"id": -3, "text": '[{"x": "}', "n": 2.5}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a value as JSON and returns the file."""

    def write(value, name="file.json", **options):
        path = tmp_path / name
        path.write_text(json.dumps(value, **options), encoding="utf-8")
        return path

    return write


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FORMS = st.fixed_dictionaries({
    "ensure_ascii": st.booleans(),
    "indent": st.sampled_from([None, 0, 3, "\t"]),
    "separators": st.sampled_from([None, (",", ":"), (" , ", "\r\n:\n")]),
})  # fmt: skip


def _index_in_new_folder(monkeypatch, folder):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(Path(folder) / "cache"))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(JSON, max_size=6), form=FORMS, mark=st.booleans())
def test_any_list_is_read_as_by_a_full_read(rows, form, mark):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        _index_in_new_folder(patch, folder)
        path = Path(folder) / "rows.json"
        path.write_bytes((codecs.BOM_UTF8 if mark else b"") + json.dumps(rows, **form).encode("utf-8"))
        records = open_records(path)
        assert (len(records), list(records)) == (len(rows), json.loads(path.read_text("utf-8-sig")))


@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.text(), JSON | st.lists(JSON, max_size=4), max_size=5), form=FORMS)
def test_every_list_of_any_object_is_found_under_its_key(content, form):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        _index_in_new_folder(patch, folder)
        path = Path(folder) / "object.json"
        path.write_text(json.dumps(content, **form), encoding="utf-8")
        for key, value in json.loads(path.read_text("utf-8")).items():
            if isinstance(value, list):
                assert list(open_records(path, key)) == value
            else:
                with pytest.raises(DataError, match="expected a list under"):
                    open_records(path, key)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_file_cut_or_changed_anywhere_reads_as_json_does_or_is_rejected(data):
    original = json.dumps({"images": ROWS, "more": [], "info": {"a": [1, None]}}, ensure_ascii=False).encode("utf-8")
    place = data.draw(st.integers(0, len(original) - 1))
    cut = data.draw(st.booleans())
    changed = original[:place] if cut else original[:place] + data.draw(st.binary(max_size=2)) + original[place + 1 :]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        _index_in_new_folder(patch, folder)
        path = Path(folder) / "damaged.json"
        path.write_bytes(changed)
        try:
            expected = json.loads(changed.decode("utf-8"))["images"]
        except (ValueError, KeyError, TypeError):
            with pytest.raises(DataError, match=r"damaged\.json"):
                list(open_records(path, "images"))
        else:
            try:
                assert list(open_records(path, "images")) == expected
            except DataError as error:
                assert "for the second time" in str(error) or "expected a list under" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "byte 0 of 0: found the end of the file, expected a list or an object"),
        (b" \n", "found the end of the file"),
        (b"7", "found '7', expected a list or an object"),
        (b'[{"a": 1}, {"a"', "byte 11 of 15: found invalid JSON"),
        (b'[{"a": 1}', "byte 9 of 9: found the end of the file, expected , or ]"),
        (b"[1, 2,]", "byte 6 of 7: found invalid JSON"),
        (b"[1] [2]", r"byte 4 of 7: found '\[' after the end of the data"),
        (b'{"a": [1],}', "byte 10 of 11: found '}', expected a key in quotes"),
        (b"{1: []}", "byte 1 of 7: found '1', expected a key in quotes"),
        (b'{"a": [1], "a": [2]}', "found 'a' for the second time, expected each key once"),
        (b'[{"a": "\xff"}]', "byte 8 of 12: found bytes that are not UTF-8"),
        ("[1]".encode("utf-16"), "byte 0 of 8: found bytes that are not UTF-8"),
        (b"[" * 100_000, "found invalid JSON"),
        (b"PK\x03\x04", "expected a list or an object"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, content, reason):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"file\.json: at " + reason if "byte" in reason else reason):
        open_records(path)


def test_the_position_of_a_wrong_byte_is_right_if_a_letter_spans_two_chunks(tmp_path):
    path = tmp_path / "file.json"
    text = ('["a' + "\u00e9" * 700_000 + "ab").encode()
    path.write_bytes(text + b'\xe9"]')
    with pytest.raises(DataError, match=f"at byte {len(text)} of {len(text) + 3}: found bytes that are not UTF-8"):
        open_records(path)


def test_nan_and_infinity_are_read_as_floats(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('[{"a": NaN, "id": 1}, {"a": -Infinity, "id": 2}]')
    first, second = open_records(path)
    assert math.isnan(first["a"])
    assert second["a"] == -math.inf


def test_a_list_is_read_by_its_key_only(written):
    path = written({"images": [1], "info": {}})
    with pytest.raises(DataError, match=r"found an object with the lists \['images'\], expected a list under 'info'"):
        open_records(path, "info")
    with pytest.raises(DataError, match="expected one list"):
        open_records(path)
    with pytest.raises(DataError, match="found one list, expected a list under 'images'"):
        open_records(written([1], "list.json"), "images")
    assert list(open_records(written({"": [1, 2]}, "empty_key.json"), "")) == [1, 2]


@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_json_lines_are_read_as_a_list(tmp_path, mark, end):
    rows = [{"id": 7, "text": "caf\u00e9\nnext"}, {"id": 9, "more": [{"id": 1}]}, {"id": 11}]
    path = tmp_path / "lines.json"
    path.write_bytes(mark + ("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end).encode())
    records = open_records(path)
    assert list(records) == rows
    assert records.integers("id").tolist() == [7, 9, 11]
    with pytest.raises(DataError, match="found one list, expected a list under 'images'"):
        open_records(path, "images")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"id": 1} {"id": 2}', "at byte 10 of 19: found .*, expected an object on a line of its own"),
        (b'{"id": 1}\n{"id": 2', "at byte 10 of 18: found invalid JSON"),
        (b'{"id": 1}\n{"id": 2}\n[3]', "at byte 20 of 23: found .*, expected an object on a line of its own"),
        (b'{"id": 1}\n[2]', "at byte 10 of 13: found '\\[' after the end of the data"),
    ],
)
def test_neither_one_json_value_nor_json_lines_is_rejected(tmp_path, content, reason):
    (tmp_path / "lines.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_records(tmp_path / "lines.json")


def test_an_index_that_cannot_be_read_names_the_variable_for_another_folder(written, monkeypatch):
    path = written([{"id": 1}])
    open_records(path)

    def refused(file, **_):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(records_module.np, "load", refused)
    with pytest.raises(DataError, match=r"spans_0\.npy: found an index file that cannot be read .*PIXEL_SAIL_CACHE"):
        open_records(path)


def test_an_absent_file_is_a_data_error(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="found no such file"):
            open_records(path)


def test_a_file_without_the_right_to_read_is_a_data_error(written):
    path = written([1])
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(DataError, match="cannot be read"):
        open_records(path)


def test_records_are_a_sequence(written):
    records = open_records(written(list(range(10))))
    assert (records[0], records[-1], records[2:5], records[::-4], len(records)) == (0, 9, [2, 3, 4], [9, 5, 1], 10)
    assert list(reversed(records)) == list(range(9, -1, -1))
    with pytest.raises(IndexError):
        records[10]


def test_every_reading_gives_a_new_record(written):
    records = open_records(written(ROWS))
    records[0]["text"] = "changed"
    assert records[0] == ROWS[0]


def test_integer_fields_and_lookup(written):
    records = open_records(
        written({"rows": [{"id": i * i, "group": i % 3, "big": 2**62 + i} for i in range(20)]}), "rows"
    )
    assert records.integers("id").tolist() == [i * i for i in range(20)]
    assert records.integers("big").tolist() == [2**62 + i for i in range(20)]
    groups = records.lookup("group")
    assert (groups.all(1), groups.all(7), groups.all(2**80)) == ([1, 4, 7, 10, 13, 16, 19], [], [])
    assert records.lookup("big").one(2**62 + 3) == 3
    with pytest.raises(DataError, match=r"rows, group: found 7 records with 1, expected exactly one"):
        groups.one(1)
    with pytest.raises(DataError, match="found 0 records with 5"):
        records.lookup("id").one(5)


@pytest.mark.parametrize("wrong", [1.0, True, "7", None, 2**63])
def test_a_field_that_is_not_an_integer_everywhere_is_named(written, wrong):
    records = open_records(written([{"id": 1}, {"id": 2}, {"id": wrong}, {"id": 4}]))
    with pytest.raises(DataError, match=r"file\.json\[2\]: found id = .* expected an integer of 64 bits"):
        records.integers("id")
    with pytest.raises(DataError, match=r"\[1\]: found id = None"):
        open_records(written([{"id": 1}, 5], "mixed.json")).integers("id")


def test_fields_beyond_those_in_the_index_are_read_from_the_records(written):
    names = [f"n{i}" for i in range(MAX_FIELDS + 3)] + ["caf\u00e9"]
    records = open_records(written([{name: i for i, name in enumerate(names)}] * 2, ensure_ascii=False))
    assert [records.integers(name).tolist() for name in names] == [[i, i] for i in range(len(names))]


def test_the_index_is_made_once_per_content_whatever_the_file_is_called(written, cache, monkeypatch):
    first = written(ROWS)
    assert list(open_records(first)) == ROWS
    monkeypatch.setattr(records_module, "scan", None)
    copy = first.with_name("copy.json")
    shutil.copy(first, copy)
    assert list(open_records(copy)) == ROWS
    assert open_records(copy).integers("id").tolist() == [7, -3]
    assert str(copy) in open_records(copy).where
    assert [path.suffix for path in sorted(cache.rglob("*.*")) if path.is_dir()] == []


def test_the_cache_folder_is_the_configured_one_or_the_users(monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", "~/index")
    assert cache_folder() == Path.home() / "index"
    monkeypatch.delenv("PIXEL_SAIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/pixel_sail")


def test_a_cache_folder_that_cannot_be_written_is_named(written, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file\.json cannot be written .* variable PIXEL_SAIL_CACHE"):
        open_records(written(ROWS))


@pytest.mark.parametrize("damage", ["contents.json", "spans_0.npy", "fields_0.npy", "cut"])
def test_an_index_that_lost_a_file_is_rebuilt(written, cache, damage):
    path = written(ROWS)
    open_records(path)
    (folder,) = (path.parent for path in cache.rglob("contents.json"))
    if damage == "cut":
        os.truncate(folder / "spans_0.npy", 130)
    else:
        (folder / damage).unlink()
    leftover = folder.with_name(f"{folder.name}.1.partial")
    leftover.mkdir()
    assert list(open_records(path)) == ROWS
    assert not leftover.exists()


def test_a_changed_file_gets_an_index_of_its_own(written):
    assert list(open_records(written([1, 2]))) == [1, 2]
    assert list(open_records(written([10, 2]))) == [10, 2]


def test_a_file_cut_under_a_running_process_is_an_error(written):
    path = written([{"id": i} for i in range(2000)])
    records = open_records(path)
    assert records[1999] == {"id": 1999}
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"found 100 bytes, expected \d+ bytes; the file was changed under a running"):
        records[1999]


def test_a_file_replaced_before_the_first_reading_is_an_error(written):
    records = open_records(written([11, 22]))
    os.utime(written([11, 33]), ns=(0, 0))
    with pytest.raises(DataError, match="found another content, expected the one that was opened"):
        records[0]
    written([1]).unlink()
    with pytest.raises(DataError, match="found no readable file"):
        records[0]


def test_a_file_that_was_only_touched_is_still_the_same(written):
    path = written([11, 22])
    records = open_records(path)
    os.utime(path, ns=(0, 0))
    assert list(records) == [11, 22]


def test_a_file_that_changes_while_its_index_is_made_is_an_error(written, monkeypatch):
    monkeypatch.setattr(records_module, "sha256", lambda path: "0" * 64)
    with pytest.raises(DataError, match="changes while it is read"):
        open_records(written([1]))


def _checksum(path, barrier):
    barrier.wait(60)
    records = open_records(path, "rows")
    return sum(records[int(i)]["id"] for i in np.random.default_rng(0).permutation(len(records)))


def _read_in_worker(queue, path, barrier):
    queue.put(_checksum(path, barrier))


def test_processes_that_open_a_new_file_at_once_all_read_it(written, cache):
    path = written({"rows": [{"id": i, "text": "x" * (i % 50)} for i in range(3000)]})
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(6)
    workers = [context.Process(target=_read_in_worker, args=(queue, path, barrier)) for _ in range(6)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [sum(range(3000))] * 6
    for worker in workers:
        worker.join(60)
    assert len(list(cache.rglob("contents.json"))) == 1
    assert not list(cache.rglob("*.partial"))


def _read_all(queue, records):
    queue.put((list(records), records.integers("id").tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_records_go_to_workers(written, method):
    records = open_records(written({"rows": ROWS}), "rows")
    assert records[0] == ROWS[0]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_all, args=(queue, records))
    worker.start()
    assert queue.get(timeout=60) == (ROWS, [7, -3])
    worker.join(60)


def test_a_pickled_file_contains_no_text(written):
    rows = [{"id": i, "text": "x" * 100} for i in range(1000)]
    records = open_records(written(rows))
    text = pickle.dumps(records)
    assert len(text) < 2000
    assert list(pickle.loads(text)) == rows


@pytest.mark.parametrize(
    ("folder", "file", "key"),
    [
        ("derived_refer_mini", "refcocog/instances.json", "annotations"),
        ("derived_gref_mini", "grefcoco/grefs(unc).json", None),
        ("refcocos_annotator", "refcocos_test.json", None),
        ("refcocos_annotator", "results/refcocos_test_complex.json", None),
        ("google_refexp_toolbox", "evaluation/sample_results/sample_results_comprehension.json", None),
        ("refer_toolbox", "test/sample_expressions_testA.json", "predictions"),
    ],
)
def test_shared_files_are_read_as_by_a_full_read(folder, file, key):
    path = shared_data(folder) / file
    whole = json.loads(path.read_bytes())
    assert list(open_records(path, key)) == (whole if key is None else whole[key])


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"PIXEL_SAIL_CACHE": "/c"}, "/c"),
        ({"PIXEL_SAIL_CACHE": "~/c", "HOME": "/home/me"}, "/home/me/c"),
        ({"PIXEL_SAIL_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/pixel_sail"),
        ({"PIXEL_SAIL_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/pixel_sail"),
        ({"PIXEL_SAIL_CACHE": "", "XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/pixel_sail"),
    ],
)
def test_the_cache_needs_no_home_folder_where_a_variable_names_one(monkeypatch, variables, folder):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(paths.pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.parametrize("home", [None, ""])
@pytest.mark.parametrize("cache", ["", "~/c"])
def test_an_error_without_home_folder_names_the_variable_to_set(monkeypatch, home, cache):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(paths.pwd, "getpwuid", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("PIXEL_SAIL_CACHE", cache)
    with pytest.raises(DataError, match="PIXEL_SAIL_CACHE"):
        cache_folder()

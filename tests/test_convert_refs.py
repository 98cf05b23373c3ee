"""Refs pickles are converted to JSON lines, which sources read instead as long as the pickle is unchanged."""

import json
import os
import pickle

import pytest
from running import load_tool
from shared_data import shared_data

from pixel_sail.data import refer_annotations, refs_files
from pixel_sail.data.pickles import load_plain_pickle
from pixel_sail.data.refer_annotations import load_refer
from pixel_sail.data.refs_files import convert, find_refs_file, read_refs
from pixel_sail.data.sources.refer import expressions
from pixel_sail.files import sha256
from pixel_sail.types import DataError

REFS = [
    {"ref_id": 1, "image_id": 5, "ann_id": 9, "split": "val", "sentences": [{"sent_id": 1, "sent": "a", "raw": "A"}]},
    {
        "ref_id": 2,
        "image_id": 5,
        "ann_id": 9,
        "split": "val",
        "box": [1.5, None, True],
        "raw": "caf\u00e9\u2028 \n \x85",
    },
]


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "index_cache"))


@pytest.fixture(scope="module")
def tool():
    return load_tool("convert_refs")


@pytest.fixture
def refs_pickle(tmp_path):
    path = tmp_path / "toy" / "refs(unc).p"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(REFS, protocol=2))
    return path


def _header_and_lines(path):
    header, *lines = path.read_text().splitlines()
    return json.loads(header), lines


def test_the_converted_file_has_the_same_refs_and_names_its_source(refs_pickle):
    path, num_refs = convert(refs_pickle)
    assert (path, num_refs) == (refs_pickle.with_name("refs(unc).jsonl"), 2)
    header, lines = _header_and_lines(path)
    assert (header["source_sha256"], header["num_refs"], len(lines)) == (sha256(refs_pickle), 2, 2)
    assert [json.loads(line) for line in lines] == REFS == read_refs(path)
    assert sorted(item.name for item in refs_pickle.parent.iterdir()) == ["refs(unc).jsonl", "refs(unc).p"]


def test_the_converted_file_is_read_in_place_of_the_pickle(refs_pickle, monkeypatch):
    convert(refs_pickle)
    found = find_refs_file(refs_pickle.parent, "unc")
    assert found == find_refs_file(refs_pickle.parent, None) == refs_pickle.with_suffix(".jsonl")
    monkeypatch.setattr(refs_files, "load_plain_pickle", None)
    assert read_refs(found) == REFS
    refs_pickle.unlink()
    assert read_refs(find_refs_file(refs_pickle.parent, "unc")) == REFS


def test_a_pickle_with_other_contents_is_rejected(refs_pickle):
    converted, _ = convert(refs_pickle)
    old = sha256(refs_pickle)
    refs_pickle.write_bytes(pickle.dumps(REFS[:1], protocol=2))
    reason = rf"refs\(unc\)\.jsonl: found .* sha256 {old}, expected {sha256(refs_pickle)} .*convert_refs\.py again"
    with pytest.raises(DataError, match=reason):
        read_refs(converted)
    convert(refs_pickle)
    assert read_refs(converted) == REFS[:1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-3], "2 refs|1 refs"),
        (lambda text: text[: text.rindex('{"ref_id": 2')], "found 1 refs whose sha256 .* expected the 2 refs"),
        (lambda text: text.replace('"ann_id": 9', '"ann_id": 8', 1), "found 2 refs whose sha256"),
        (lambda text: text + text.splitlines(keepends=True)[-1], "found 3 refs whose sha256"),
        (lambda text: text.partition("\n")[2], "found first line"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "found first line .*'version': 1"),
        (lambda text: text.replace('"num_refs": 2', '"num_refs": "2"'), "found num_refs = '2' in the first line"),
        (lambda text: text.replace("source_sha256", "sha"), "found source_sha256 = None in the first line"),
        (lambda text: "", "found first line b''"),
        (lambda text: "\x00\xff" + text, "found first line"),
    ],
)
def test_a_damaged_converted_file_is_rejected(refs_pickle, damage, reason):
    converted, _ = convert(refs_pickle)
    converted.write_text(damage(converted.read_text()), encoding="latin-1")
    with pytest.raises(DataError, match=rf"refs\(unc\)\.jsonl: .*({reason}).*convert_refs\.py again"):
        read_refs(converted)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({1, 2}, "not JSON serializable"),
        (b"x", "not JSON serializable"),
        (float("nan"), "not JSON compliant"),
        ((1, 2), "tuples or keys"),
        ({1: 2}, "tuples or keys"),
    ],
)
def test_values_that_json_would_change_are_rejected_and_nothing_is_written(refs_pickle, value, reason):
    refs_pickle.write_bytes(pickle.dumps([REFS[0], {**REFS[1], "extra": value}]))
    with pytest.raises(DataError, match=rf"refs\(unc\)\.p: ref 1: .*{reason}.*keep the pickle"):
        convert(refs_pickle)
    assert [item.name for item in refs_pickle.parent.iterdir()] == ["refs(unc).p"]


def test_an_unsafe_pickle_is_rejected_without_running_it(refs_pickle):
    refs_pickle.write_bytes(pickle.dumps([os.getcwd]))
    with pytest.raises(DataError, match=r"request for .*getcwd"):
        convert(refs_pickle)


def test_several_kinds_of_refs_in_a_folder_are_not_guessed_among(refs_pickle):
    (refs_pickle.parent / "grefs(unc).json").write_text("[]")
    with pytest.raises(DataError, match=r"found \['grefs\(unc\)\.json', 'refs\(unc\)\.p'\], expected exactly one"):
        find_refs_file(refs_pickle.parent, "unc")


def test_the_tool_converts_all_below_a_folder_and_continues_after_a_failure(tool, refs_pickle, tmp_path, capsys):
    other = tmp_path / "other" / "grefs(google).p"
    other.parent.mkdir()
    other.write_bytes(b"\x80\x02broken")
    assert tool.main([str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "refs(unc).jsonl: 2 refs" in output.out
    assert "grefs(google).p: found bytes that do not unpickle" in output.err
    assert not other.with_suffix(".jsonl").exists()


def test_the_tool_leaves_what_is_up_to_date_and_renews_what_is_not(tool, refs_pickle, capsys):
    converted = refs_pickle.with_suffix(".jsonl")
    assert tool.main([str(refs_pickle)]) == 0
    written = converted.stat().st_mtime_ns
    assert tool.main([str(refs_pickle)]) == 0
    assert converted.stat().st_mtime_ns == written
    assert "up to date" in capsys.readouterr().out
    refs_pickle.write_bytes(pickle.dumps(REFS[:1]))
    assert tool.main([str(refs_pickle)]) == 0
    assert read_refs(converted) == REFS[:1]
    converted.write_text("nonsense")
    assert tool.main([str(refs_pickle)]) == 0
    assert "rewritten" in capsys.readouterr().err
    assert read_refs(converted) == REFS[:1]


def test_nothing_to_convert_is_an_error_of_the_tool(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert "found no refs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "splits"), [("derived_refer_mini", ["val"]), ("derived_refer_mini_nophotos", ["train", "val"])]
)
def test_shared_refs_give_the_same_expressions_after_conversion(tool, tmp_path, folder, splits, monkeypatch):
    source = shared_data(folder) / "refcocog"
    copy = tmp_path / "refcocog"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = [expressions(load_refer(tmp_path, "refcocog", split, split_by="google")) for split in splits]
    assert tool.main([str(tmp_path)]) == 0
    assert read_refs(copy / "refs(google).jsonl") == load_plain_pickle(copy / "refs(google).p")
    used = []
    monkeypatch.setattr(refer_annotations, "read_refs", lambda file: used.append(file.name) or read_refs(file))
    after = [expressions(load_refer(tmp_path, "refcocog", split, split_by="google")) for split in splits]
    assert before == after
    assert set(used) == {"refs(google).jsonl"}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_grefs_written_as_json_lines_are_read_as_a_list(tmp_path, mark):
    path = tmp_path / "grefs(x).json"
    path.write_text(mark + "\n".join(map(json.dumps, REFS)), encoding="utf-8")
    assert read_refs(path) == REFS
    path.write_text(json.dumps(REFS[0]) + "\n[1]")
    with pytest.raises(DataError, match="after the end of the data"):
        read_refs(path)

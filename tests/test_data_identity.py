"""A run records its annotation files, and does not resume with different ones unless configured to."""

import hashlib
import json
import shutil
import sys

from running import start
from test_train import SMALL

from pixel_sail.data.fingerprint import add_to_fingerprint, data_fingerprint
from pixel_sail.data.panoptic import open_panoptic
from pixel_sail.data.refs_files import convert, read_refs
from pixel_sail.data.sources.refer import load_refer


def test_every_file_is_recorded_by_folder_and_name_while_recording(tmp_path):
    with data_fingerprint() as outer:
        add_to_fingerprint(tmp_path / "a" / "x.json", "11")
        with data_fingerprint() as inner:
            add_to_fingerprint(tmp_path / "b" / "x.json", "22")
        add_to_fingerprint(tmp_path / "c" / "a" / "x.json", "33")
    add_to_fingerprint(tmp_path / "a" / "x.json", "44")
    assert outer == {"a/x.json": {"11", "33"}} and inner == {"b/x.json": {"22"}}


def test_readers_note_what_they_read(data_root):
    root = data_root / "refshapes"
    with data_fingerprint() as files:
        load_refer(root, "refshapes", "train")
        open_panoptic(root / "panoptic", "train")
    for name in ("refshapes/instances.json", "annotations/panoptic_train.json"):
        (path,) = root.rglob(name)
        assert files[name] == {hashlib.sha256(path.read_bytes()).hexdigest()}
    assert any(name.startswith("refshapes/refs(") for name in files)


def test_converting_a_pickle_keeps_its_fingerprint(data_root, tmp_path):
    (pickle,) = (data_root / "refshapes" / "refshapes").glob("refs(*).p")
    copy = tmp_path / pickle.name
    shutil.copy(pickle, copy)
    with data_fingerprint() as before:
        read_refs(copy)
    converted, _ = convert(copy)
    with data_fingerprint() as after:
        read_refs(converted)
    assert len(before) == 1 and before == after


def test_a_run_does_not_resume_with_changed_annotations_unless_configured(data_root, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data_root, own)
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path / 'run'}", "optim.steps=2"]
    done = start([*command, "checkpoint.stop_after=1"], own)
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    kept = json.loads(saved.read_text())["config"]["data_files"]
    assert kept["items"]["refshapes"] > 0 and len(kept["refshapes/instances.json"]) == 1
    with (own / "refshapes" / "refshapes" / "instances.json").open("a") as file:
        file.write("\n")
    done = start(command, own)
    assert done.returncode == 2
    assert "other data" in done.stderr and "refshapes/instances.json" in done.stderr
    done = start([*command, "checkpoint.allow_changed_data=true"], own)
    assert done.returncode == 0 and "refshapes/instances.json" in done.stderr, done.stderr[-2000:]
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2

"""A process killed at any file operation leaves only complete files under final names, and a rerun ends as if
nothing had happened.

A kill is an exception at the n-th operation, for every n; later operations have no effect, as clean-ups of a dead
process do not run. A file opened for writing is also left with half of its content.
"""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_writer import CONFIG
from test_teacher_cache import IDENTITY, compute

from pixel_sail import files
from pixel_sail.config import PredictConfig
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.distillation import cache_writer
from pixel_sail.distillation.cache import FeatureCache
from pixel_sail.distillation.cache_writer import finish, is_shard_complete, plan_cache, start_folder, write_shard
from pixel_sail.errors import WriteError
from pixel_sail.evaluation.engine import evaluate
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.refer_seg import as_task
from pixel_sail.evaluation.report import write_html_report
from pixel_sail.evaluation.results import append_row, read_rows
from pixel_sail.files import read_json_lines, recover_folder, replace_folder
from pixel_sail.training import checkpoint, checkpoint_writer
from pixel_sail.training.checkpoint import TrainState, complete_checkpoints, latest, verify
from pixel_sail.training.checkpoint_writer import remove_unfinished, write_checkpoint
from pixel_sail.training.log import cut_log
from pixel_sail.types import DataError

HALF = b'{"half": '
CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "truncate")


class Death(BaseException):
    """The process is gone."""


class Mortal:
    """Counts file operations inside the context, and dies at one of them."""

    def __init__(self, monkeypatch, dies_at: int | None) -> None:
        self.count, self.dies_at, self.is_active = 0, dies_at, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(files, "_exchange", self.wrapped(files._exchange))
        opened = io.open

        def open_file(file, mode="r", *rest, **options):
            if self.is_active and set(mode) & set("wax+"):
                self.operation()
                made = opened(file, mode, *rest, **options)
                self.operation(lambda: (made.write(HALF if "b" in mode else HALF.decode()), made.flush()))
                return made
            return opened(file, mode, *rest, **options)

        def save(tensors, path, **options):
            self.operation()
            self.operation(lambda: Path(path).write_bytes(HALF))
            save_file(tensors, path, **options)

        monkeypatch.setattr(io, "open", open_file)
        for module in (checkpoint_writer, cache_writer, safetensors.torch):
            monkeypatch.setattr(module, "save_file", save)

    def wrapped(self, call):
        def mortal(*arguments, **options):
            self.operation()
            return call(*arguments, **options)

        return mortal

    def operation(self, last_act=lambda: None) -> None:
        if not self.is_active:
            return
        self.count += 1
        if self.dies_at is not None and self.count >= self.dies_at:
            if self.count == self.dies_at:
                self.is_active = False
                last_act()
                self.is_active = True
            raise Death

    def __enter__(self):
        self.is_active = True
        return self

    def __exit__(self, kind, error, trace):
        self.is_active = False
        return kind is Death


def survive(tmp_path, *, prepare, act, check, done) -> int:
    """Let `act` die at each of its operations: `check` the leftovers, act again, and assert that it is `done`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(tmp_path / "whole")
        with Mortal(monkeypatch, None) as alive:
            act(tmp_path / "whole")
    done(tmp_path / "whole")
    for number in range(1, alive.count + 1):
        folder = tmp_path / str(number)
        prepare(folder)
        with pytest.MonkeyPatch.context() as monkeypatch, Mortal(monkeypatch, number) as mortal:
            act(folder)
        assert mortal.count >= number, "it died"
        check(folder)
        act(folder)
        done(folder)
        shutil.rmtree(folder)
    assert alive.count > 3
    return alive.count


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 4), float(value))}


def save(folder: Path, step: int) -> None:
    remove_unfinished(folder)
    write_checkpoint(folder, TrainState(step=step), tensors(step), tensors(-step), config=CONFIG, keep=2)


def test_killed_while_a_checkpoint_is_saved_and_an_old_one_deleted(tmp_path):
    def prepare(folder):
        folder.mkdir()
        save(folder, 1)
        shutil.copytree(folder / "step_00000001", folder / "step_00000001_best")
        save(folder, 2)

    def check(folder):
        assert latest(folder).name in ("step_00000002", "step_00000003")
        for path in complete_checkpoints(folder):
            verify(path)
        verify(folder / "step_00000001_best")

    def done(folder):
        names = ["step_00000001_best", "step_00000002", "step_00000003"]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert checkpoint.read(folder / names[2], CONFIG)[1]["weight"][0, 0] == 3

    survive(tmp_path, prepare=prepare, act=lambda folder: save(folder, 3), check=check, done=done)


class Written:
    """A model or processor that writes a file."""

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value = name, value

    def save_pretrained(self, folder, state_dict=None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors(self.value), Path(folder) / self.name)


def export(folder: Path, value: float) -> None:
    checkpoint.write_export(folder / "export", Written("model", value), Written("processor", value), {})


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_while_an_export_replaces_an_older_one(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)

    def prepare(folder):
        folder.mkdir()
        export(folder, 1.0)

    def whole(path):
        values = {load_file(path / name)["weight"][0, 0].item() for name in ("model", "processor")}
        return len(values) == 1

    def check(folder):
        place = folder / "export"
        if not exchanges and not place.exists():
            place = folder / ".replaced_export"
        assert whole(place)

    def done(folder):
        assert [path.name for path in folder.iterdir()] == ["export"]
        assert load_file(folder / "export" / "model")["weight"][0, 0] == 2

    survive(tmp_path, prepare=prepare, act=lambda folder: export(folder, 2.0), check=check, done=done)


def test_a_folder_without_its_name_gets_it_back_before_a_new_one_is_written(tmp_path):
    (tmp_path / ".replaced_export").mkdir()
    (tmp_path / ".replaced_export" / "old").touch()
    (tmp_path / ".writing_export").mkdir()
    recover_folder(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (tmp_path / "export" / "old").exists()
    (tmp_path / "new").mkdir()
    replace_folder(tmp_path / "new", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and not list((tmp_path / "export").iterdir())


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_is_replaced_and_the_target_of_a_link_is_kept(tmp_path, monkeypatch, exchanges, kind):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    if kind == "link":
        (tmp_path / "export").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "export").touch()
    export(tmp_path, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "export"]
    assert (tmp_path / "elsewhere" / "kept").exists() and (tmp_path / "export" / "model").exists()


def test_an_export_on_a_full_disk_leaves_only_the_older_one(tmp_path):
    export(tmp_path, 1.0)

    class Full(Written):
        def save_pretrained(self, folder, state_dict=None):
            super().save_pretrained(folder)
            raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(WriteError, match=r"export: cannot be written .*No space left"):
        checkpoint.write_export(tmp_path / "export", Written("model", 2.0), Full("processor", 2.0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert load_file(tmp_path / "export" / "model")["weight"][0, 0] == 1


def test_killed_while_a_feature_cache_is_built(tmp_path):
    def act(folder):
        plan = plan_cache(list("abc"), IDENTITY, dtype="fp16", images_per_shard=2)
        start_folder(folder, plan)
        for number in range(2):
            if not is_shard_complete(folder, number):
                write_shard(folder, plan, number, compute("fp16"))
        finish(folder, plan)

    def check(folder):
        if (folder / "index.json").exists():
            assert len(FeatureCache(folder, IDENTITY, where="test")) == 3

    def done(folder):
        own = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert own == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    survive(tmp_path, prepare=lambda folder: folder.mkdir(), act=act, check=check, done=done)


def test_killed_while_an_evaluation_generates_and_merges_its_answers(tmp_path, data_root, tiny_model, processor):
    annotations = load_refer(data_root / "refshapes", "refshapes", "val")
    task = as_task(expressions(annotations), "evals.val").first_images(2, "short")
    predictor = BatchPredictor(
        tiny_model(), processor, PredictConfig(max_new_tokens=1, prompt="short", answer="forced")
    )

    def act(folder):
        records = evaluate(predictor, task, folder / "val", protocol={"weights": "x"}, progress=False)
        assert len(records) == len(task.items)

    def check(folder):
        if (folder / "val" / "predictions.jsonl").exists():
            done(folder)

    def done(folder):
        own = (folder / "val" / "predictions.jsonl").read_bytes()
        assert own == (tmp_path / "whole" / "val" / "predictions.jsonl").read_bytes()

    survive(tmp_path, prepare=lambda folder: folder.mkdir(), act=act, check=check, done=done)


def test_killed_while_results_and_a_report_are_written(tmp_path):
    row = {"eval": "val", "scores": {"ciou": 0.5}}

    def prepare(folder):
        folder.mkdir()
        append_row(folder, row | {"eval": "before"})
        write_html_report(folder, title="before", facts=[], tables=[], cases={})

    def act(folder):
        append_row(folder, row)
        write_html_report(folder, title="after", facts=[], tables=[], cases={})

    def check(folder):
        assert {"before"} <= read_rows(folder).keys() <= {"before", "val"}
        assert (folder / "report.html").read_text().endswith("</html>\n")

    def done(folder):
        assert read_rows(folder) == {"before": row | {"eval": "before"}, "val": row}
        assert "after" in (folder / "report.html").read_text() and "after" in (folder / "report.md").read_text()

    survive(tmp_path, prepare=prepare, act=act, check=check, done=done)


CUT_ENDS = (b'{"step": 3', b'{"step": 3}', b"\0\0\0\0", b"\0\0\n\0", b'{"st\0\0\n', b"\xff\xfe")


@pytest.mark.parametrize("end", CUT_ENDS)
def test_a_truncated_last_line_is_skipped_and_the_next_is_appended_after_a_complete_one(tmp_path, end):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    rules = {"fail": DataError, "remedy": "delete it"}
    if end != b'{"st\0\0\n':
        assert read_json_lines(path, {"step": int}, **rules) == [{"step": 1}, {"step": 2}]
    cut_log(path, 2)
    files.append_line(path, json.dumps({"step": 4}))
    assert [line["step"] for line in read_json_lines(path, {"step": int}, **rules)] == [1, 2, 4]


@pytest.mark.parametrize("line", [b"\0\0\0\0", b"garbage", b"[]", b"{}", b'{"step": "1"}', b'{"step": true}', b"\xff"])
def test_garbage_among_the_lines_is_reported_by_file_and_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    for read in (
        lambda: read_json_lines(path, {"step": int}, fail=DataError, remedy="delete it"),
        lambda: cut_log(path, 2),
    ):
        with pytest.raises(DataError, match=r"log\.jsonl, line 2: found .*, expected .*; "):
            read()
    cut_log(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n', "rewritten files need not be read"

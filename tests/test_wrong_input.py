"""Every entry point x every file it reads x every damage: one message, status 2, and no partial output.

Runs a tenth of the pairs by default; EVERY_DAMAGE=1 runs all.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from running import ROOT, load_tool
from test_train import SMALL
from torch import distributed
from torch.utils.data import get_worker_info

from pixel_sail.data.mixture import Mixture
from pixel_sail.files import sha256

STEP = "run/checkpoints/step_00000002"
EXPORT = "run/export"
LOGGED = ("run/log.jsonl", "run/rollbacks.jsonl")
TOKENIZER = "data/refshapes/tokenizer"

READS = {
    "train": (
        *(f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer_config.json"),
        *(f"{STEP}/{name}" for name in ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")),
        *LOGGED,
    ),
    "start": (f"{EXPORT}/config.json", f"{EXPORT}/model.safetensors"),
    "evaluate": (f"{EXPORT}/config.json", f"{EXPORT}/processor_config.json", f"{EXPORT}/tokenizer.json"),
    "predict": (
        *(f"{EXPORT}/{name}" for name in ("config.json", "processor_config.json", "tokenizer.json")),
        *(f"{EXPORT}/{name}" for name in ("tokenizer_config.json", "model.safetensors")),
        "image.png",
    ),
    "export_checkpoint": (
        "run/config.json",
        *(f"{STEP}/{name}" for name in ("manifest.json", "model.safetensors", "optimizer.safetensors")),
        f"{TOKENIZER}/tokenizer.json",
    ),
    "publish_model": (
        *("run/config.json", "run/starts.jsonl", "run/evaluation/results.jsonl"),
        *(f"{EXPORT}/config.json", f"{EXPORT}/model.safetensors"),
    ),
    "plot_run": ("run/log.jsonl",),
    "make_tables": ("run/evaluation/results.jsonl",),
}
"""Entry point -> the files it reads, in a folder with a finished run. `start` is training from that run's export."""

MAY_PASS = {
    f"{TOKENIZER}/tokenizer_config.json": "Hugging Face does without it",
    f"{EXPORT}/tokenizer_config.json": "Hugging Face does without it",
    "run/rollbacks.jsonl": "a run without it had no rollback",
    "run/log.jsonl": "lines are as good as none where the file is not there, and a cut end is left out",
    "run/starts.jsonl": "the card says that nothing was recorded",
    "run/evaluation/results.jsonl": "the card says that the weights were not scored; a cut end is left out",
    f"{EXPORT}/config.json": "the card takes the sizes from the run's configuration",
    f"{STEP}/state.json": "an export needs no state",
}
"""Files whose damage need not be detected, and why."""


def change_values(path: Path, change) -> None:
    """Replace every value in the JSON of a file; of a file of JSON lines, in its first line."""
    if path.suffix not in (".json", ".jsonl"):
        path.write_bytes(path.read_bytes()[::-1])
        return
    first, *rest = path.read_text().splitlines(True) if path.suffix == ".jsonl" else [path.read_text()]

    def changed(value):
        if isinstance(value, dict):
            return {key: changed(own) for key, own in value.items()}
        return [changed(own) for own in value] if isinstance(value, list) and value else change(value)

    path.write_text(json.dumps(changed(json.loads(first))) + "\n" + "".join(rest))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_loop(path: Path) -> None:
    """A link to itself is unreadable for everyone; permissions do not stop root."""
    path.unlink()
    path.symlink_to(path)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a list": lambda path: path.write_text("[]\n{}\n"[: 3 if path.suffix == ".json" else 6]),
    "null": lambda path: path.write_text("null\nnull\n"[: 5 if path.suffix == ".json" else 10]),
    "wrong types": lambda path: change_values(path, lambda value: [] if isinstance(value, str) else "x"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 8 + b"\n{}\n"),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n{}\n"),
    "huge": lambda path: change_values(path, lambda v: 10**12 if type(v) is int else v),
    "digits": lambda path: path.write_text('{"step": ' + "9" * 10_000 + "}\n"),
    "unreadable": to_loop,
    "folder": to_folder,
}


@cache
def script_main(name: str):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def in_process():
    """Training and evaluation within this process, whose state is restored afterwards."""
    variables, handlers = dict(os.environ), {number: signal.getsignal(number) for number in (signal.SIGTERM, 10, 12)}
    yield
    os.environ.clear()
    os.environ.update(variables)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train_arguments(folder: Path, *overrides: str) -> list[str]:
    fixed = ("deepspeed=none", "optim.steps=3", "checkpoint.stop_after=2", "checkpoint.every=2", "watchdog.limit_s=0")
    return [*SMALL, *fixed, f"paths.data={folder / 'data'}", f"run_dir={folder / 'run'}", *overrides]


def call(entry: str, folder: Path, monkeypatch, *overrides: str) -> int:
    """Run an entry point on a folder; return its status."""
    export = folder / "run" / "export"
    if entry == "start":
        entry, overrides = "train", [f"model.init_from={export}", f"run_dir={folder / 'new'}", "optim.steps=1"]
    if entry in ("train", "evaluate", "predict"):
        # Accelerate keeps the process group of the previous call, which has ended.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        question = "question=Please segment the star."
        arguments = {
            "train": train_arguments(folder, *overrides),
            "evaluate": [
                *(f"checkpoint={export}", "evals=[refshapes_val]", f"paths.data={folder / 'data'}"),
                *(f"output={folder / 'scores'}", "max_images=1", "predict.prompt=short", "progress=false"),
            ],
            "predict": [f"checkpoint={export}", f"image={folder / 'image.png'}", question, f"output={folder / 'out'}"],
        }[entry]
        monkeypatch.setattr(sys, "argv", [entry, *arguments])
        return script_main(entry)()
    run = str(folder / "run")
    arguments = {
        "export_checkpoint": [run, "--to", str(folder / "exported")],
        "publish_model": [run, "--license", "mit"],
        "plot_run": [run, "--out", str(folder / "curves.png")],
        "make_tables": [f"mine={folder / 'run' / 'evaluation'}"],
    }[entry]
    return load_tool(entry).main(arguments)


@pytest.fixture(scope="module")
def finished(data_root, tmp_path_factory, in_process):
    """A folder with data, and a run of two steps with export, scores and a rollback long ago."""
    folder = tmp_path_factory.mktemp("finished") / "used"
    shutil.copytree(data_root, folder / "data", ignore=shutil.ignore_patterns("images"))
    (folder / "data" / "refshapes" / "images").symlink_to(data_root / "refshapes" / "images")
    Image.fromarray(np.full((24, 32, 3), 200, np.uint8)).save(folder / "image.png")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call("train", folder, monkeypatch) == 0
    note = {"from_step": 1, "failed_step": 2, "streams": [{"next": 0, "waiting": []}], "reason": "sampled"}
    (folder / "run" / "rollbacks.jsonl").write_text(json.dumps(note) + "\n")
    row = {
        **{"eval": "refshapes_val", "kind": "expressions", "scores": {"ciou": 0.5, "giou": 0.5, "count": 3}},
        **{"prompt": "short", "precision": "fp32", "code": "x", "intervals": {}},
        "weights_sha256": sha256(folder / "run" / "export" / "model.safetensors"),
    }
    (folder / "run" / "evaluation").mkdir()
    (folder / "run" / "evaluation" / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    shutil.copytree(folder, folder.with_name("kept"), symlinks=True)
    return folder


def restored(folder: Path) -> Path:
    """Return the restored finished folder. It is always at the same path, as runs record the path of their data."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder, symlinks=True)
    return folder


def pairs():
    """Return (entry point, file, damages)."""
    found, number = [], 0
    for entry, files in READS.items():
        for file in files:
            names = list(DAMAGES)
            chosen = (
                names
                if "EVERY_DAMAGE" in os.environ
                else [names[(number * 5 + own * 7) % len(names)] for own in (0, 1)]
            )
            number += 1
            found.append(pytest.param(entry, file, chosen, id=f"{entry}-{file}"))
    return found


def whole(folder: Path) -> dict[str, bytes]:
    """Return the files of export and checkpoint that must not change."""
    places = (folder / EXPORT, folder / STEP)
    return {str(path): path.read_bytes() for place in places for path in place.iterdir() if path.is_file()}


@pytest.mark.parametrize("entry", READS)
def test_undamaged_files_are_used(entry, finished, monkeypatch):
    assert call(entry, restored(finished), monkeypatch) == 0


def test_a_killed_data_worker_ends_with_86_and_a_message(finished, monkeypatch, capfd):
    item = Mixture.item

    def item_or_die(self, position):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, position)

    monkeypatch.setattr(Mixture, "item", item_or_die)
    folder = restored(finished)
    assert call("train", folder, monkeypatch, "data.num_workers=1") == 86
    assert re.search(
        r"^LostWorker: rank 0 of 1: DataLoader worker .*Run the same command again to resume",
        capfd.readouterr().err,
        re.M,
    )


@pytest.mark.parametrize(
    ("setting", "module"), [("log.wandb=offline", "wandb"), ("log.tensorboard=true", "torch.utils.tensorboard")]
)
def test_a_missing_logging_package_is_reported_before_anything_is_written(
    setting, module, finished, monkeypatch, capfd
):
    folder = restored(finished)
    monkeypatch.setitem(sys.modules, module, None)
    assert call("train", folder, monkeypatch, setting, f"run_dir={folder / 'other'}") == 2
    assert f"ConfigError: {setting.partition('=')[0]}: " in capfd.readouterr().err
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    "setting",
    ["model.tokenizer=/nonexistent", "model.init_from=/nonexistent", "model.architecture.num_attention_heads=0"],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_missing_start_is_reported_by_training_and_its_dry_run(setting, dry, finished, monkeypatch, capfd):
    folder = restored(finished)
    assert call("train", folder, monkeypatch, setting, f"run_dir={folder / 'other'}", *["--dry-run"][: int(dry)]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and len(re.findall(r"^\w+Error: .*", said, re.MULTILINE)) == 1
    assert not (folder / "other").exists()


@pytest.mark.parametrize(("entry", "file", "damages"), pairs())
def test_a_damaged_file_is_reported_in_one_message_with_status_2(entry, file, damages, finished, monkeypatch, capfd):
    for damage in damages:
        folder = restored(finished)
        DAMAGES[damage](folder / file)
        if entry == "export_checkpoint" and file != f"{STEP}/manifest.json" and file.startswith(STEP):
            # Matching hashes, as if the file had been written like this.
            target, manifest = folder / file, folder / STEP / "manifest.json"
            hashes = json.loads(manifest.read_text())
            if target.is_file():
                manifest.write_text(json.dumps(hashes | {target.name: sha256(target)}))
        before = whole(folder)
        capfd.readouterr()
        status = call(entry, folder, monkeypatch)
        said = capfd.readouterr().err
        what = f"{entry}, {file} {damage}: status {status}, said {said[-600:]}"
        if status == 0:
            assert file in MAY_PASS or damage in ("huge", "wrong types"), what
            continue
        messages = re.findall(r"^\w+Error: .*", said, re.MULTILINE)
        assert status == 2 and len(messages) == 1, what
        assert "Traceback" not in said and len(messages[0]) < 3000, what
        assert str(folder) in messages[0] or Path(file).name in messages[0], what
        assert whole(folder) == before, what
        left = [path for path in folder.rglob(".writing_*") if not path.is_relative_to(folder / "data")]
        assert not left, what
        assert not any((folder / name).exists() for name in ("exported", "scores/results.jsonl", "curves.png")), what

"""The command pixel-sail runs the scripts, also from a wheel that was installed elsewhere."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path

import httpx
import pytest
from PIL import Image
from running import BIN, ROOT, environment

from pixel_sail import __version__, config
from pixel_sail.cli import COMMANDS, SCHEMAS, main


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the unpacked wheel, built from a copy of the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pixel_sail", "configs", "scripts", "tools"):
        shutil.copytree(ROOT / name, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, work / "source" / name)
    # Without dependencies and build isolation, so that nothing is downloaded.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--target", str(work / "installed"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(work / "source")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "installed"


def run_installed(installed, cwd, *arguments):
    own = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pixel_sail.cli", *arguments],
        cwd=cwd,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_wheel_carries_every_config_and_script(installed):
    for folder, pattern in (("configs", "*.yaml"), ("scripts", "*.py"), ("tools", "*.py")):
        expected = {path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern)}
        bundled = installed / "pixel_sail" / "bundled"
        assert {path.relative_to(bundled) for path in (bundled / folder).rglob("*") if path.is_file()} == expected
    assert (installed / "bin" / "pixel-sail").is_file()


def test_a_wheel_names_its_version_as_the_code_of_its_results(installed, tmp_path):
    code = "from pixel_sail.provenance import code_version; print(code_version())"
    # In a checkout of another project, whose commit is not that of this code.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    own = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"v{__version__}"


def test_an_installed_wheel_plans_outside_the_checkout(installed, tmp_path):
    done = run_installed(installed, tmp_path, "plan", "experiment=quickstart", "gpu=cpu", "gpus=1")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """Return a folder in which an installed wheel rendered its data and trained."""
    tmp_path = tmp_path_factory.mktemp("elsewhere")
    sampled = "data/refshapes"
    made = run_installed(installed, tmp_path, "make-data", *("--out", sampled, "--train", "8", "--eval", "3"))
    assert made.returncode == 0, made.stdout + made.stderr
    options = ("--refer-root", sampled, "--dataset", "refshapes", "--split", "train", "--vocab-size", "400")
    made = run_installed(installed, tmp_path, "make-tokenizer", *options, "--out", f"{sampled}/tokenizer")
    assert made.returncode == 0, made.stdout + made.stderr
    small = (
        *("model.architecture.hidden_size=32", "model.architecture.num_hidden_layers=1", "optim.steps=2"),
        *("deepspeed=none", "evals=[]", "log.tensorboard=false", "data.num_workers=0", "run_dir=runs/small"),
    )
    done = run_installed(installed, tmp_path, "train", "experiment=quickstart", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path


def test_an_installed_wheel_trains_outside_the_checkout(trained):
    assert (trained / "runs" / "small" / "export" / "model.safetensors").is_file()


def test_the_demo_of_an_installed_wheel_answers_and_ends_when_interrupted(installed, trained):
    own = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pixel_sail.cli", "demo", "checkpoint=runs/small", "port=0", "examples=1"]
    demo = subprocess.Popen(command, cwd=trained, env=os.environ | own, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in demo.stderr:
            said.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        assert found, "".join(said)
        assert "<canvas" in httpx.get(f"{found[1]}/", timeout=60).text
        info = httpx.get(f"{found[1]}/api/info", timeout=60).json()
        assert info["model"] == "small" and len(info["examples"]) == 1
        demo.send_signal(signal.SIGINT)
        _, rest = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 0, rest


def test_a_demo_without_a_checkpoint_names_the_missing_setting():
    for arguments, message in (([], "checkpoint"), (["checkpoint=runs/nowhere"], "runs/nowhere")):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "demo.py", *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_gives_arguments_and_exit_status_of_its_script(data_root):
    command = [str(BIN / "pixel-sail"), "train", "experiment=quickstart", "optim.stepz=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(data_root), capture_output=True, text=True)
    assert done.returncode == 2 and "stepz" in done.stderr


def test_every_command_has_its_script_and_a_line_of_help(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (script, about) in COMMANDS.items():
        assert (ROOT / script).is_file() and f"  {name} " in shown and about in shown
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"pixel-sail {__version__}\n"


def test_every_command_explains_itself(capsys):
    for name, (script, _) in COMMANDS.items():
        if name in SCHEMAS:
            assert main([name, "seed=1", "--help"]) == 0
            shown = capsys.readouterr().out
            assert shown.startswith(f"usage: pixel-sail {name} KEY=VALUE") and len(shown.splitlines()) > 5
        else:
            # Scripts with their own option parser and help.
            assert "ArgumentParser(" in (ROOT / script).read_text(), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_scripts_explain_themselves_too(monkeypatch, capsys, name):
    script = COMMANDS[name][0]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {Path(script).name} KEY=VALUE")


@pytest.mark.parametrize(("name", "schema"), [(name, schema) for name, schema in SCHEMAS.items() if schema])
def test_help_names_every_setting_its_default_and_its_meaning(capsys, name, schema):
    assert main([name, "-h"]) == 0
    shown = capsys.readouterr().out

    def check(fields, prefix):
        for field in fields:
            kind = field.default_factory
            if is_dataclass(kind) and kind.__module__ == config.__name__:
                check(dataclass_fields(kind), f"{prefix}{field.name}.")
                continue
            (line,) = re.findall(rf"^  {prefix}{field.name}(?:\.\*)?(?: .*)?$", shown, re.MULTILINE)
            if field.default == "???":
                assert " required" in line
            elif field.default not in (MISSING, None, ""):
                assert repr(field.default) in line

    check(dataclass_fields(getattr(config, schema)), "")
    if name == "predict":
        assert "Image file or folder of images." in shown


@pytest.mark.parametrize("script", ["predict", "demo"])
def test_scripts_explain_themselves_where_they_are_called_by_name(script):
    done = subprocess.run([sys.executable, ROOT / "scripts" / f"{script}.py", "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py KEY=VALUE") and not done.stderr


def test_predict_of_an_installed_wheel_prints_progress_for_a_folder(installed, trained):
    (trained / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (64, 48), "red").save(trained / "images" / name)
    options = ("checkpoint=runs/small", "image=images", "question=star", "predict.max_new_tokens=2", "output=out")
    done = run_installed(installed, trained, "predict", *options)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "images" in line] == [
        "1/2 images/a.png",
        "2/2 images/b.jpg",
    ]
    assert {path.name for path in (trained / "out").iterdir()} == {"a.json", "a.png", "b.json", "b.png"}


def test_a_demo_of_a_damaged_model_ends_with_one_message(trained, tmp_path):
    shutil.copytree(trained / "runs" / "small" / "export", tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 100)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", f"checkpoint={tmp_path / 'damaged'}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["trian"], ["completion"], ["completion", "fish"]])
def test_missing_inputs_end_with_status_2(capsys, arguments):
    assert main(arguments) == 2
    assert "pixel-sail" in capsys.readouterr().err


def test_bash_completes_the_commands():
    script = f'source <("{BIN / "pixel-sail"}" completion bash); COMP_WORDS=(pixel-sail e); COMP_CWORD=1; _pixel_sail; '
    done = subprocess.run(["bash", "-c", script + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert done.stdout.split() == ["evaluate", "export"], done.stderr

"""Folders crafted to execute code: every public entry point that reads one rejects it, and nothing runs.

Planted code writes a marker file when it runs, or prints a secret of the environment: functions named in files of an
evaluation, code in the folder of a tokenizer or model, pickles, hub kernels, interpolations, and an EPS called
image.jpg with a `gs` on the PATH that is ours.
"""

import ast
import importlib
import json
import os
import pickle
import runpy
import shutil
import stat
import subprocess
import sys

import pytest
from PIL import EpsImagePlugin, Image
from running import ROOT, load_tool
from test_checkpoint_writer import ACCELERATOR, trained, writer_to

from pixel_sail.config import ConfigError, EvalConfig, ModelConfig, load_config
from pixel_sail.conversion.convert import to_release
from pixel_sail.conversion.vocabulary import read_tokenizer
from pixel_sail.data.image_sizes import stored_hw, upright_hw
from pixel_sail.data.images import load_image, rgb_image
from pixel_sail.data.panoptic import read_segment_ids
from pixel_sail.distillation.mask2former import mask2former
from pixel_sail.distillation.ours import ours
from pixel_sail.evaluation.loaders import LOADER_TARGETS, LOADERS, eval_entry, load_entry, read_entry
from pixel_sail.evaluation.phrase_similarity import EncoderSimilarity
from pixel_sail.evaluation.run import run_evals
from pixel_sail.files import sha256
from pixel_sail.predictor import Predictor
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import CheckpointError, TrainState, latest, read
from pixel_sail.types import DataError
from pixel_sail.vqa.kit_requests import one_image

SECRET = "s3cret-of-the-environment"
LOOKUP = "${oc.env:PIXEL_SAIL_SECRET}"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 scale\nshowpage\n%%EOF\n"


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The marker file of planted code; checked at the end of the test."""
    marker = tmp_path / "marker"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "java"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PIXEL_SAIL_SECRET", SECRET)
    # transformers asks on the terminal whether code may run.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    yield marker
    assert not marker.exists()


def refusal_on(capsys):
    """Return stderr, after checking it for the secret and for tracebacks."""
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err and "Traceback" not in said.err
    return said.err


def code(marker):
    """Return the source of a module that writes the marker file when imported."""
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


# Evaluations.


def planted(marker, data_root):
    """Return name -> the value of `eval` in a protocol.json."""
    files = {"root": str(data_root / "refshapes"), "dataset": "refshapes", "split": "val"}
    load = {"_target_": "pixel_sail.evaluation.refer_seg.load"}
    touch = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(marker)]}]}
    job = {"name": "x", "overrides": [], "swept": {}}
    run_job = {"_target_": "pixel_sail.sweep.jobs.run_job", "job": job,
               "settings": {"launcher": ["/bin/sh", "-c", f"touch {marker}"]}}  # fmt: skip
    write = {"_target_": "pixel_sail.files.replace_text", "path": touch, "text": "x"}
    return {
        "a function of the package": run_job | {"max_images": 0},
        "a writer of the package": write | {"max_images": 0},
        "a source": {"_target_": "pixel_sail.data.sources.refer.load", **files, "max_images": 0},
        "a nested target": load | files | {"image_dir": touch, "max_images": 0},
        "a nested target in a list": load | files | {"dataset": ["refshapes", touch], "max_images": 0},
        "positional arguments": load | files | {"_args_": [touch], "max_images": 0},
        "a partial": load | files | {"_partial_": True, "max_images": 0},
        "a lookup": load | files | {"root": LOOKUP, "max_images": 0},
        "a limit that is called": load | files | {"max_images": touch},
        "a loader": {"loader": "os.mkdir", "settings": {"path": str(marker)}, "max_images": 0},
        "a loader that is imported": {"loader": "planted_module.load", "settings": {}, "max_images": 0},
        "settings that call": {"loader": "refer_seg", "settings": files | {"root": touch}, "max_images": 0},
        "a setting of another type": {"loader": "refer_seg", "settings": files | {"split": 3}, "max_images": 0},
        "an unknown setting": {"loader": "refer_seg", "settings": files | {"launcher": "x"}, "max_images": 0},
        "no object": [load],
        "nothing": None,
    }


KINDS = tuple(planted("", ROOT))


@pytest.fixture
def evaluation(tmp_path, trap, data_root, request, monkeypatch):
    """An evaluation folder with planted code, and an importable module that it names."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_module.py").write_text(code(trap))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "sweep" / "job" / "evaluation"
    (folder / "val").mkdir(parents=True)
    protocol = {"eval": planted(trap, data_root)[request.param], "predict": {"prompt": "standard"}}
    protocol |= {"questions_sha256": "q", "weights_sha256": "w"}
    (folder / "val" / "protocol.json").write_text(json.dumps(protocol))
    (folder / "val" / "predictions.jsonl").write_text("")
    (folder / "results.jsonl").write_text(json.dumps({"eval": "val", "scores": {"ciou": 0.5}}) + "\n")
    shutil.copytree(folder.parent, tmp_path / "sweep" / "other")
    jobs = {name: {"swept": {"x": name}, "overrides": []} for name in ("job", "other")}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return folder


@pytest.mark.parametrize("evaluation", KINDS, indirect=True)
def test_nothing_that_an_evaluation_names_is_run(evaluation, capsys):
    sweep, other = evaluation.parent.parent, evaluation.parent.parent / "other" / "evaluation"
    for tool, arguments in (
        ("score", ["--evaluated", str(evaluation / "val")]),
        ("compare_runs", [str(evaluation), str(other)]),
        ("make_tables", ["--sweep", str(sweep)]),
    ):
        assert load_tool(tool).main(arguments) == 2, tool
        said = refusal_on(capsys)
        assert "protocol.json: found" in said or "the settings do not fit" in said, said


@pytest.mark.parametrize("evaluation", ["a function of the package", "a loader that is imported"], indirect=True)
def test_an_evaluation_does_not_go_on_in_a_planted_folder(evaluation, model, data_root, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    evaluation.joinpath("val").rename(evaluation / "refshapes_val")
    options = [f"checkpoint={model}", f"output={evaluation}", "evals=[refshapes_val]", "progress=false"]
    with pytest.raises(ConfigError, match="found predictions of another protocol"):
        run_evals(load_config("evaluate", EvalConfig, options))


def test_a_user_function_is_called_if_allowed(tmp_path, monkeypatch, data_root):
    (tmp_path / "own_eval.py").write_text("def load(*, root: str): return [root]\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = read_entry(eval_entry({"_target_": "own_eval.load", "root": "a"}, 0), "here")
    with pytest.raises(DataError, match=r"found the loader 'own_eval\.load', expected one of"):
        load_entry(entry, "here")
    assert load_entry(entry, "here", ["own_eval.load"]) == ["a"]
    with pytest.raises(ConfigError, match=r"--loader own_eval\.absent"):
        load_entry(entry | {"loader": "own_eval.absent"}, "here", ["own_eval.absent"])


def test_every_eval_of_the_configuration_is_on_the_list_and_old_folders_name_the_same_functions():
    nodes = {}
    for file in sorted((ROOT / "configs" / "evals").glob("*.yaml")):
        nodes |= load_config("evaluate", EvalConfig, [f"evals=[{file.stem}]", "checkpoint=x"]).evals
    assert len(nodes) > 25
    for node in nodes.values():
        entry = read_entry(json.loads(json.dumps(eval_entry(node, 3))), "here")
        assert entry["loader"] in LOADERS and entry["max_images"] == 3
        assert read_entry(node | {"max_images": 3}, "here") == entry
    for target, name in LOADER_TARGETS.items():
        module, _, function = target.rpartition(".")
        assert getattr(importlib.import_module(module), function) is LOADERS[name]


def test_contents_of_a_file_named_by_an_evaluation_are_not_shown(tmp_path, trap):
    secret = tmp_path / "secret.json"
    for content in ([{"image": SECRET, "id": SECRET}], {"token": SECRET}, SECRET):
        secret.write_text(json.dumps(content))
        for loader in ("region_choice", "visual_referring", "perbench_caption", "boxed_expressions"):
            settings = {"annotations": str(secret), "image_dir": str(tmp_path)}
            with pytest.raises(DataError, match="hidden here") as refusal:
                load_entry({"loader": loader, "settings": settings, "max_images": 0}, "here")
            assert SECRET not in str(refusal.value) and refusal.value.__cause__ is None
    with pytest.raises(DataError, match="/absent"):
        load_entry({"loader": "refer_seg", "settings": {"root": "/absent", "dataset": "a", "split": "b"}}, "here")


# Models.


@pytest.fixture(scope="module")
def sound(tiny_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "export"
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model" / "export")


def changed(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def plant_in_model(folder, marker, kind):
    (folder / "planted.py").write_text(code(marker) + "class Tok: pass\nclass Model: pass\nclass Config: pass\n")
    if kind == "tokenizer code":
        changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Tok", None]})
    elif kind == "model code":
        classes = {"AutoConfig": "planted.Config", "AutoModel": "planted.Model"}
        changed(folder / "config.json", model_type="unknown", auto_map=classes)
    elif kind == "a nested kernel":
        changed(folder / "config.json", text_config={"attn_implementation": "somebody/kernel"})
    elif kind == "a kernel":
        changed(folder / "config.json", attn_implementation="somebody/kernel")
    elif kind == "an adapter":
        changed(folder / "adapter_config.json", base_model_name_or_path="somebody/model", peft_type="LORA")
    elif kind == "pickled weights":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    elif kind == "weights elsewhere":
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        content = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    else:
        changed(folder / "processor_config.json", tokenizer={"_target_": "os.mkdir", "path": str(marker)})


MODEL_KINDS = ("tokenizer code", "model code", "a kernel", "a nested kernel", "an adapter", "pickled weights",
               "weights elsewhere", "a processor that calls")  # fmt: skip


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_nothing_that_a_model_brings_is_run(model, trap, data_root, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    plant_in_model(model, trap, kind)
    options = [f"checkpoint={model}", f"output={tmp_path / 'out'}", "evals=[refshapes_val]", "progress=false"]
    with pytest.raises((ConfigError, DataError)):
        run_evals(load_config("evaluate", EvalConfig, options))
    with pytest.raises(ConfigError):
        Predictor.from_pretrained(model)
    image = next((data_root / "refshapes" / "images" / "train2014").iterdir())
    for script, arguments in (
        ("predict", [f"checkpoint={model}", f"image={image}", "question=star", f"output={tmp_path / 'out'}"]),
        ("demo", [f"checkpoint={model}"]),
    ):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        assert runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"]() == 2
        assert "ConfigError: " in refusal_on(capsys)
    if kind != "a processor that calls":
        # Conversion reads tensors and tokenizer, and a configuration as plain JSON.
        with pytest.raises((DataError, ConfigError)):
            to_release(model, tmp_path / "release")
    assert not (tmp_path / "release").exists()
    if kind not in ("tokenizer code", "a processor that calls"):
        with pytest.raises((DataError, ConfigError, ValueError)):
            ours(str(model)).build()


@pytest.mark.parametrize("kind", ["tokenizer code", "model code", "a kernel", "pickled weights"])
def test_a_training_runs_nothing_of_what_it_starts_from(model, sound, trap, make_config, kind):
    plant_in_model(model, trap, kind)
    config = ModelConfig(tokenizer=str(sound), init_from=str(model))
    if kind == "tokenizer code":
        config = ModelConfig(tokenizer=str(model))
    with pytest.raises(ConfigError, match=str(model)):
        build_model(config, seed=0, teachers={})


def test_other_folders_with_a_tokenizer_or_a_network_run_nothing(model, trap):
    plant_in_model(model, trap, "tokenizer code")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: found \['auto_map'\]"):
        read_tokenizer(model)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: found \['auto_map'\]"):
        EncoderSimilarity(model)(["a"], ["b"])
    plant_in_model(model, trap, "model code")
    with pytest.raises(DataError, match=r"config\.json: found \['auto_map'\]"):
        EncoderSimilarity(model)(["a"], ["b"])
    plant_in_model(model, trap, "a kernel")
    with pytest.raises(DataError, match="attn_implementation"):
        mask2former(str(model)).build()


def test_a_model_in_several_files_is_read_and_known_by_all_of_them(
    tiny_model, processor, tmp_path, data_root, monkeypatch
):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    processor.save_pretrained(folder)
    assert not (folder / "model.safetensors").exists() and len(list(folder.glob("model-*.safetensors"))) > 2
    options = [f"checkpoint={folder}", f"output={tmp_path / 'out'}", "evals=[refshapes_val]", "progress=false"]
    options += ["resamples=0", "examples=0", "predict.max_new_tokens=1", "max_images=1"]
    run_evals(load_config("evaluate", EvalConfig, options))
    tiny_model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(ConfigError, match=r"differing in .*model_files\.model-00001-of-"):
        run_evals(load_config("evaluate", EvalConfig, options))


# Runs.


def test_an_untrusted_run_executes_and_discloses_nothing(tmp_path, trap, sound, capsys):
    run = tmp_path / "run"
    weights, optimizer = trained()
    with writer_to(run / "checkpoints", asynchronous=False) as writer:
        writer.save(TrainState(step=1), weights, optimizer, ACCELERATOR)
    for settings in ({"tokenizer": LOOKUP}, {"tokenizer": str(sound), "_target_": "os.mkdir", "path": str(trap)}):
        (run / "config.json").write_text(json.dumps({"model": settings}))
        assert load_tool("export_checkpoint").main([str(run)]) == 2
        assert str(run / "config.json") in refusal_on(capsys)
    saved = latest(run / "checkpoints")
    state = json.loads((saved / "state.json").read_text())
    state["config"] = {"_target_": "os.mkdir", "path": str(trap), "name": LOOKUP}
    (saved / "state.json").write_text(json.dumps(state))
    manifest = json.loads((saved / "manifest.json").read_text()) | {"state.json": sha256(saved / "state.json")}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="another configuration"):
        read(saved, {"seed": 0})
    (run / "log.jsonl").write_text(json.dumps({"step": {"_target_": "os.mkdir", "path": str(trap)}}) + "\n")
    assert load_tool("plot_run").main([str(run)]) == 2
    shutil.copytree(sound, run / "export")
    for config in ([], {"model": {"_target_": "os.mkdir"}}, {"model": LOOKUP, "predict": {"prompt": LOOKUP}}):
        (run / "config.json").write_text(json.dumps(config))
        assert load_tool("publish_model").main([str(run), "--license", "mit"]) == 2
        refusal_on(capsys)


# Images.


@pytest.fixture
def vector_graphic(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(EPS)
    return path


def test_the_vector_graphic_would_start_a_program(trap, vector_graphic):
    with pytest.raises(subprocess.CalledProcessError), Image.open(vector_graphic) as opened:
        opened.load()
    assert trap.exists()
    trap.unlink()


def test_a_vector_graphic_called_image_starts_no_program(trap, vector_graphic):
    for read_file in (
        lambda: load_image(vector_graphic, where="here"),
        lambda: stored_hw(vector_graphic, "here"),
        lambda: upright_hw(vector_graphic, "here"),
        lambda: read_segment_ids(vector_graphic, (8, 8), "here"),
    ):
        with pytest.raises(
            DataError, match=r"here: .*image\.jpg: .*vector graphics such as EPS, PDF or SVG are not read"
        ):
            read_file()
    with Image.open(vector_graphic) as opened:
        for take in (lambda: rgb_image(opened, where="here"), lambda: one_image([opened], "here")):
            with pytest.raises(DataError, match="here: found an image of the format EPS, expected one of JPEG"):
                take()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "ICO", "JPEG2000"]
)
def test_raster_formats_are_read(tmp_path, kind):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "image", kind)
    assert load_image(tmp_path / "image", where="here").size == (16, 16)


def calls(path):
    """Yield the calls of a file, for example "Image.open", with their keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield f"{getattr(owner, 'id', '')}.{node.func.attr}", {keyword.arg for keyword in node.keywords}


def test_images_tokenizers_and_files_of_others_are_opened_in_one_place_each():
    for path in [
        *(ROOT / "pixel_sail").rglob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
    ]:
        name = str(path.relative_to(ROOT))
        for called, keywords in calls(path):
            if called == "Image.open":
                assert name == "pixel_sail/data/images.py" and "formats" in keywords
            if called in ("AutoTokenizer.from_pretrained", "AutoModel.from_pretrained", "AutoConfig.from_pretrained"):
                assert {"local_files_only", "trust_remote_code"} <= keywords, name
            if called == "torch.load":
                assert "weights_only" in keywords, name
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "os.system", "torch.hub.load"), name
            assert "allow_pickle" not in keywords and "shell" not in keywords, name

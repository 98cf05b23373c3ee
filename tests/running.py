"""Helpers for end-to-end tests: start the project's commands, and render the small benchmark they use."""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.dist import free_port
from pixel_sail.model.tokenization import train_tokenizer
from pixel_sail.refshapes import RefShapesSpec, write_refshapes

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


def make_data_root(root: Path, *, num_train: int = 10, num_eval: int = 3) -> Path:
    """Render the small benchmark and its tokenizer below a folder."""
    spec = RefShapesSpec(seed=3, num_train=num_train, num_eval=num_eval)
    write_refshapes(root / "refshapes", spec, num_workers=1)
    texts = [item.text for item in expressions(load_refer(root / "refshapes", "refshapes", "train"))]
    train_tokenizer(texts, vocab_size=400, num_visual_prompts=15).save_pretrained(str(root / "refshapes" / "tokenizer"))
    return root


@cache
def load_tool(name: str) -> ModuleType:
    """Return a script of `tools/` as a module, the same one in every test file."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def environment(data_root: Path) -> dict[str, str]:
    """Return the environment of a started process.

    One thread each, as with torchrun: runs that are compared bit for bit must not depend on how many threads a busy
    machine provides (docs/experiments.md, the run in a hundred).
    """
    own = {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return os.environ | {"PIXEL_SAIL_DATA": str(data_root)} | own


def launcher(name: str) -> list[str]:
    port = free_port()
    return {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={port}"],
        "accelerate": [
            *(str(BIN / "accelerate"), "launch", "--use_deepspeed", "--num_processes=2", "--num_machines=1"),
            *("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"),
        ],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators=2", f"--master_port={port}"],
    }[name]


def start(command: list[str], data_root: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, env=environment(data_root), capture_output=True, text=True, timeout=280)

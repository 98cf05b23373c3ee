"""Which code, packages and machine made something.

Beside `dist` and `places`; written into `starts.jsonl` of every run and every row of `results.jsonl`. An example:

    {"code": "515b51a", "device": "NVIDIA H100", "world_size": 8, "python": "3.11.7", "torch": "2.13.0", ...}
"""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pixel_sail
from pixel_sail import dist
from pixel_sail.paths import is_bundled

STARTS = "starts.jsonl"
"""File of a run folder with one line for every start of the run."""

RECORDED_PACKAGES = ("transformers", "accelerate", "deepspeed")


def code_version() -> str:
    """Return the commit of the code, with "+" when files differ from it, "unknown" outside a checkout, and for an
    installed wheel its version: the repository around a virtual environment is not ours."""
    root = Path(__file__).resolve().parent
    if is_bundled():
        return f"v{pixel_sail.__version__}"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name() -> str:
    """Return what this process computes on."""
    device = dist.local_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def machine() -> dict[str, Any]:
    """Return code, device and number of processes."""
    return {"code": code_version(), "device": device_name(), "world_size": dist.world_size()}


def packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers hang on."""
    # torch itself says for which CUDA it was built.
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: metadata.version(name) for name in RECORDED_PACKAGES}

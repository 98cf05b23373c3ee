"""Records the code, packages and machine of a run.

Written into `starts.jsonl` of every run and into every row of `results.jsonl`. An example:

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
    """Return the commit of the code, with "+" if tracked files are modified; "unknown" outside a checkout. For an
    installed wheel return its version, as a repository around the virtual environment is not ours."""
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
    """Return the name of this process's device."""
    device = dist.local_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def machine() -> dict[str, Any]:
    """Return code, device and number of processes."""
    return {"code": code_version(), "device": device_name(), "world_size": dist.world_size()}


def packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    # torch's own version string includes its CUDA build.
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: metadata.version(name) for name in RECORDED_PACKAGES}

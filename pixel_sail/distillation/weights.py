"""Published weights: locating, hashing and strict loading.

The modules of the teachers (`mask2former`, `sam2`, `radio`) call it. Only safetensors are read, and no code of a
repository is executed. Weights are a folder, or a name on the Hugging Face hub with a pinned revision:

    weights_folder("data/experts/sam2.1-hiera-large", None)            -> that folder
    weights_folder("facebook/sam2.1-hiera-large", "5f7c7d1...")        -> the hub's local copy of that commit
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel

from pixel_sail.files import is_hidden, sha256
from pixel_sail.model.folder import KERNELS, MODEL_CONFIG, check_no_code
from pixel_sail.types import DataError

Network = TypeVar("Network", bound=PreTrainedModel)
NetworkConfig = TypeVar("NetworkConfig", bound=PreTrainedConfig)


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where the weights of a network come from: a folder, or random initialization."""

    folder: Path | None
    architecture: dict[str, Any]

    @classmethod
    def find(
        cls,
        teacher: str,
        weights: str | None,
        revision: str | None,
        *,
        random: bool,
        architecture: dict[str, Any] | None,
    ) -> "WeightSource":
        """Return the source of a teacher: `weights` at `revision`, or with `random` (for tests) random initialization.

        architecture: fields of the network's configuration: all of them for a random network, otherwise replacements of
        those in the folder's `config.json`. Raises: DataError.
        """
        folder = None if random else weights_folder(weights, revision, where=f"distillation: {teacher}")
        return cls(folder=folder, architecture=dict(architecture or {}))

    def config(self, kind: type[NetworkConfig]) -> NetworkConfig:
        """Return the network's configuration."""
        if self.folder is None:
            return kind(**self.architecture)
        check_no_code(self.folder, MODEL_CONFIG, keys=KERNELS)
        return kind.from_pretrained(self.folder, **self.architecture)

    def identity(self) -> dict[str, str]:
        """Return the hashes of the files by name, or the architecture of a random network."""
        if self.folder is None:
            return {"random": json.dumps(self.architecture or None, sort_keys=True)}
        return file_hashes(self.folder)

    def network(
        self, kind: type[Network], config: PreTrainedConfig, *, unused: Sequence[str] = (), absent: Sequence[str] = ()
    ) -> Network:
        """Return the network with its weights, see `load_strictly`. Raises: DataError."""
        if self.folder is None:
            return init_randomly(kind, config)
        return load_strictly(kind, self.folder, unused=unused, absent=absent, config=config)


def weights_folder(weights: str | None, revision: str | None, *, where: str) -> Path:
    """Return the folder with `config.json` and safetensors files. Raises: DataError."""
    if weights is None:
        raise DataError(
            f"{where}: found no weights; expected a folder or a hub name with a revision, or random=true for a test"
        )
    folder = Path(weights)
    if not folder.is_dir():
        if revision is None:
            raise DataError(
                f"{where}: {weights}: no such folder; if it is a name on the Hugging Face hub, give its revision "
                "(a commit), so that a run can be repeated"
            )
        try:
            patterns = ["config.json", "*.safetensors"]
            folder = Path(snapshot_download(weights, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise DataError(
                f"{where}: {weights} at revision {revision} could not be downloaded from the hub ({error}); download "
                "it elsewhere and use its folder"
            ) from error
    for pattern in ("config.json", "*.safetensors"):
        if all(is_hidden(path) for path in folder.glob(pattern)):
            raise DataError(f"{where}: {folder} holds no {pattern}; pickled weights are not read")
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the configuration and of all weights of a folder, by file name."""
    files = [folder / "config.json", *sorted(path for path in folder.glob("*.safetensors") if not is_hidden(path))]
    return {file.name: _hash(file, os.stat(file).st_mtime_ns) for file in files}


@lru_cache
def _hash(file: Path, changed_ns: int) -> str:
    """Return the hash of a file, cached by modification time, so that gigabytes are read once per process."""
    return sha256(file)


def load_strictly(
    kind: type[Network],
    folder: Path,
    *,
    unused: Sequence[str] = (),
    absent: Sequence[str] = (),
    config: PreTrainedConfig | None = None,
) -> Network:
    """Return the network with the folder's weights, float32.

    `unused`: patterns of tensors in the files that this network does not have. `absent`: patterns of parameters that
    may be missing in the files.
    Raises: DataError with the names of missing, unexpected or misshapen tensors.
    """
    # RADIO's configuration names remote code, which classes of transformers never run; they would fetch a kernel.
    check_no_code(folder, MODEL_CONFIG, keys=KERNELS)
    loaded: Any = kind.from_pretrained(
        folder,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        local_files_only=True,
        dtype=torch.float32,
    )
    network, info = loaded
    expected = {"unexpected_keys": unused, "missing_keys": absent}
    problems = {}
    for title, found in info.items():
        keys = sorted(str(key) for key in found)
        left = [key for key in keys if not any(re.search(pattern, key) for pattern in expected.get(title, ()))]
        if left:
            problems[title] = left[:10]
    if problems:
        raise DataError(f"{folder}: the weights do not fit {kind.__name__}: {problems}; give the folder of its model")
    assert isinstance(network, kind)
    return network


def init_randomly(kind: type[Network], config: PreTrainedConfig) -> Network:
    """Return the network with random weights, the same in every process; the global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)

"""Checks and hashes of model folders, which may come from untrusted sources.

Every `from_pretrained` on a folder calls `check_no_code` first. Hugging Face configuration files can name Python files
of the folder or hub packages to run. Such a folder is rejected:

    tokenizer_config.json: {"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}   ->  DataError
    model_hashes(Path("runs/a/export"))  ->  {"config.json": "1a2b..", "model.safetensors": "3c4d..", ...}
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pixel_sail.files import sha256
from pixel_sail.types import DataError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Files that an answer can depend on: configuration, weights, processor and tokenizer. These are uploaded to a hub."""

TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"

FILES_AS_CODE = ("auto_map",)
"""Key that names Python files of a folder, which the Auto classes of transformers would run."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys that can name a kernel of the hub, which every model class of transformers would fetch and run."""

_ADAPTER = "adapter_config.json"
"""If peft is installed, transformers loads weights from wherever this file points."""


def check_no_code(folder: str | Path, *names: str, keys: Collection[str] = (*FILES_AS_CODE, *KERNELS)) -> None:
    """Raise DataError if one of the configuration files `names` requests running code through one of `keys`.

    Invalid JSON is reported by the function that reads the file.
    """
    folder = Path(folder)
    for name in names:
        try:
            content = json.loads((folder / name).read_text())
        except (OSError, ValueError, RecursionError):
            continue
        found = sorted({key for key in _keys(content) if key in keys})
        if found:
            raise DataError(
                f"{folder / name}: found {found}, which would run code of the folder or of the hub, expected plain "
                "settings; remove the keys if the model works without that code"
            )
    if MODEL_CONFIG in names and (folder / _ADAPTER).is_file():
        raise DataError(
            f"{folder / _ADAPTER}: found an adapter of another model, expected a whole model; merge the adapter into "
            "its base and save that"
        )


def _keys(content: Any) -> Iterator[str]:
    """Yield the keys of all objects nested in a JSON value."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model: a configuration and weights in one or several files."""
    return (folder / MODEL_CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model. Raises: DataError if the index names files outside the folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise DataError(
            f"{folder}: found neither {WEIGHTS} nor {WEIGHTS_INDEX}, expected the weights of a model (pickled weights "
            "are not read); copy or export the folder again"
        )
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{index}: found no list of weights ({type(error).__name__}), expected weight_map with the file of every "
            "tensor; copy or export the folder again"
        ) from error
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if wrong or not names:
        raise DataError(
            f"{index}: found weights in {wrong or 'no file'}, expected files of {folder}; copy or export the folder "
            "again"
        )
    return [folder / name for name in names]


def model_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `MODEL_FILES` that exists, by name. Raises: DataError."""
    listed = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: sha256(file) for file in sorted({*listed, *weight_files(folder)})}


def weights_hash(folder: Path, hashes: Mapping[str, str]) -> str:
    """Return one hash of the weights from the hashes of all files: that of one file, or a hash over several."""
    files = weight_files(folder)
    return hashes[files[0].name] if len(files) == 1 else hash_of({file.name: hashes[file.name] for file in files})


def hash_of(hashes: Mapping[str, str]) -> str:
    """Return one hash over several files from the hash of each by name."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()

"""Folders with a model that somebody else may have made: what they may not ask for, and what tells one from another.

Every `from_pretrained` on a folder passes `check_no_code` first. Configuration files of Hugging Face can name Python
files of the folder or packages of the hub to be run; here such a folder is refused:

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
"""What an answer can depend on: configuration, weights, processor and tokenizer. Also what belongs on the hub."""

TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"

FILES_AS_CODE = ("auto_map",)
"""The key that names Python files of a folder, which the Auto classes of transformers would run."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys that can name a kernel of the hub, which every model class of transformers would fetch and run."""

_ADAPTER = "adapter_config.json"
"""With the package peft installed, transformers takes weights from wherever this file points."""


def check_no_code(folder: str | Path, *names: str, keys: Collection[str] = (*FILES_AS_CODE, *KERNELS)) -> None:
    """Raise DataError where one of the configuration files `names` of a folder asks for code to be run, by `keys`.

    A file that is no JSON is left to the function that reads it.
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
                f"{folder / name}: found {found}, which has code of the folder or of the hub run, expected plain "
                "settings; no such code is run here. Remove the keys if the model works without it"
            )
    if MODEL_CONFIG in names and (folder / _ADAPTER).is_file():
        raise DataError(
            f"{folder / _ADAPTER}: found an adapter of another model, expected a whole model; merge the adapter into "
            "its base and save that"
        )


def _keys(content: Any) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model: its configuration and its weights, in one file or in several."""
    return (folder / MODEL_CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model. Raises: DataError for an index that does not name files there."""
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
    """Return the SHA-256 of every file of a model that an answer can depend on, by name. Raises: DataError."""
    listed = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: sha256(file) for file in sorted({*listed, *weight_files(folder)})}


def weights_hash(folder: Path, hashes: Mapping[str, str]) -> str:
    """Return one hash of the weights, given those of all files: that of the file, or of the hashes of several."""
    files = weight_files(folder)
    return hashes[files[0].name] if len(files) == 1 else hash_of({file.name: hashes[file.name] for file in files})


def hash_of(hashes: Mapping[str, str]) -> str:
    """Return one hash of files, given the hash of each by name."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()

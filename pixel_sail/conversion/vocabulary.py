"""Tokenizers of checkpoints: the token of each embedding row on both sides of a conversion.

`convert` maps rows by token name. The release adds its tokens at startup, so its tokenizer folder lacks them. Their
order follows from the number of rows:

    tokenizer of 151671 tokens, embedding of 151690 rows  ->  [SEG], <p>, </p>, <Prompt0> .. <Prompt14>, <NO_Prompt>
"""

import re
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pixel_sail.model.folder import TOKENIZER_CONFIG, check_no_code
from pixel_sail.model.tokenization import (
    PHRASE_TOKENS,
    SEG_TOKEN,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILES,
    read_tokenizer_files,
)
from pixel_sail.types import DataError

UNUSED_PROMPT = "<NO_Prompt>"
"""A token of the release that never occurs in inputs."""

MAX_PADDING = 512
"""Maximum number of embedding rows without a token. Qwen2.5-7B has 399, the most of all bases."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder unchanged.

    Raises: DataError if there is none, its ids have gaps, or the package that reads it is not installed.
    """
    # Without these Hugging Face builds a tokenizer of a few tokens from config.json alone.
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise DataError(f"{folder}: found no tokenizer, expected one of {TOKENIZER_FILES}; set --base to its folder")
    read = _read_sentencepiece if found == [SENTENCEPIECE_FILE] else read_tokenizer_files
    # Without the package Hugging Face treats the file as tiktoken's and asks for tiktoken.
    if read is _read_sentencepiece and find_spec("sentencepiece") is None:
        raise DataError(
            f"{folder}: found {SENTENCEPIECE_FILE} and no package sentencepiece, expected that package to read it; "
            "install it (pip install sentencepiece, or the extra: pip install 'pixel-sail[solo]')"
        )
    try:
        tokenizer = read(folder)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise DataError(
            f"{folder}: found no readable tokenizer ({str(error)[:200]}), expected the tokenizer files of the "
            "checkpoint; set --base to their folder"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise DataError(
            f"{folder}: the tokenizer's ids are not 0 .. {len(vocabulary) - 1}, each once; expected the tokenizer the "
            "checkpoint was trained with"
        )
    return tokenizer


def _read_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Return the Llama tokenizer, also used by Mistral, of a folder with only `tokenizer.model`.

    For Mistral folders AutoTokenizer (transformers 5.23) omits the space before the first word. The Llama class matches
    sentencepiece but loses `legacy` when saved; the plain class preserves it.
    """
    check_no_code(folder, TOKENIZER_CONFIG)
    llama = LlamaTokenizer.from_pretrained(str(folder), local_files_only=True)
    names = {name: str(getattr(llama, name)) for name in ("bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=llama.backend_tokenizer, **names)


def check_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise DataError if an embedding of `rows` does not fit a tokenizer."""
    if not 0 <= rows - len(tokenizer) < MAX_PADDING:
        raise DataError(
            f"{folder}: found a tokenizer of {len(tokenizer)} tokens for an embedding of {rows} rows, expected as many "
            f"and up to {MAX_PADDING} rows of padding; use the tokenizer the checkpoint was trained with (--base)"
        )


def release_orders(num_visual_prompts: int) -> tuple[tuple[str, ...], ...]:
    """Return the orders in which the release's configurations append their tokens.

    Source: released configurations: default, masks only, and the ablation with a token for pooled features.
    """
    prompts = [f"<Prompt{i}>" for i in range(num_visual_prompts)]
    return (
        (SEG_TOKEN, *PHRASE_TOKENS, *prompts, UNUSED_PROMPT),
        (*PHRASE_TOKENS, SEG_TOKEN),
        (SEG_TOKEN, *PHRASE_TOKENS, "<vp_feat>", *prompts, UNUSED_PROMPT),
    )


def add_release_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int, num_visual_prompts: int) -> None:
    """Append the release's tokens, so that the tokenizer has exactly one token for each of `rows`.

    A tokenizer that already has all tokens of an order is unchanged. Every order has [SEG], <p> and </p>.
    Raises: DataError if no known order gives that number.
    """
    known = tokenizer.get_vocab()
    candidates = [tuple(t for t in order if t not in known) for order in release_orders(num_visual_prompts)]
    fitting = [tokens for tokens in candidates if len(tokenizer) + len(tokens) == rows]
    if not fitting:
        lacking = [token for token in (SEG_TOKEN, *PHRASE_TOKENS) if token not in known]
        raise DataError(
            f"{folder}: found a tokenizer of {len(tokenizer)} tokens{f' without {lacking}' if lacking else ''} for an "
            f"embedding of {rows} rows, expected "
            f"{sorted({rows - len(tokens) for tokens in candidates})} (the release appends one of "
            f"{[len(tokens) for tokens in candidates]} tokens); use the tokenizer of the base the checkpoint was "
            "trained from (--base) and its number of prompts (--visual-prompts)"
        )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in fitting[0]], special_tokens=True)


def count_prompts(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of <Prompt0>, <Prompt1> .. in a tokenizer. Raises: DataError if one in between is missing."""
    found = [token for token in tokenizer.get_vocab() if re.fullmatch(r"<Prompt\d+>", token)]
    expected = [f"<Prompt{i}>" for i in range(len(found))]
    if set(found) != set(expected):
        raise DataError(
            f"tokenizer: found the prompts {sorted(found)}, expected {expected}; use the tokenizer the checkpoint was "
            "trained with (--base)"
        )
    return len(found)


def check_has_prompts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if weights for visual prompts would be lost because the tokenizer lacks the tokens.

    The release has these weights even if it was trained without prompts, so the user must state that it was.
    """
    if not count_prompts(tokenizer):
        raise DataError(
            f"{folder}: found vp_embed in the checkpoint and no <Prompt0> among its {len(tokenizer)} tokens, expected "
            "both or neither; use the tokenizer the checkpoint was trained with (--base), or --visual-prompts 0 if it "
            "was trained without prompts, which drops vp_embed"
        )

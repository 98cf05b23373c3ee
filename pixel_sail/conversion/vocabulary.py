"""Tokenizers of checkpoints: which token each row of an embedding belongs to, there and here.

Place in the flow: `roads` needs both vocabularies before it can place rows by name. The release adds its tokens when
it is started, so that its tokenizer folder lacks them; which order was used shows in the number of rows:

    tokenizer of 151671 tokens, embedding of 151690 rows  ->  [SEG], <p>, </p>, <Prompt0> .. <Prompt14>, <NO_Prompt>
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pixel_sail.model.tokenization import PHRASE_TOKENS, SEG_TOKEN
from pixel_sail.types import DataError

UNUSED_PROMPT = "<NO_Prompt>"
"""A token of the release that is never an input."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

MAX_PADDING = 512
"""How many rows without a token an embedding may have; Qwen2.5-7B has 399, the most of the bases."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder as it is. Raises: DataError when there is none or its ids have holes."""
    # Without these Hugging Face makes a tokenizer of a few tokens up from config.json alone.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{folder}: found no tokenizer, expected one of {TOKENIZER_FILES}; name its folder with --base")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise DataError(
            f"{folder}: found no tokenizer that can be read ({str(error)[:200]}), expected the tokenizer files of the "
            "checkpoint; name their folder with --base"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise DataError(
            f"{folder}: the tokenizer's ids are not 0 .. {len(vocabulary) - 1}, each once; expected the tokenizer the "
            "checkpoint was trained with"
        )
    return tokenizer


def check_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise DataError when an embedding of `rows` cannot belong to a tokenizer."""
    if not 0 <= rows - len(tokenizer) < MAX_PADDING:
        raise DataError(
            f"{folder}: found a tokenizer of {len(tokenizer)} tokens for an embedding of {rows} rows, expected as many "
            f"and up to {MAX_PADDING} rows of padding; give the tokenizer the checkpoint was trained with (--base)"
        )


def release_orders(num_visual_prompts: int) -> tuple[tuple[str, ...], ...]:
    """Return the orders in which the release's configurations append their tokens.

    Source: released configurations: usual, masks only, and the ablation with a token for pooled features.
    """
    prompts = [f"<Prompt{i}>" for i in range(num_visual_prompts)]
    return (
        (SEG_TOKEN, *PHRASE_TOKENS, *prompts, UNUSED_PROMPT),
        (*PHRASE_TOKENS, SEG_TOKEN),
        (SEG_TOKEN, *PHRASE_TOKENS, "<vp_feat>", *prompts, UNUSED_PROMPT),
    )


def add_release_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int, num_visual_prompts: int) -> None:
    """Append what the release appended, so that the tokenizer has exactly one token for each of `rows`.

    Raises: DataError when no known order makes that number.
    """
    known = tokenizer.get_vocab()
    candidates = [()] + [tuple(t for t in order if t not in known) for order in release_orders(num_visual_prompts)]
    fitting = [tokens for tokens in candidates if len(tokenizer) + len(tokens) == rows]
    if not fitting:
        raise DataError(
            f"{folder}: found a tokenizer of {len(tokenizer)} tokens for an embedding of {rows} rows, expected "
            f"{sorted({rows - len(tokens) for tokens in candidates})} (the release appends one of "
            f"{[len(tokens) for tokens in candidates]} tokens); give the tokenizer of the base the checkpoint was "
            "trained from (--base) and its number of prompts (--visual-prompts)"
        )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in fitting[0]], special_tokens=True)


def count_prompts(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many <Prompt0>, <Prompt1> .. a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return next(i for i in range(len(vocabulary) + 1) if f"<Prompt{i}>" not in vocabulary)

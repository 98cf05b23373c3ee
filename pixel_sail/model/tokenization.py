"""Tokenizers: special tokens of the model, and training of small tokenizers.

`build_model` in training adds `special_tokens` to the configured tokenizer. `tools/make_tokenizer.py` trains a
byte-level BPE on the text of a dataset for the tiny models. It encodes any text, since every byte is a token:

    "Please segment the red star in this image."  ->  9 tokens with a vocabulary of 1,024 trained on RefShapes
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pixel_sail.model.folder import TOKENIZER_CONFIG, check_no_code
from pixel_sail.model.reading import reading
from pixel_sail.types import DataError

END_TOKEN = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_TOKENS = ("<vision>", "<vpatch>", "</vision>")
SEG_TOKEN = "[SEG]"
PHRASE_TOKENS = ("<p>", "</p>")

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json")
"""A tokenizer folder contains at least one of these."""


def special_tokens(num_visual_prompts: int) -> list[str]:
    """Return all special tokens, in the order in which missing ones are appended."""
    prompts = [f"<Prompt{i}>" for i in range(num_visual_prompts)]
    return [END_TOKEN, TURN_START, TURN_END, *IMAGE_TOKENS, SEG_TOKEN, *PHRASE_TOKENS, *prompts]


def load_tokenizer(path: str | Path, *, num_visual_prompts: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder, with missing special tokens added.

    Raises: DataError if the folder does not exist, cannot be read, or contains code.
    """
    # Without these Hugging Face builds a tokenizer of a few tokens from config.json alone.
    if not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        found = "no such folder" if not Path(path).is_dir() else f"none of {TOKENIZER_FILES} in it"
        raise DataError(
            f"tokenizer {path}: {found}; expected a Hugging Face tokenizer folder. Download that of the base "
            "model, or make a small one with tools/make_tokenizer.py, and name it with model.tokenizer=FOLDER"
        )
    with reading(f"tokenizer {path}", "download its files again"):
        tokenizer = read_tokenizer_files(path)
        add_special_tokens(tokenizer, num_visual_prompts=num_visual_prompts)
    return tokenizer


def read_tokenizer_files(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder with Hugging Face. Raises: DataError if it contains code."""
    check_no_code(folder, TOKENIZER_CONFIG)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, *, num_visual_prompts: int) -> None:
    """Append missing special tokens of the model. Existing ones keep their ids.

    A token that is an ordinary vocabulary entry (as `<vision>` in SOLO's) is marked special too, because otherwise text
    is split before the entry can match.
    Raises: DataError if a token is still encoded as several.
    """
    tokens = special_tokens(num_visual_prompts)
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    plain = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    tokenizer.add_tokens(plain, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    encoded = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens}
    split = {token: ids for token, ids in encoded.items() if ids != [vocabulary[token]]}
    if split:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path}: encodes {split}, expected one id for each of these tokens; look at "
            "its tokenizer_config.json (split_special_tokens must be false) or take the tokenizer of the base model"
        )


def model_token_ids(tokenizer: PreTrainedTokenizerBase, *, num_visual_prompts: int) -> dict[str, int]:
    """Return the ids that go into `PixelSailConfig.token_ids`."""
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in special_tokens(num_visual_prompts)}


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, num_visual_prompts: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`. Without texts it has one token per byte.

    Raises: DataError if the vocabulary is too small for the bytes and the special tokens.
    """
    specials = special_tokens(num_visual_prompts)
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise DataError(f"tokenizer: vocab_size is {vocab_size}, expected at least {smallest} (256 bytes + specials)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN)

"""Train a small byte-level BPE tokenizer on the expressions of a referring dataset, for models trained from scratch.

    python tools/make_tokenizer.py --refer-root data/refshapes --dataset refshapes --split train --vocab-size 1024 \
        --out data/refshapes/tokenizer

Models with a base checkpoint use its tokenizer instead. Any text can be encoded: unseen words fall back to bytes.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.data.templates.referring import (
    FIXED_REFER_ANSWER,
    NO_TARGET_ANSWER,
    REFER_ANSWERS,
    REFER_QUESTIONS,
    SHORT_REFER_ANSWER,
    SHORT_REFER_PROMPT,
    STANDARD_REFER_PROMPT,
)
from pixel_sail.entry import one_message
from pixel_sail.files import WRITING, recover_folder, replace_folder, writing
from pixel_sail.model.processing_pixel_sail import QUESTION_TEMPLATE
from pixel_sail.model.tokenization import TURN_END, TURN_START, train_tokenizer
from pixel_sail.types import DataError


def texts(root: Path, dataset: str, split: str) -> Iterator[str]:
    """Yield the training texts: every expression in a question, and the answers."""
    for index, item in enumerate(expressions(load_refer(root, dataset, split))):
        varied = REFER_QUESTIONS[index % len(REFER_QUESTIONS)].format(expression=item.text)
        yield from (turn(varied, REFER_ANSWERS[index % len(REFER_ANSWERS)]), turn(varied, NO_TARGET_ANSWER))
        yield turn(STANDARD_REFER_PROMPT.format(sent=item.text), FIXED_REFER_ANSWER)
        yield turn(SHORT_REFER_PROMPT.format(sent=item.text), SHORT_REFER_ANSWER)


def turn(question: str, answer: str) -> str:
    """Return a turn in the processor's layout, without the special tokens, which are never merged."""
    return QUESTION_TEMPLATE.format(question=question).replace(TURN_START, "").replace(TURN_END, "") + answer


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tokenizer folder atomically."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refer-root", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--num-visual-prompts", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    recover_folder(options.out)
    if options.out.exists() and not (options.out / "tokenizer.json").is_file():
        raise DataError(
            f"--out {options.out}: found files that are not a tokenizer, expected a new folder or a tokenizer to "
            "replace; set --out to another folder"
        )
    tokenizer = train_tokenizer(
        texts(options.refer_root, options.dataset, options.split),
        vocab_size=options.vocab_size,
        num_visual_prompts=options.num_visual_prompts,
    )
    working = options.out.with_name(f"{WRITING}{options.out.name}")
    with writing(options.out):
        tokenizer.save_pretrained(str(working))
    replace_folder(working, options.out)
    print(f"{options.out}: {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

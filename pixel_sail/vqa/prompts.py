"""Question templates of the VQA benchmarks, as in the released evaluation.

The task files in `tasks/` use these functions as `doc_to_text` and `process_docs`, so that the kit's log shows the
exact prompt.

    {"question": "Which one is red?", "A": "the box", "B": "the star", "C": "nan", "hint": "nan"}
        -> "Which one is red?\\nA. the box\\nB. the star\\nAnswer with the option's letter from the given choices
            directly."

`docs/vqa.md` lists the kit's own templates of the same documents.
"""

from collections.abc import Mapping
from typing import Any

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
PHRASE_SUFFIX = "\nAnswer the question using a single word or phrase."

RELEASED_SUFFIXES = {
    "multiple choice": LETTER_SUFFIX,
    "MME": "",
    "HallusionBench": " Please answer yes or no. Answer the question using a single word or phrase.",
    "LLaVABench": "\nAnswer this question in detail.",
    "other": PHRASE_SUFFIX,
}
"""Suffix of a question in the released evaluation, by benchmark. MME's questions already end in "Please answer yes or
no." and are unchanged."""

OPTION_LETTERS = "ABCDE"

Document = Mapping[str, Any]
"""One row of a benchmark."""


def choice_question(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """Return a multiple-choice question: hint, question, one line per option, and the released suffix."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {option}" for letter, option in options.items())]
    return "\n".join(lines) + RELEASED_SUFFIXES["multiple choice"]


def mme_question(document: Document) -> str:
    """Return a question of MME unchanged."""
    return str(document["question"]) + RELEASED_SUFFIXES["MME"]


def lettered_question(document: Document) -> str:
    """Return a question of MMBench or MMStar, with options from the non-empty columns A, B, ..."""
    options = {letter: str(document[letter]) for letter in OPTION_LETTERS if _is_given(document.get(letter))}
    hint = document.get("hint")
    return choice_question(str(document["question"]), options, str(hint) if _is_given(hint) else "")


def seed_question(document: Document) -> str:
    """Return a question of SEED-Bench, with options from the columns choice_a .. choice_d."""
    options = {letter: str(document[f"choice_{letter.lower()}"]) for letter in "ABCD"}
    return choice_question(str(document["question"]), options)


def seed_image_documents(documents: Any) -> Any:
    """Return the rows of SEED-Bench's `datasets.Dataset` about one image, without those about videos."""
    return documents.filter(lambda data_type: data_type == "image", input_columns=["data_type"])


def _is_given(value: Any) -> bool:
    """Return whether a cell holds text. The datasets write empty cells as None, "", NaN or "nan"."""
    is_nan = isinstance(value, float) and value != value
    return value is not None and not is_nan and value not in ("", "nan")

"""Multiple-choice accuracy, in two protocols.

Question, right answer and generated answer -> `ChoiceSums` of one item -> added over items -> `summary`. An example:

    question "What colour is it?\\nA. red\\nB. dark red\\n", right "B. dark red", generated "It is dark red."
    -> standard: option B, right.   paper: wrong, "B. dark red" is not in "It is dark red."

- `paper`: right if the generated text contains the right answer as written in the file, case-sensitive. With bare
  letters in the file nearly every answer is right: "A" is in "And".
- `standard`: the answer must name exactly one option, by its letter or by its text.
  1. A capital counts if it can only be a choice: in brackets, before one of . : , ; ) and at the end, before "or
     B", after "answer", "option" or "choice" with or without "is". As the whole text a small letter counts, too.
     Elsewhere a single capital counts, except A and I, which are English words.
  2. Without a letter, the options' texts are searched as whole words, ignoring case. The longest match at a position
     counts ("dark red" is not "red").
  3. Two letters, two texts without a letter, or a letter beside only other options' texts: ambiguous, which is wrong.
     No match: unparsed, which is wrong.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pixel_sail.types import DataError

_OPTION = re.compile(r"^\s*[(\[]?([A-Z])\s*[.):\]]\s*(\S.*?)\s*$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?<!\w)[(\[]?([A-Z])[.):\]]\s*(\S.*?)(?=\s+[(\[]?[A-Z][.):\]]|\s*$)")
_CONTROL = re.compile(r"<\|[^|<>]*\|>|</?s>")

ENGLISH_WORDS = "AI"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The option an answer names: a letter, or None and why not."""

    letter: str | None
    ambiguous: bool = False
    """Whether more than one option is named. False without a letter: none is named."""


@dataclass(frozen=True, kw_only=True)
class ChoiceSums:
    """Counts over questions. Never changed in place."""

    count: int = 0
    correct: int = 0
    ambiguous: int = 0
    unparsed: int = 0

    def add(self, other: "ChoiceSums") -> "ChoiceSums":
        """Return the counts over the questions of both."""
        return ChoiceSums(
            count=self.count + other.count,
            correct=self.correct + other.correct,
            ambiguous=self.ambiguous + other.ambiguous,
            unparsed=self.unparsed + other.unparsed,
        )

    def summary(self) -> dict[str, float | int]:
        """Return the accuracy as a fraction, and the counts. Raises: DataError without questions."""
        if self.count == 0:
            raise DataError("multiple choice: found 0 questions, expected at least 1; check the split and the filters")
        return {
            "accuracy": self.correct / self.count,
            "count": self.count,
            "ambiguous": self.ambiguous,
            "unparsed": self.unparsed,
        }

    def fractions(self) -> dict[str, tuple[float, float]]:
        """Return numerator and denominator of the accuracy."""
        return {"accuracy": (self.correct, self.count)}


def score_choice(answer: str, *, question: str, right: str, where: str) -> ChoiceSums:
    """Return the counts of one question by the `standard` protocol.

    question: with its options. right: the right answer, as in the file. Raises: DataError (see `right_letter`).
    """
    options = read_options(question, where)
    choice = parse_choice(answer, options)
    return ChoiceSums(
        count=1,
        correct=int(choice.letter == right_letter(right, options, where)),
        ambiguous=int(choice.ambiguous),
        unparsed=int(choice.letter is None and not choice.ambiguous),
    )


def score_choice_as_released(answer: str, *, right: str) -> ChoiceSums:
    """Return the counts of one question by the `paper` protocol: the generated text contains the right answer."""
    return ChoiceSums(count=1, correct=int(right in answer))


def read_options(question: str, where: str) -> dict[str, str]:
    """Return the options of a question by letter, written one per line or all in one line.

    Letters must run from A without a gap, so "Dr. A. Smith" is not an option. Raises: DataError for fewer than two.
    """
    for pattern in (_OPTION, _INLINE_OPTION):
        found = pattern.findall(question)
        letters = [letter for letter, _ in found]
        if len(found) >= 2 and letters == [chr(ord("A") + i) for i in range(len(found))]:
            return dict(found)
    raise DataError(
        f"{where}: found no options in question {question!r}, expected two or more such as 'A. red' with letters in "
        "order; repair the file, or score it with the protocol 'paper'"
    )


def right_letter(right: str, options: Mapping[str, str], where: str) -> str:
    """Return the letter of the right answer, given as letter, text, or both. Raises: DataError if ambiguous."""
    choice = parse_choice(right, options)
    if choice.letter is None:
        raise DataError(
            f"{where}: found the right answer {right!r}, expected exactly one of {dict(options)}; repair the file"
        )
    return choice.letter


def parse_choice(answer: str, options: Mapping[str, str]) -> Choice:
    """Return the one option that an answer names, by the rules at the top of this file."""
    answer = " ".join(_CONTROL.sub(" ", answer).split()).strip("\"'`*")
    letters = _named_letters(answer, options)
    texts = _named_texts(answer, options)
    if len(letters) == 1:
        agrees = not texts or letters <= texts
        return Choice(letter=next(iter(letters)) if agrees else None, ambiguous=not agrees)
    named = letters or texts
    return Choice(letter=next(iter(named)) if len(named) == 1 else None, ambiguous=len(named) > 1)


def _named_letters(answer: str, options: Mapping[str, str]) -> set[str]:
    if re.fullmatch(r"[(\[]?[A-Za-z][)\].:]{0,2}", answer):
        letter = answer.strip("()[].:").upper()
        return {letter} & options.keys()
    # Ignore single capitals inside an option's text ("vitamin B").
    rest = _texts_pattern(options).sub(" _ ", answer)
    letters = "".join(options)
    patterns = [
        rf"[(\[]([{letters}])[)\]]",
        rf"(?<![\w.])([{letters}])(?:[,;)]|[.:](?!\w))",
        rf"(?<!\w)([{letters}])$",
        rf"(?<!\w)([{letters}])(?=\s+(?:or|and|nor)\s+[{letters}](?!\w))",
        rf"(?i:\b(?:answer|option|choice)\b(?:\s+is)?\s*:?)\s*([{letters}])(?!\w)",
    ]
    clear = "".join(letter for letter in letters if letter not in ENGLISH_WORDS)
    if clear:
        patterns.append(rf"(?<![\w'])([{clear}])(?![\w'])")
    return {letter for pattern in patterns for letter in re.findall(pattern, rest)}


def _named_texts(answer: str, options: Mapping[str, str]) -> set[str]:
    found = {_folded(text) for text in _texts_pattern(options).findall(answer)}
    return {letter for letter, text in options.items() if _folded(text.rstrip(".")) in found}


def _texts_pattern(options: Mapping[str, str]) -> re.Pattern[str]:
    """Return a pattern for the options' texts as whole words, longest first."""
    texts = sorted({text.rstrip(".") for text in options.values()}, key=len, reverse=True)
    parts = [r"\s+".join(map(re.escape, text.split())) for text in texts if text]
    # (?!) matches nothing. An empty alternative would match everywhere.
    return re.compile(r"(?<!\w)(?:" + ("|".join(parts) or "(?!)") + r")(?!\w)", re.IGNORECASE)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()

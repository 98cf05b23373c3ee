"""Multiple choice in both protocols."""

import pytest

from pixel_sail.metrics.choice import (
    Choice,
    ChoiceSums,
    parse_choice,
    read_options,
    score_choice,
    score_choice_as_released,
)
from pixel_sail.types import DataError

OPTIONS = {"A": "red", "B": "dark red", "C": "a dog and a cat", "D": "None of the above."}
QUESTION = "What is it?\nA. red\nB. dark red\nC. a dog and a cat\nD. None of the above.\n"


@pytest.mark.parametrize(
    ("answer", "letter", "ambiguous"),
    [
        ("B", "B", False),
        ("b", "B", False),
        (" (b) ", "B", False),
        ("B.<|im_end|>", "B", False),
        ("**B**", "B", False),
        ("B. dark red", "B", False),
        ("B: dark red.", "B", False),
        ("(B) dark red", "B", False),
        ("The answer is B.", "B", False),
        ("Answer: B", "B", False),
        ("I choose option A because it is so.", "A", False),
        ("I think B is right", "B", False),
        ("It is dark red.", "B", False),
        ("It is Dark\n  Red", "B", False),
        ("It is red", "A", False),
        ("A dog and a cat", "C", False),
        ("C, a dog and a cat, not red", "C", False),
        ("None of the above", "D", False),
        ("A, I am sure", "A", False),
        ("It must be A", "A", False),
        # Nothing is chosen.
        ("", None, False),
        ("A blue one", None, False),
        ("I see a tree. And it is tall", None, False),
        ("E", None, False),
        ("redder", None, False),
        ("It's B's", None, False),
        # More than one is chosen.
        ("A or B", None, True),
        ("A, B", None, True),
        ("red or dark red", None, True),
        ("A. dark red", None, True),
        ("It is not red, the answer is D", None, True),
        ("A. red B. dark red C. a dog and a cat D. None of the above.", None, True),
    ],
)
def test_standard_takes_exactly_one_option(answer, letter, ambiguous):
    assert parse_choice(answer, OPTIONS) == Choice(letter=letter, ambiguous=ambiguous)


@pytest.mark.parametrize(
    ("answer", "right", "counts"),
    [
        ("dark red", "B. dark red", 0),
        ("B. dark red or anything else", "B. dark red", 1),
        ("b. dark red", "B. dark red", 0),
        ("C. And so on", "A", 1),
        ("dark red", "red", 1),
        ("<Prompt0>: B<|im_end|>", "B", 1),
    ],
)
def test_paper_looks_for_the_right_answer_in_the_text(answer, right, counts):
    assert score_choice_as_released(answer, right=right) == ChoiceSums(count=1, correct=counts)


@pytest.mark.parametrize("right", ["B", "B.", "dark red", "B. dark red", "(B) dark red"])
def test_right_answer_is_a_letter_a_text_or_both(right):
    assert score_choice("dark red", question=QUESTION, right=right, where="item 1").correct == 1
    assert score_choice("red", question=QUESTION, right=right, where="item 1").correct == 0


@pytest.mark.parametrize("right", ["E", "blue", "A. dark red"])
def test_unclear_right_answer_is_rejected(right):
    with pytest.raises(DataError, match="item 1: found the right answer"):
        score_choice("red", question=QUESTION, right=right, where="item 1")


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        "What is it?\n(A) red\n(B) dark red\n(C) a dog and a cat\n(D) None of the above.",
        "What is it?\n A) red\n B) dark red\n C) a dog and a cat\n D) None of the above.",
        "What is it?\nA: red\nB: dark red\nC: a dog and a cat\nD: None of the above.",
        "What is it? A. red B. dark red C. a dog and a cat D. None of the above.",
        "What is it? (A) red (B) dark red (C) a dog and a cat (D) None of the above.\n",
    ],
)
def test_options_are_read_from_lines_or_one_line(question):
    assert read_options(question, "item 1") == OPTIONS


@pytest.mark.parametrize("question", ["What is it?", "Is it a cat?\nA. yes", "Who?\nB. one\nC. two", "Dr. A. Smith?"])
def test_question_without_options_is_rejected(question):
    with pytest.raises(DataError, match="item 1: found no options"):
        read_options(question, "item 1")


def test_counts_add_up():
    sums = ChoiceSums()
    for answer in ("B", "A or B", "a tree", "A"):
        sums = sums.add(score_choice(answer, question=QUESTION, right="B. dark red", where="item 1"))
    assert sums.summary() == {"accuracy": 0.25, "count": 4, "ambiguous": 1, "unparsed": 1}
    with pytest.raises(DataError, match="found 0 questions"):
        ChoiceSums().summary()

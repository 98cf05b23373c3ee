"""Scores of model-free guesses on RefShapes: the chance level of every split.

`formats.py` passes the targets of a split's expressions and writes the scores to meta.json; the quickstart's report
shows them next to the model's. No guess uses the image. Only "the target's colour" uses the expression: it is a perfect
color detector that is given the correct color even if the expression names none. The scores of one split, for example:

    {"every object": {"ciou": 0.27, "giou": 0.26}, "largest object": {...}, "target's colour": {...},
     "random object": {...}}
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

GUESSES = ("every object", "largest object", "target's colour", "random object")

BaselineScores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ReferredObject:
    """One expression: the objects of its image, whose masks do not overlap, and its targets."""

    areas: Sequence[int]
    colours: Sequence[str]
    target: int


def blind_scores(expressions: Iterable[ReferredObject]) -> dict[str, BaselineScores]:
    """Return cIoU and gIoU of every guess, expected values for the random object; empty without expressions."""
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in GUESSES}
    for item in expressions:
        for name, answers in _answers(item).items():
            pairs = [_overlap(item, answer) for answer in answers]
            inter, union = (fmean(pair[part] for pair in pairs) for part in (0, 1))
            measured[name].append((inter, union, fmean(inter / union for inter, union in pairs)))
    return {
        name: {"ciou": sum(row[0] for row in rows) / sum(row[1] for row in rows), "giou": fmean(row[2] for row in rows)}
        for name, rows in measured.items()
        if rows
    }


def _answers(item: ReferredObject) -> dict[str, list[list[int]]]:
    """Return the equally likely answers of every guess, each as the indices of its objects."""
    everything = list(range(len(item.areas)))
    same_colour = [index for index in everything if item.colours[index] == item.colours[item.target]]
    largest = max(everything, key=lambda index: item.areas[index])
    return dict(
        zip(GUESSES, ([everything], [[largest]], [same_colour], [[index] for index in everything]), strict=True)
    )


def _overlap(item: ReferredObject, answer: list[int]) -> tuple[int, int]:
    """Return the pixels of intersection and union of an answer and the target."""
    inter = item.areas[item.target] if item.target in answer else 0
    return inter, sum(item.areas[index] for index in answer) + item.areas[item.target] - inter


def blind_choices(questions: Sequence[dict[str, str]]) -> BaselineScores:
    """Return the accuracy on multiple-choice questions of the best constant letter, and of each question's usual
    answer.

    A question is {"question": "What is the size of the marked object?\\nA. large\\nB. small\\n", "answer": "B. small"}.
    """
    if not questions:
        return {}
    letters = Counter(item["answer"][0] for item in questions)
    values = Counter((item["question"].partition("\n")[0], item["answer"].partition(" ")[2]) for item in questions)
    usual: dict[str, int] = {}
    for (question, _), count in values.items():
        usual[question] = max(count, usual.get(question, 0))
    return {
        "same letter": max(letters.values()) / len(questions),
        "usual value": sum(usual.values()) / len(questions),
    }

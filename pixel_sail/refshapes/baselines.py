"""What answers that need no model score on RefShapes: what chance is, split by split.

`formats.py` hands over what each expression of a split is about and writes the scores to meta.json; the quickstart's
report shows them beside the model's. Nobody looks at an image here, and only "the target's colour" knows something of
the expression: it is a detector of colours without faults, told the right colour even where the expression names none.
The scores of one split, as an example of the data:

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
    """One expression: the objects of its image, whose masks do not overlap, and which of them is meant."""

    areas: Sequence[int]
    colours: Sequence[str]
    target: int


def blind_scores(expressions: Iterable[ReferredObject]) -> dict[str, BaselineScores]:
    """Return cIoU and gIoU of every guess, those of the random object as expected; nothing where nothing is asked."""
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
    """Return the equally likely answers of every guess, each as the objects that are marked."""
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
    """Return the accuracy on multiple-choice questions of the best single letter, and of each question's usual answer.

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

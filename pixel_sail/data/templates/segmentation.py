"""Templates of panoptic and semantic segmentation, and of segmentation from a long description.

`data/sources/coco_panoptic.py`, `coco_semantic.py` and `pix2cap_seg.py` build their turns with it. Questions are our
own; a published checkpoint was trained with those marked "released".

Example: ("dog", two masks) -> Turn(question="Give every dog a mask of its own. Segmentation in the instance mode.",
answer="dog-1 [SEG] dog-2 [SEG].", masks=(<the dog on the left>, <the other>)).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pixel_sail.data.templates.referring import REFER_ANSWERS
from pixel_sail.types import BoolMask, DataError, Turn

INSTANCE_MODE = " Segmentation in the instance mode."  # released
SEMANTIC_MODE = " Segmentation in the semantic mode."  # released

INSTANCE_QUESTIONS = (
    "Please segment each {name} in this image.",
    "Give every {name} a mask of its own.",
    "Mark each {name} separately.",
    "Find every {name} and outline them one by one.",
    "Which pixels belong to which {name}?",
    "From left to right, segment every {name} you see.",
    "Count out each {name} with a mask.",
    "Separate each {name} from the others.",
    "I need one mask per {name}.",
    "Cut out every single {name}.",
)

STUFF_QUESTIONS = (
    "Please segment the {name} in this image.",
    "Where is the {name}? Mark its pixels.",
    "Give a mask of the {name}.",
    "Which part of the picture is {name}?",
    "Outline everything here that is {name}.",
    "Select the {name} in this photo.",
    "Show which pixels are {name}.",
    "Paint over the {name}.",
)

SEMANTIC_QUESTIONS = (
    "Please segment all the {name} in this image.",
    "Mark all the {name} with one mask.",
    "Which pixels show all the {name}?",
    "Cover all the {name} at once.",
    "Give a single mask of all the {name}.",
    "Find all the {name} and segment them together.",
    "Select all the {name} in the picture.",
    "Where is all the {name}? Answer with one mask.",
)

DESCRIPTION_QUESTIONS = (
    "Segment what this text is about: {description}",
    "Find the region that fits these words and return its mask: {description}",
    "One part of the image is described here; mark it. {description}",
    "Which pixels are meant? {description}",
    "Please outline what is described as follows. {description}",
    "Read the text and segment its subject. Text: {description}",
)

_STAND_FOR_NOTHING = ("-stuff", "-merged", "-other")
"""Suffixes by which COCO distinguishes its classes but which describe nothing visible."""

SPOKEN_NAMES = {
    "floor-wood": "wooden floor",
    "wall-brick": "brick wall",
    "wall-stone": "stone wall",
    "wall-tile": "tiled wall",
    "wall-wood": "wooden wall",
    "window-blind": "window blind",
}
"""COCO names whose suffix has a meaning."""

RELEASED_NAMES = {
    "orange": "orange fruit",
    "remote": "tv remote",
    "scissors": "scissor",
    "floor-wood": "wood floor",
    "light": "lamp",
    "net": "tennis net",
    "wall-tile": "tile wall",
    "wall-wood": "wood wall",
}
"""Released: the eight of COCO's 133 names that differ from their `spoken_name`, each the first name in its line of
coco_panoptic_with_prompt_eng.txt."""


def spoken_name(name: str) -> str:
    """Return a class name in words, without hyphens, which could be confused with those of "name-1".

    Example: "wall-other-merged" is "wall", "wall-brick" is "brick wall".
    """
    if name in SPOKEN_NAMES:
        return SPOKEN_NAMES[name]
    shorter = next((name.removesuffix(end) for end in _STAND_FOR_NOTHING if name.endswith(end)), name)
    return spoken_name(shorter) if shorter not in (name, "") else " ".join(name.replace("-", " ").split())


def spoken_names(names: Mapping[int, str], where: str) -> dict[int, str]:
    """Return the spoken name of every category. Raises: DataError if two categories have the same name."""
    spoken = {category_id: spoken_name(name) for category_id, name in sorted(names.items())}
    seen: dict[str, int] = {}
    for category_id, name in spoken.items():
        if not name or name in seen:
            same = f"as for category {seen[name]} ({names[seen[name]]!r})" if name else "no letter"
            raise DataError(
                f"{where}: found the name {name!r} for category {category_id} ({names[category_id]!r}), {same}, "
                "expected names that distinguish categories; pass a class_file with other names"
            )
        seen[name] = category_id
    return spoken


def instance_turn(
    name: str, masks: Sequence[BoolMask], rng: np.random.Generator, *, ignored: BoolMask | None = None
) -> Turn:
    """Return the turn about every instance of a class, answered as "name-1 [SEG] name-2 [SEG]." in order."""
    answer = " ".join(f"{name}-{number} [SEG]" for number in range(1, len(masks) + 1)) + "."  # released
    question = _filled(INSTANCE_QUESTIONS, "{name}", name, rng) + INSTANCE_MODE
    return Turn(question=question, answer=answer, masks=tuple(masks), ignored=ignored)


def stuff_turn(name: str, mask: BoolMask, rng: np.random.Generator) -> Turn:
    """Return the turn about a class without instances, answered as "name [SEG]."."""
    question = _filled(STUFF_QUESTIONS, "{name}", name, rng) + SEMANTIC_MODE
    return Turn(question=question, answer=f"{name} [SEG].", masks=(mask,))  # released


def semantic_turn(name: str, mask: BoolMask, rng: np.random.Generator) -> Turn:
    """Return the turn about all pixels of a class."""
    question = _filled(SEMANTIC_QUESTIONS, "{name}", name, rng) + SEMANTIC_MODE
    return Turn(question=question, answer=REFER_ANSWERS[rng.integers(len(REFER_ANSWERS))], masks=(mask,))


def description_turn(description: str, mask: BoolMask, rng: np.random.Generator) -> Turn:
    """Return the turn about the segment that a text describes."""
    question = _filled(DESCRIPTION_QUESTIONS, "{description}", description, rng)
    return Turn(question=question, answer=REFER_ANSWERS[rng.integers(len(REFER_ANSWERS))], masks=(mask,))


def _filled(templates: Sequence[str], placeholder: str, text: str, rng: np.random.Generator) -> str:
    """Return a template sampled from `rng` with the text inserted; braces in the text are kept."""
    return templates[int(rng.integers(len(templates)))].replace(placeholder, text)

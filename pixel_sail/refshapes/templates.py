"""The text of RefShapes' queries: nouns, adjectives, places, relations, for one object or several.

`expressions.py` finds a query and converts it to text here. An example:

    Query(attributes=(("size", "small"), ("shape", "star")), place="left")  ->  "the leftmost little star"
"""

import numpy as np

from pixel_sail.refshapes.kinds import pick
from pixel_sail.refshapes.queries import ATTRIBUTES, FAR_SIDES, Filters, Query

NOUNS = {"circle": ("circle", "circle", "disc"), "square": ("square", "square", "box"), "cross": ("cross", "plus sign")}
THINGS = ("thing", "object", "shape")
BEFORE = {"small": ("small", "small", "little"), "large": ("large", "big"), "dotted": ("dotted", "spotted"),
          "plain": ("plain", "solid"), "checkered": ("checkered", "checked")}  # fmt: skip
AFTER = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
RELATION_WORDS = {"left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
                  "above": ("above", "higher than"), "below": ("below", "under", "underneath"),
                  "next to": ("next to", "close to", "beside", "near")}  # fmt: skip
RANK_WORDS = {2: "second", 3: "third"}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


def noun_phrase(rng: np.random.Generator, filters: Filters, *, is_plural: bool = False) -> str:
    """Convert attribute filters to text without an article: "small striped star", "red thing with dots", "circles"."""
    values = dict(filters)
    noun = values.get("shape") or pick(rng, THINGS)
    noun = pick(rng, NOUNS.get(noun, (noun,)))
    if is_plural:
        noun += "es" if noun.endswith(("s", "x")) else "s"
    words = {name: pick(rng, BEFORE.get(values[name], (values[name],))) for name in ATTRIBUTES[:3] if name in values}
    tail = AFTER.get(values.get("texture", ""))
    if tail is None or rng.random() < 0.75:
        return " ".join([*words.values(), noun])
    return " ".join([*(word for name, word in words.items() if name != "texture"), noun, tail])


def word_single(rng: np.random.Generator, query: Query, num_candidates: int = 0) -> str:
    """Convert a query for one object to text; `num_candidates` is how many objects fit before place or rank."""
    phrase = noun_phrase(rng, query.attributes)
    if query.negated is not None:
        phrase += " " + _denial(rng, query.negated)
    if query.relation is not None:
        phrase += _relative(rng, *query.relation)
    if query.place is not None:
        phrase = _placed(rng, phrase, query.place, num_candidates)
    if query.ordinal is not None:
        rank, side = query.ordinal
        phrase = f"{RANK_WORDS[rank]} {phrase} from the {side}"
    return phrase if rng.random() < 0.5 else f"the {phrase}"


def _relative(rng: np.random.Generator, word: str, anchor: Query) -> str:
    return f" {pick(rng, RELATION_WORDS[word])} the {noun_phrase(rng, anchor.attributes)}"


def _denial(rng: np.random.Generator, negated: tuple[str, str]) -> str:
    name, value = negated
    if name == "shape":
        return f"that is not a {value}"
    return f"{pick(rng, ('that is not', 'which is not', 'that is not', 'not'))} {value}"


def _placed(rng: np.random.Generator, phrase: str, place: str, num_candidates: int) -> str:
    """Add a place to a phrase; "left star" needs exactly two stars to be natural."""
    if place == "middle":
        return phrase + pick(rng, (" in the middle", " in the center", " closest to the center"))
    if place in FAR_SIDES:
        where = place.removeprefix("far ")
        return f"{phrase} on the {place}" if where in ("left", "right") else f"{phrase} at the very {where}"
    if " " in place:
        high = place.replace("top", "upper").replace("bottom", "lower") + " " + phrase
        return pick(rng, (f"{phrase} in the {place}", f"{place} {phrase}", high, f"{phrase} in the {place} corner"))
    extreme = {"top": "highest", "bottom": "lowest"}.get(place, f"{place}most")
    options = [f"{place}most {phrase}", f"{phrase} closest to the {place} edge", f"{extreme} {phrase}"]
    return pick(rng, options + ([f"{place} {phrase}"] * 2 if num_candidates == 2 else []))


def word_plural(rng: np.random.Generator, query: Query, count: int) -> str:
    """Convert a query without place or rank to text, for all the `count` objects it denotes."""
    if query.also is not None:
        article = "the " if rng.random() < 0.6 else ""
        return " and ".join(article + noun_phrase(rng, part.attributes) for part in (query, query.also))
    phrase = noun_phrase(rng, query.attributes, is_plural=True)
    if query.negated is not None:
        denial = _denial(rng, query.negated).replace("is not a ", "are not ").replace("is not", "are not")
        phrase += " " + (denial if query.negated[0] != "shape" else f"{denial}s".replace("crosss", "crosses"))
    if query.relation is not None:
        phrase += _relative(rng, *query.relation)
    options = [f"all the {phrase}", f"all {phrase}", f"the {phrase}", f"every one of the {phrase}"]
    if count == 2:
        options += [f"both {phrase}", f"both the {phrase}"]
    if count in COUNT_WORDS:
        options += [f"the {COUNT_WORDS[count]} {phrase}"] * 2
    return pick(rng, options)

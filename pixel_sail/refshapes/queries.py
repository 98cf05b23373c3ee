"""The meaning of RefShapes expressions: queries, the objects they denote, and what identifies a target.

`expressions.py` searches queries about a scene and converts them to text. The query of "the small star below the blue
ring", for example:

    Query(attributes=(("size", "small"), ("shape", "star")),
          relation=("below", Query(attributes=(("colour", "blue"), ("shape", "ring")))))

Spatial words are used only with a clear margin: if people could disagree, `denote` returns None and the query is
discarded.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from pixel_sail.refshapes.kinds import HELD_OUT_PAIRS
from pixel_sail.refshapes.scene import Scene, SceneObject

Filters = tuple[tuple[str, str], ...]
"""(attribute, value) pairs, in the order of ATTRIBUTES."""

ATTRIBUTES = ("size", "texture", "colour", "shape")
SIDES = ("left", "right", "top", "bottom")
FAR_SIDES = tuple(f"far {side}" for side in SIDES)
"""As a side, but the object must also be in the outer third of the image."""
PLACES = (*SIDES, *FAR_SIDES, "top left", "top right", "bottom left", "bottom right", "middle")
RELATIONS = ("left of", "right of", "above", "below", "next to")
MARGIN_PX = 10.0
"""Two centers closer than this along an axis are not ordered by "leftmost", "second from the top" and the like."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """The meaning of one expression: filters first, then the relation, then a place or an ordinal, then a union."""

    attributes: Filters = ()
    negated: tuple[str, str] | None = None
    """An (attribute, value) pair that must not hold."""
    relation: tuple[str, "Query"] | None = None
    place: str | None = None
    ordinal: tuple[int, str] | None = None
    """(2, "left") is the second from the left."""
    also: "Query | None" = None


@dataclass(frozen=True, kw_only=True)
class SceneExpression:
    """The text of one expression and the objects it refers to, by ascending index."""

    text: str
    query: Query
    targets: tuple[int, ...]
    kind: str


def denote(scene: Scene, query: Query) -> frozenset[int] | None:
    """Return the indices of the objects a query refers to; None if one of its spatial words is ambiguous."""
    matching = [item for item in scene.objects if _matches(item, query)]
    found: list[SceneObject] | None = matching
    if query.relation is not None:
        word, anchor_query = query.relation
        anchor = denote(scene, anchor_query)
        if anchor is None or len(anchor) != 1:
            return None
        found = _related(matching, word, scene.objects[next(iter(anchor))])
    if found is not None and query.place is not None:
        found = _at_place(found, query.place, scene)
    if found is not None and query.ordinal is not None:
        found = _at_rank(found, *query.ordinal)
    others = frozenset() if query.also is None else denote(scene, query.also)
    return None if found is None or others is None else others.union(item.index for item in found)


def _matches(item: SceneObject, query: Query) -> bool:
    if any(getattr(item, name) != value for name, value in query.attributes):
        return False
    return query.negated is None or getattr(item, query.negated[0]) != query.negated[1]


def _edge_order(items: Iterable[SceneObject], side: str) -> list[tuple[float, float, SceneObject]]:
    """Sort by distance of the center from one side of the image; the second value is that of the near edge."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
    edge = axis if sign > 0 else axis + 2
    keyed = [(sign * item.centre_xy[axis], float(sign * item.box_xyxy[edge]), item) for item in items]
    return sorted(keyed, key=lambda entry: entry[0])


def _is_before(first: tuple[float, float, SceneObject], second: tuple[float, float, SceneObject]) -> bool:
    """Return whether the center and the near edge agree on the order, with a tolerance of one pixel for the edge."""
    return second[0] - first[0] >= MARGIN_PX and second[1] - first[1] >= -1


def _at_place(items: list[SceneObject], place: str, scene: Scene) -> list[SceneObject] | None:
    """Return the single object of a superlative, None with fewer than two objects or a margin that is too small."""
    if len(items) < 2:
        return None
    height, width = scene.image_hw
    if place in SIDES or place in FAR_SIDES:
        side = place.removeprefix("far ")
        order = _edge_order(items, side)
        extent = width if side in ("left", "right") else height
        is_outer = place in SIDES or order[0][0] % extent <= 0.32 * extent
        return [order[0][2]] if is_outer and all(_is_before(order[0], other) for other in order[1:]) else None
    spots = [(item.centre_xy[0] / width, item.centre_xy[1] / height) for item in items]
    if place == "middle":
        spread = [max(abs(x - 0.5), abs(y - 0.5)) for x, y in spots]
        near = [item for item, value in zip(items, spread, strict=True) if value <= 0.14]
        far = sum(value >= 0.27 for value in spread)
        return near if len(near) == 1 and far == len(items) - 1 else None
    vertical, horizontal = place.split()
    depth = [(x if horizontal == "left" else 1 - x, y if vertical == "top" else 1 - y) for x, y in spots]
    inside = [item for item, (dx, dy) in zip(items, depth, strict=True) if max(dx, dy) <= 0.4]
    outside = sum(max(dx, dy) >= 0.52 for dx, dy in depth)
    return inside if len(inside) == 1 and outside == len(items) - 1 else None


def _at_rank(items: list[SceneObject], rank: int, side: str) -> list[SceneObject] | None:
    """Return the object of a rank (from 1) counted from one side, None unless the whole order is clear."""
    order = _edge_order(items, side)
    if len(order) < max(3, rank) or not all(_is_before(a, b) for a, b in itertools.pairwise(order)):
        return None
    return [order[rank - 1][2]]


def _related(items: list[SceneObject], word: str, anchor: SceneObject) -> list[SceneObject] | None:
    """Return the objects in a relation to the anchor, None if one of them is a borderline case."""
    items = [item for item in items if item is not anchor]
    offsets = [(item.centre_xy[0] - anchor.centre_xy[0], item.centre_xy[1] - anchor.centre_xy[1]) for item in items]
    if word == "next to":
        gaps = [(dx * dx + dy * dy) ** 0.5 for dx, dy in offsets]
        near = [item for item, gap in zip(items, gaps, strict=True) if gap <= 42]
        far = sum(gap >= 66 for gap in gaps)
        return near if len(near) + far == len(items) else None
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[word]
    found: list[SceneObject] = []
    for item, offset in zip(items, offsets, strict=True):
        along, across = sign * offset[axis], abs(offset[1 - axis])
        if along >= 12 and along >= across:
            found.append(item)
        elif along > -4:
            return None
    return found


def names_held_out(query: Query) -> bool:
    """Return whether a query combines a held-out color and shape, also by negation."""
    parts = [*query.attributes, *([query.negated] if query.negated else [])]
    values = {name: {value for key, value in parts if key == name} for name in ("colour", "shape")}
    inner = [part for part in (query.relation[1] if query.relation else None, query.also) if part is not None]
    pairs = itertools.product(values["colour"], values["shape"])
    return any(pair in HELD_OUT_PAIRS for pair in pairs) or any(names_held_out(part) for part in inner)


def decides(scene: Scene, query: Query) -> str:
    """Return which kind of words, one of FOCI, identifies the one object of a query.

    Attribute queries are classified by color first: "colour" if the named color fits no other object, "shape" if the
    named shape is needed as well, and "size_texture" if both together fit several.
    """
    if query.ordinal is not None or query.negated is not None:
        return "negation_ordinal"
    if query.relation is not None:
        return "relation"
    if query.place is not None:
        return "place"
    named = dict(query.attributes)
    if "colour" in named and _num_fitting(scene, query, ("colour",)) == 1:
        return "colour"
    return "shape" if "shape" in named and _num_fitting(scene, query, ("colour", "shape")) == 1 else "size_texture"


def _num_fitting(scene: Scene, query: Query, names: Iterable[str]) -> int:
    """Return how many objects fit the attributes of a query that have one of these names."""
    kept = Query(attributes=tuple(pair for pair in query.attributes if pair[0] in names))
    return sum(_matches(item, kept) for item in scene.objects)


def shares(scene: Scene, target: int, name: str) -> bool:
    """Return whether another object has the target's value of an attribute."""
    value = getattr(scene.objects[target], name)
    return sum(getattr(item, name) == value for item in scene.objects) > 1


def is_put_to_the_test(scene: Scene, sentence: SceneExpression) -> bool:
    """Return whether a sentence with one target requires understanding its kind of words.

    Another object must have the target's color, or its shape if the color decides. For color and shape, the sentence
    without that word must fit several objects as well; places and the like are only used if they do.
    """
    kind = sentence.kind
    if not shares(scene, sentence.targets[0], "shape" if kind == "colour" else "colour"):
        return False
    others = [name for name in ATTRIBUTES if name != kind]
    return kind not in ("colour", "shape") or _num_fitting(scene, sentence.query, others) > 1

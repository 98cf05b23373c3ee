"""The language of RefShapes: queries with a meaning that can be checked, and their wording.

Place in the flow: between `scene.py` (what there is) and `formats.py` (the files). An expression is first a `Query`,
whose meaning `denote` computes from the scene; only then is it worded. One expression, as an example of the data:

    Sentence(text="the small star below the blue ring", targets=(4,), kind="relation",
             query=Query(attributes=(("size", "small"), ("shape", "star")),
                         relation=("below", Query(attributes=(("colour", "blue"), ("shape", "ring"))))))

Spatial words are only used with a clear margin: where two people could disagree, `denote` answers None and the query is
thrown away. Kinds of sentences: attribute, position, relation, ordinal, negation (one target each), plural, none.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pixel_sail.refshapes.scene import HELD_OUT, Scene, SceneObject, pick

Filters = tuple[tuple[str, str], ...]
"""(attribute, value) pairs, in the order of ATTRIBUTES."""

ATTRIBUTES = ("size", "texture", "colour", "shape")
SIDES = ("left", "right", "top", "bottom")
FAR_SIDES = tuple(f"far {side}" for side in SIDES)
"""As a side, but the object must also stand in the outer third of the picture."""
PLACES = (*SIDES, *FAR_SIDES, "top left", "top right", "bottom left", "bottom right", "middle")
RELATIONS = ("left of", "right of", "above", "below", "next to")
MARGIN_PX = 10.0
"""Two centres closer than this along an axis are not ordered by "leftmost", "second from the top" and the like."""
KIND_WEIGHTS = {"attribute": 0.84, "position": 0.06, "relation": 0.05, "ordinal": 0.02, "negation": 0.03}
"""How often each kind is tried; not every kind exists for every object, so the realised shares differ a little."""


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
class Sentence:
    """One worded expression and the objects it refers to, by index, in increasing order."""

    text: str
    query: Query
    targets: tuple[int, ...]
    kind: str


def denote(scene: Scene, query: Query) -> frozenset[int] | None:
    """Return the indices of the objects a query refers to; None if one of its spatial words could be disputed."""
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
    """Sort by distance of the centre from one side of the picture; the second value is that of the near edge."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
    edge = axis if sign > 0 else axis + 2
    keyed = [(sign * item.centre_xy[axis], float(sign * item.box_xyxy[edge]), item) for item in items]
    return sorted(keyed, key=lambda entry: entry[0])


def _is_before(first: tuple[float, float, SceneObject], second: tuple[float, float, SceneObject]) -> bool:
    """Say whether both the centre and the near edge agree on the order; one pixel against is not seen."""
    return second[0] - first[0] >= MARGIN_PX and second[1] - first[1] >= -1


def _at_place(items: list[SceneObject], place: str, scene: Scene) -> list[SceneObject] | None:
    """Return the single object a superlative picks, None if there are fewer than two or the margin is too small."""
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
    """Return the objects standing in a relation to the anchor, None if one of them only half does."""
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
    """Say whether a query puts a held-out colour and shape together, also by negation."""
    parts = [*query.attributes, *([query.negated] if query.negated else [])]
    values = {name: {value for key, value in parts if key == name} for name in ("colour", "shape")}
    inner = [part for part in (query.relation[1] if query.relation else None, query.also) if part is not None]
    pairs = itertools.product(values["colour"], values["shape"])
    return any(pair in HELD_OUT for pair in pairs) or any(names_held_out(part) for part in inner)


class Describer:
    """Finds expressions for one scene. All randomness comes from the generator it is given."""

    def __init__(self, scene: Scene, rng: np.random.Generator, *, may_name_held_out: bool) -> None:
        """Index which objects every combination of attribute values denotes."""
        self.scene = scene
        self.rng = rng
        self.may_name_held_out = may_name_held_out
        self.by_filters: dict[Filters, list[int]] = {}
        for item in scene.objects:
            for filters in _subsets(item):
                self.by_filters.setdefault(filters, []).append(item.index)

    def singles(self, target: int, count: int) -> list[Sentence]:
        """Return up to `count` different sentences that each refer to `target` alone."""
        found: dict[str, Sentence] = {}
        makers = {"attribute": self._attributes, "position": self._position, "relation": self._relation,
                  "ordinal": self._ordinal, "negation": self._negation}  # fmt: skip
        kinds, weights = tuple(makers), np.cumsum(list(KIND_WEIGHTS.values()))
        for _ in range(count * 4):
            kind = kinds[int(np.searchsorted(weights, self.rng.random() * weights[-1]))]
            query = makers[kind](self.scene.objects[target])
            if query is not None and self._is_allowed(query):
                text = self._word(query)
                found.setdefault(text, Sentence(text=text, query=query, targets=(target,), kind=kind))
            if len(found) == count:
                break
        return list(found.values())

    def plural(self) -> Sentence | None:
        """Return a sentence for two objects or more, None if this attempt found none."""
        roll = self.rng.random()
        item = pick(self.rng, self.scene.objects)
        if roll < 0.25:
            pair = [self._attributes(part) for part in (item, pick(self.rng, self.scene.objects))]
            if pair[0] is None or pair[1] is None or pair[0] == pair[1]:
                return None
            query = Query(attributes=pair[0].attributes, also=pair[1])
        else:
            filters = pick(self.rng, [f for f in _subsets(item) if len(f) <= 2 and len(self.by_filters[f]) > 1] or [()])
            denied = self._negatable(filters) if roll < 0.35 else None
            query = Query(attributes=filters, negated=denied, relation=self._anchor() if 0.35 <= roll < 0.5 else None)
        targets = denote(self.scene, query) or frozenset()
        if len(targets) < 2 or len(targets) == len(self.scene.objects) or not self._is_allowed(query):
            return None
        text = word_plural(self.rng, query, len(targets))
        return Sentence(text=text, query=query, targets=tuple(sorted(targets)), kind="plural")

    def no_target(self) -> Sentence | None:
        """Return a sentence that fits nothing here though its parts occur, None if this attempt found none."""
        filters = dict(_pick_filters(self.rng, pick(self.rng, self.scene.objects)))
        other = pick(self.rng, self.scene.objects)
        name = pick(self.rng, tuple(filters))
        filters[name] = getattr(other, name)
        relation = self._anchor() if self.rng.random() < 0.3 else None
        query = Query(attributes=_ordered(filters), relation=relation)
        is_vague = len(filters) < 2 and query.relation is None
        if is_vague or denote(self.scene, query) != frozenset() or not self._is_allowed(query):
            return None
        return Sentence(text=self._word(query), query=query, targets=(), kind="none")

    def _word(self, query: Query) -> str:
        count = len(self.by_filters.get(query.attributes, ())) if query.attributes else len(self.scene.objects)
        return word_single(self.rng, query, num_candidates=count)

    def _is_allowed(self, query: Query) -> bool:
        return self.may_name_held_out or not names_held_out(query)

    def _attributes(self, item: SceneObject) -> Query | None:
        """Return attributes that single the object out: a fewest-word set or, sometimes, one word more."""
        unique = [filters for filters in _subsets(item) if len(self.by_filters[filters]) == 1]
        if not unique:
            return None
        minimal = [f for f in unique if not any(set(other) < set(f) for other in unique)]
        options = unique if self.rng.random() < 0.75 else minimal
        shortest = min(len(filters) for filters in minimal)
        options = [filters for filters in options if len(filters) <= shortest + 1]
        weights = np.cumsum([_naturalness(filters) for filters in options])
        return Query(attributes=options[int(np.searchsorted(weights, self.rng.random() * weights[-1]))])

    def _bases(self, item: SceneObject, low: int) -> Iterator[Filters]:
        """Yield random short descriptions shared by at least `low` objects."""
        for _ in range(4):
            filters = _pick_filters(self.rng, item) if self.rng.random() < 0.9 else ()
            if not filters or len(self.by_filters[filters]) >= low:
                yield filters

    def _first(self, item: SceneObject, queries: Iterable[Query]) -> Query | None:
        return next((query for query in queries if denote(self.scene, query) == {item.index}), None)

    def _position(self, item: SceneObject) -> Query | None:
        places = [PLACES[i] for i in self.rng.permutation(len(PLACES)).tolist()]
        bases = self._bases(item, 2)
        return self._first(item, (Query(attributes=base, place=place) for base in bases for place in places))

    def _ordinal(self, item: SceneObject) -> Query | None:
        ranks = [(rank, side) for side in self.rng.permutation(["left", "right", "top"]).tolist() for rank in (2, 3)]
        bases = self._bases(item, 3)
        return self._first(item, (Query(attributes=base, ordinal=rank) for base in bases for rank in ranks))

    def _negation(self, item: SceneObject) -> Query | None:
        pairs = ((base, self._negatable(base)) for base in self._bases(item, 2))
        return self._first(item, (Query(attributes=base, negated=denied) for base, denied in pairs if denied))

    def _negatable(self, filters: Filters) -> tuple[str, str] | None:
        """Return an attribute value to deny: of an object that fits the filters, about something they leave open."""
        names = [name for name in ("colour", "shape", "texture") if name not in dict(filters)]
        members = [self.scene.objects[i] for i in self.by_filters[filters]] if filters else list(self.scene.objects)
        name = pick(self.rng, names)
        value = getattr(pick(self.rng, members), name)
        return None if value == "plain" else (name, value)

    def _anchor(self) -> tuple[str, Query] | None:
        """Return a relation word with a uniquely described object."""
        anchor = self._attributes(pick(self.rng, self.scene.objects))
        return None if anchor is None else (pick(self.rng, RELATIONS), anchor)

    def _relation(self, item: SceneObject) -> Query | None:
        """Use the word that fits the anchor drawn: nearness, or the axis along which the two are further apart."""
        queries: list[Query] = []
        for base in (*self._bases(item, 2), *self._bases(item, 2)):
            anchor = pick(self.rng, self.scene.objects)
            described = self._attributes(anchor)
            if described is not None and anchor is not item:
                dx, dy = (a - b for a, b in zip(item.centre_xy, anchor.centre_xy, strict=True))
                word = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
                word = "next to" if self.rng.random() < 0.2 else word
                queries.append(Query(attributes=base, relation=(word, described)))
        return self._first(item, queries)


def _subsets(item: SceneObject) -> list[Filters]:
    """Return every non-empty choice of the object's attributes."""
    pairs = [(name, getattr(item, name)) for name in ATTRIBUTES]
    return [subset for size in range(1, 5) for subset in itertools.combinations(pairs, size)]


def _ordered(filters: dict[str, str]) -> Filters:
    return tuple((name, filters[name]) for name in ATTRIBUTES if name in filters)


def _naturalness(filters: Filters) -> float:
    """Return how likely a person is to choose these attributes: colour and shape first, "plain" hardly ever.

    People name the colour even where it is not needed; studies of reference call it overspecification.
    """
    values = dict(filters)
    weight = 1.0 if "shape" in values else 0.4
    weight *= 1.0 if "colour" in values else 0.04
    return weight * (0.3 if values.get("texture") == "plain" else 1.0)


def _pick_filters(rng: np.random.Generator, item: SceneObject) -> Filters:
    """Return a short description of an object, whether or not it is unique."""
    options = (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("texture", "shape"), ("texture",),
               ("texture", "colour"), ("size", "colour"), ("size", "colour", "shape"))  # fmt: skip
    names = options[int(np.searchsorted((0.08, 0.42, 0.75, 0.79, 0.83, 0.85, 0.88, 0.94), rng.random()))]
    return _ordered({name: getattr(item, name) for name in names})


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
    """Word attribute filters without an article: "small striped star", "red thing with dots", "circles"."""
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
    """Word a query for one object; `num_candidates` is how many objects fit before place or rank picks one."""
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
    """Word a query without place or rank for all the `count` objects it denotes."""
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

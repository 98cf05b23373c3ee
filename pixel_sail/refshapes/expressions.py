"""Finds the expressions of a scene: queries that fit one object, several or none, in words.

Combines `queries.py` (meaning) and `templates.py` (text) for `formats.py` (files). An expression is first a `Query`,
whose meaning is computed from the scene, and only then converted to text. For example:

    Sentence(text="the small star below the blue ring", targets=(4,), kind="relation",
             query=Query(attributes=(("size", "small"), ("shape", "star")),
                         relation=("below", Query(attributes=(("colour", "blue"), ("shape", "ring"))))))

The kind of a sentence with one target, one of FOCI, is what decides its target. The other kinds are plural and none.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pixel_sail.refshapes.focus import FOCI, FOCUS_SENTENCES
from pixel_sail.refshapes.kinds import pick
from pixel_sail.refshapes.queries import (
    ATTRIBUTES,
    PLACES,
    RELATIONS,
    Filters,
    Query,
    SceneExpression,
    decides,
    denote,
    names_held_out,
)
from pixel_sail.refshapes.scene import Scene, SceneObject
from pixel_sail.refshapes.templates import word_plural, word_single


class Describer:
    """Finds expressions for one scene. All randomness comes from the given generator."""

    def __init__(self, scene: Scene, rng: np.random.Generator, *, may_name_held_out: bool) -> None:
        """Index which objects every combination of attribute values denotes."""
        self.scene = scene
        self.rng = rng
        self.may_name_held_out = may_name_held_out
        self.by_filters: dict[Filters, list[int]] = {}
        for item in scene.objects:
            for filters in _subsets(item):
                self.by_filters.setdefault(filters, []).append(item.index)

    def singles(self, count: int, targets: Sequence[int] = ()) -> list[SceneExpression]:
        """Return up to `count` distinct sentences that each refer to one object, most with the scene's focus.

        targets: the objects to refer to, by default all.
        """
        found: dict[str, SceneExpression] = {}
        for _ in range(count * 6):
            target = pick(self.rng, targets or range(len(self.scene.objects)))
            focus = self.scene.focus if self.rng.random() < FOCUS_SENTENCES else pick(self.rng, FOCI)
            query = self._find(self.scene.objects[target], focus)
            if query is not None and self._is_allowed(query):
                text, kind = self._word(query), decides(self.scene, query)
                found.setdefault(text, SceneExpression(text=text, query=query, targets=(target,), kind=kind))
            if len(found) == count:
                break
        return list(found.values())

    def _find(self, item: SceneObject, focus: str) -> Query | None:
        """Return a query for one object of a kind if this attempt finds one; attribute queries may be of another
        kind."""
        if focus == "negation_ordinal":
            return self._ordinal(item) if self.rng.random() < 0.5 else self._negation(item)
        if focus in ("place", "relation"):
            return self._position(item) if focus == "place" else self._relation(item)
        return self._attributes(item, names_shape=focus == "shape")

    def plural(self) -> SceneExpression | None:
        """Return a sentence for two or more objects, None if this attempt found none."""
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
        return SceneExpression(text=text, query=query, targets=tuple(sorted(targets)), kind="plural")

    def no_target(self) -> SceneExpression | None:
        """Return a sentence that fits no object although its parts occur, None if this attempt found none."""
        filters = dict(_pick_filters(self.rng, pick(self.rng, self.scene.objects)))
        other = pick(self.rng, self.scene.objects)
        name = pick(self.rng, tuple(filters))
        filters[name] = getattr(other, name)
        relation = self._anchor() if self.rng.random() < 0.3 else None
        query = Query(attributes=_ordered(filters), relation=relation)
        is_vague = len(filters) < 2 and query.relation is None
        if is_vague or denote(self.scene, query) != frozenset() or not self._is_allowed(query):
            return None
        return SceneExpression(text=self._word(query), query=query, targets=(), kind="none")

    def _word(self, query: Query) -> str:
        count = len(self.by_filters.get(query.attributes, ())) if query.attributes else len(self.scene.objects)
        return word_single(self.rng, query, num_candidates=count)

    def _is_allowed(self, query: Query) -> bool:
        return self.may_name_held_out or not names_held_out(query)

    def _attributes(self, item: SceneObject, *, names_shape: bool = False) -> Query | None:
        """Return attributes that identify the object: as few words as possible or one more."""
        unique = [filters for filters in _subsets(item) if len(self.by_filters[filters]) == 1]
        if not unique:
            return None
        shortest = min(len(filters) for filters in unique)
        options = [filters for filters in unique if len(filters) <= shortest + 1]
        likely = [(1.0 if "shape" in dict(f) else 0.05) if names_shape else _naturalness(f) for f in options]
        weights = np.cumsum(likely)
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
        """Return an attribute value to negate: of an object that fits the filters, for an attribute they leave open."""
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
        """Use the relation that fits the sampled anchor: nearness, or the axis along which the two are further
        apart."""
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
    """Return how likely a person is to choose these attributes: color and shape first, "plain" rarely.

    People name the color even if it is not needed; studies of reference call it overspecification.
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

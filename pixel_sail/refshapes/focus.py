"""Samples the objects of a scene so that one kind of words, the scene's focus, identifies the targets.

`scene.py` places and paints the objects. If their attributes were sampled independently, color alone would identify
nearly every object. A scene with the focus `place`, for example:

    four small plain red stars and a large striped blue ring      ("the leftmost star", "the red star at the bottom")

The function of each focus states what its objects share and what varies; `FOCUS_FRACTIONS` gives its frequency.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixel_sail.refshapes.kinds import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, TEXTURES, Attributes, pick, shuffled

FOCUS_FRACTIONS = {
    "colour": 0.15,
    "shape": 0.20,
    "size_texture": 0.17,
    "place": 0.18,
    "relation": 0.18,
    "negation_ordinal": 0.12,
}
"""Frequency of each focus in train, val, testA and testB; testA has no "shape", as its shapes are equal."""
FOCI = tuple(FOCUS_FRACTIONS)
FOCUS_SENTENCES = 0.8
"""Fraction of the expressions that are tried with the focus of their scene; the others with any focus."""

MAX_OBJECTS = 6
MAX_LARGE = 3
"""Maximum large objects, so that there is room for the rest; further ones are small."""
LARGE = 0.42
PLAIN = 0.5
"""Probability that an unspecified size or texture is large or plain."""


@dataclass(frozen=True, kw_only=True)
class SceneRules:
    """Rules for the scenes of one split."""

    focus: str | None = None
    """None: sampled per scene from FOCUS_FRACTIONS."""
    one_shape: bool = False
    """All objects have the same shape, as all are people in some images, so shape never identifies an object."""
    held_out: bool = False
    """The lead object of the scene has a held-out color and shape; no other scene has any."""


def pick_focus(rng: np.random.Generator, rules: SceneRules) -> str:
    """Return the focus of one scene."""
    if rules.focus is not None:
        return rules.focus
    fractions = {
        focus: fraction for focus, fraction in FOCUS_FRACTIONS.items() if not (rules.one_shape and focus == "shape")
    }
    bounds = np.cumsum(list(fractions.values()))
    return tuple(fractions)[int(np.searchsorted(bounds, rng.random() * bounds[-1]))]


def sample_kinds(rng: np.random.Generator, focus: str, rules: SceneRules) -> list[Attributes]:
    """Return the attributes of the objects of one scene, two to six, in random order."""
    kinds: list[Attributes] = []
    for kind in _OBJECTS[focus](_Palette(rng, rules))[:MAX_OBJECTS]:
        is_too_large = kind.size == "large" and sum(other.size == "large" for other in kinds) >= MAX_LARGE
        kinds.append(Attributes(**{**vars(kind), "size": "small"}) if is_too_large else kind)
    return shuffled(rng, kinds)


class _Palette:
    """Attributes that one scene may sample. The lead is the color and shape that the scene is about."""

    def __init__(self, rng: np.random.Generator, rules: SceneRules) -> None:
        self.rng = rng
        pairs = (
            sorted(HELD_OUT_PAIRS) if rules.held_out else [(c, s) for c in COLOURS for s in SHAPES if _is_free(c, s)]
        )
        self.lead = pick(rng, pairs)
        self.shapes = (self.lead[1],) if rules.one_shape else SHAPES
        self.colours = tuple(colour for colour in COLOURS if any(_is_free(colour, shape) for shape in self.shapes))

    def kind(
        self, colour: str | None = None, shape: str | None = None, texture: str | None = None, size: str | None = None
    ) -> Attributes:
        """Return attributes with unspecified ones sampled; a given pair of color and shape is kept."""
        if colour is None:
            colour = pick(self.rng, self.colours_for(shape) if shape else self.colours)
        return Attributes(
            colour=colour,
            shape=shape or pick(self.rng, self.shapes_for(colour)),
            texture=texture or ("plain" if self.chance(PLAIN) else pick(self.rng, TEXTURES[1:])),
            size=size or ("large" if self.chance(LARGE) else "small"),
        )

    def colours_for(self, shape: str) -> list[str]:
        """Return the colors that a shape may have, in random order."""
        return shuffled(self.rng, [colour for colour in COLOURS if _is_free(colour, shape)])

    def shapes_for(self, colour: str) -> list[str]:
        """Return the shapes that a color may have, in random order."""
        return shuffled(self.rng, [shape for shape in self.shapes if _is_free(colour, shape)])

    def other_colours(self) -> list[str]:
        """Return all colors except the lead's, in random order."""
        return shuffled(self.rng, [colour for colour in self.colours if colour != self.lead[0]])

    def between(self, low: int, high: int) -> int:
        """Return a number from low to high, both inclusive."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, fraction: float) -> bool:
        """Return True with this probability."""
        return bool(self.rng.random() < fraction)


def _is_free(colour: str, shape: str) -> bool:
    return (colour, shape) not in HELD_OUT_PAIRS


def _colour(palette: _Palette) -> list[Attributes]:
    """Return three to five objects of different colors, mostly of two shapes."""
    colour, shape = palette.lead
    shared = (shape, pick(palette.rng, palette.shapes))
    kinds = [palette.kind(colour, shape)]
    for other in palette.other_colours()[: palette.between(2, 4)]:
        fitting = [shape for shape in shared if _is_free(other, shape)]
        kinds.append(palette.kind(other, pick(palette.rng, fitting) if fitting else None))
    return kinds


def _shape(palette: _Palette) -> list[Attributes]:
    """Return two colors, each with up to three objects of different shapes."""
    colour, shape = palette.lead
    rest = [other for other in palette.shapes_for(colour) if other != shape]
    kinds = [palette.kind(colour, one) for one in [shape, *rest][: palette.between(2, 3)]]
    second = palette.other_colours()[0]
    return kinds + [palette.kind(second, one) for one in palette.shapes_for(second)[: palette.between(1, 3)]]


def _size_texture(palette: _Palette) -> list[Attributes]:
    """Return two to four objects of one color and shape that differ in texture, or one in size, and a few more."""
    colour, shape = palette.lead
    number = palette.between(2, 4)
    if palette.chance(0.45):
        size = pick(palette.rng, SIZES)
        kinds = [
            palette.kind(colour, shape, texture, size if palette.chance(0.7) else None)
            for texture in shuffled(palette.rng, TEXTURES)[:number]
        ]
    else:
        odd, usual = shuffled(palette.rng, SIZES)
        texture = pick(palette.rng, TEXTURES)
        sizes = [odd] + [usual] * min(number - 1, 2)
        kinds = [palette.kind(colour, shape, texture if palette.chance(0.6) else None, size) for size in sizes]
    others = [palette.kind(shape=shape if palette.chance(0.5) else None) for _ in range(palette.between(1, 2))]
    return kinds + others


def _place(palette: _Palette) -> list[Attributes]:
    """Return two to four equal objects and up to two more, some of the same color."""
    colour = palette.lead[0]
    kinds = _equal(palette, palette.between(2, 4), large=0.3)
    return kinds + [palette.kind(colour if palette.chance(0.3) else None) for _ in range(palette.between(0, 2))]


def _relation(palette: _Palette) -> list[Attributes]:
    """Return two or three equal objects and one to three of other colors, to which they can be left of or below."""
    kinds = _equal(palette, palette.between(2, 3), large=0.2)
    return kinds + [palette.kind(colour) for colour in palette.other_colours()[: palette.between(1, 3)]]


def _negation_ordinal(palette: _Palette) -> list[Attributes]:
    """Return three or four equal objects to count, or one that lacks what similar objects have, and a few more."""
    kinds = _equal(palette, max(palette.between(2, 4), 3), large=0.0) if palette.chance(0.5) else _odd_one(palette)
    return kinds + [palette.kind() for _ in range(palette.between(1, 2))]


def _equal(palette: _Palette, number: int, *, large: float) -> list[Attributes]:
    """Return objects with equal attributes."""
    texture = "plain" if palette.chance(PLAIN) else pick(palette.rng, TEXTURES)
    size = "large" if palette.chance(large) else "small"
    return [palette.kind(*palette.lead, texture, size)] * number


def _odd_one(palette: _Palette) -> list[Attributes]:
    """Return one object and one or two that all differ from it by the same value of one attribute."""
    colour, shape = palette.lead
    number = palette.between(1, 2)
    other_shapes = [other for other in palette.shapes_for(colour) if other != shape]
    name = pick(palette.rng, ("texture", "colour", "shape") if other_shapes else ("texture", "colour"))
    if name == "shape":
        return [palette.kind(colour, shape)] + [palette.kind(colour, other_shapes[0]) for _ in range(number)]
    if name == "colour":
        other = next(other for other in palette.colours_for(shape) if other != colour)
        return [palette.kind(colour, shape)] + [palette.kind(other, shape) for _ in range(number)]
    odd, usual = shuffled(palette.rng, TEXTURES)[:2]
    return [palette.kind(colour, shape, odd)] + [palette.kind(colour, shape, usual) for _ in range(number)]


_OBJECTS: dict[str, Callable[[_Palette], list[Attributes]]] = {
    "colour": _colour,
    "shape": _shape,
    "size_texture": _size_texture,
    "place": _place,
    "relation": _relation,
    "negation_ordinal": _negation_ordinal,
}

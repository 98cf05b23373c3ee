"""The attributes of RefShapes: colors, shapes, textures, sizes, and the color-shape pairs held out of training.

`focus.py` samples the attributes of a scene's objects, `scene.py` places them. One object, for example:

    Kind(colour="red", shape="star", texture="plain", size="large")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
VALUES = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES}

HELD_OUT_PAIRS = frozenset((COLOURS[i], SHAPES[(5 * i + 2) % len(SHAPES)]) for i in range(6))
"""(colour, shape) pairs sampled and named in testB only: 6 of 60; no color and no shape repeats."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The four attributes that an expression can name."""

    colour: str
    shape: str
    texture: str
    size: str

    @property
    def is_held_out(self) -> bool:
        """Return whether this color and shape occur together in testB only."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """Return one item with equal probability."""
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[_Item]) -> list[_Item]:
    """Return the items in random order."""
    return [items[i] for i in rng.permutation(len(items)).tolist()]

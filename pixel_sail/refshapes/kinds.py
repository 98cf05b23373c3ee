"""The words of RefShapes: colours, shapes, textures, sizes, and which colour and shape never meet in training.

The bottom of the package. `focus.py` samples the kinds of a scene, `scene.py` places them. An object's kind, as an
example of the data:

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
"""(colour, shape) pairs sampled and named in testB only: 6 of 60; no colour and no shape repeats."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The four attributes an expression can name."""

    colour: str
    shape: str
    texture: str
    size: str

    @property
    def is_held_out(self) -> bool:
        """Say whether this colour and shape go together in testB only."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """Return one item, all equally likely."""
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[_Item]) -> list[_Item]:
    """Return the items in any order."""
    return [items[i] for i in rng.permutation(len(items)).tolist()]

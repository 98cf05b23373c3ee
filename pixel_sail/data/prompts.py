"""Turns region masks into visual prompts: a mask, a box, a point or a scribble.

`data/regions.py` calls `sample_prompt` for each region; the processor adds the prompt's embedding to the patches that
the returned mask covers.

Example: a mask of 40 x 25 pixels becomes, with fractions {"mask": 0.2, "box": 0.4, "point": 0.4}, its bounding
rectangle with probability 0.4 and a single pixel well inside with probability 0.4.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pixel_sail.rle import bounding_box
from pixel_sail.types import BoolMask, DataError

PROMPT_KINDS = ("mask", "box", "point", "scribble")
MASK_ONLY = {"mask": 1.0}

POINT_MARGIN_PX = 16
"""A point is sampled among the pixels further from the outline than this, if any (release: the patch size)."""

SCRIBBLE_CORNERS = (2, 5)
"""Minimum and maximum number of points that a scribble passes through."""


def check_fractions(fractions: Mapping[str, float], where: str) -> None:
    """Raise DataError unless the fractions are of known kinds, finite, not negative and not all zero."""
    is_sound = set(fractions) <= set(PROMPT_KINDS) and all(0 <= fraction < np.inf for fraction in fractions.values())
    if not is_sound or sum(fractions.values()) <= 0:
        raise DataError(
            f"{where}: found prompt fractions {dict(fractions)}, expected finite fractions of {PROMPT_KINDS}, none "
            "negative and not all zero; correct the config"
        )


def sample_prompt(mask: BoolMask, fractions: Mapping[str, float], rng: np.random.Generator) -> BoolMask:
    """Return the region as a prompt of a kind sampled by `fractions`, which need not sum to 1.

    The result has at least one pixel, and a point or scribble is inside the region. Raises: DataError if empty.
    """
    if not mask.any():
        raise DataError("visual prompt: found a region without pixels, expected at least one; remove the region")
    kinds = [kind for kind in PROMPT_KINDS if fractions.get(kind, 0) > 0]
    limits = np.cumsum([fractions[kind] for kind in kinds])
    number = int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))
    kind = kinds[min(number, len(kinds) - 1)]  # The product above may be rounded up to the last limit.
    if kind == "box":
        return box_prompt(mask)
    if kind == "point":
        return point_prompt(mask, rng)
    return scribble_prompt(mask, rng) if kind == "scribble" else mask


def box_prompt(mask: BoolMask) -> BoolMask:
    """Return the tight rectangle around the region, filled."""
    bounds = bounding_box(mask)
    assert bounds is not None, "an empty region has no box"
    x0, y0, x1, y1 = bounds
    box = np.zeros_like(mask)
    box[y0:y1, x0:x1] = True
    return box


def point_prompt(mask: BoolMask, rng: np.random.Generator) -> BoolMask:
    """Return one pixel of the region, more than POINT_MARGIN_PX inside if possible, else as far inside as possible."""
    ((rows, columns),) = ndimage.find_objects(mask.astype(np.uint8))  # Nothing outside the region's box can matter.
    distance = ndimage.distance_transform_edt(np.pad(mask[rows, columns], 1))[1:-1, 1:-1]
    candidates = np.argwhere(distance > POINT_MARGIN_PX)
    if len(candidates) == 0:
        candidates = np.argwhere(distance == distance.max())
    row, column = candidates[rng.integers(len(candidates))]
    point = np.zeros_like(mask)
    point[rows.start + row, columns.start + column] = True
    return point


def scribble_prompt(mask: BoolMask, rng: np.random.Generator) -> BoolMask:
    """Return a polyline between random pixels of the region, clipped to the region."""
    pixels = np.flatnonzero(mask)
    corners = pixels[rng.integers(len(pixels), size=int(rng.integers(SCRIBBLE_CORNERS[0], SCRIBBLE_CORNERS[1] + 1)))]
    rows, columns = np.unravel_index(corners, mask.shape)
    canvas = Image.fromarray(np.zeros(mask.shape, dtype=np.uint8))
    width = max(1, round(float(np.sqrt(len(pixels))) / 12))
    ImageDraw.Draw(canvas).line(list(zip(columns.tolist(), rows.tolist(), strict=True)), fill=1, width=width)
    scribble = np.asarray(canvas).astype(bool) & mask
    scribble.flat[corners] = True
    return scribble

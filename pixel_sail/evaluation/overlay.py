"""Masks painted over images.

Used by validation, `scripts/predict.py` and the report. A mask is tinted at half strength with a border in full color:

    paint(image, mask, PREDICTED_COLOR)  ->  uint8 [H, W, 3]
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixel_sail.types import BoolMask

ImageArray = NDArray[np.uint8]
"""RGB pixels [H, W, 3]."""

PALETTE = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66))
"""Okabe-Ito colors, distinguishable for color-blind readers."""
PREDICTED_COLOR, TRUE_COLOR = PALETTE[0], PALETTE[2]


def tint_mask(image: Image.Image | ImageArray, mask: BoolMask, color: tuple[int, int, int]) -> ImageArray:
    """Return the image with the mask tinted and its border rendered."""
    pixels = np.asarray(image, dtype=np.float32).copy()
    pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(color, dtype=np.float32)
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels[mask & ~inner] = color
    return pixels.round().astype(np.uint8)

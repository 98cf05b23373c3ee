"""Rendering of training samples with colored, numbered masks and prompts.

Used by the data report and the batch viewer, on top of `overlay.py`. Distinct masks are tinted and numbered 1, 2, ...
in the order of the [SEG] of all turns; a repeated mask keeps its number. Visual prompts are outlined and named P0, P1,
... by their id.

    render_masks(image of 640 x 480, [left cup, right cup, left cup], {7: spoon})
    ->  RGB [360, 480, 3] with "1" and "2" on the cups and a ring named "P7" around the spoon
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixel_sail.evaluation.overlay import PALETTE, ImageArray, tint_mask
from pixel_sail.types import BoolMask, SizeHW

WIDTH_PX = 480
"""Maximum width; larger images are scaled down."""
SMALL_WIDTH_PX = 240
"""Minimum width; smaller images are enlarged by an integer factor."""
BORDER_PX = 2
IGNORED_COLOR = (110, 110, 110)


def color_of(number: int) -> tuple[int, int, int]:
    """Return the color of mask or prompt `number`."""
    return PALETTE[number % len(PALETTE)]


def mask_numbers(masks: Sequence[BoolMask]) -> list[int]:
    """Return the number of each mask, from 0. Equal masks have the same."""
    seen: dict[tuple[tuple[int, ...], bytes], int] = {}
    return [seen.setdefault((mask.shape, mask.tobytes()), len(seen)) for mask in masks]


def render_masks(
    image: Image.Image,
    masks: Sequence[BoolMask],
    prompts: Mapping[int, BoolMask],
    ignored: Sequence[BoolMask] = (),
) -> ImageArray:
    """Return an image with masks tinted and numbered, prompts, by id, outlined and named, and ignored pixels grey.

    Shapes: masks are [H, W] of the image; the result is scaled, see WIDTH_PX.
    """
    size_hw = _rendered_size((image.height, image.width))
    resampling = Image.Resampling.BILINEAR if size_hw[1] < image.width else Image.Resampling.NEAREST
    pixels = np.asarray(image.convert("RGB").resize((size_hw[1], size_hw[0]), resampling))
    for mask in ignored:
        pixels = tint_mask(pixels, scale_mask(mask, size_hw), IGNORED_COLOR)
    labels: dict[str, tuple[BoolMask, tuple[int, int, int]]] = {}
    for number, mask in zip(mask_numbers(masks), masks, strict=True):
        if str(number + 1) not in labels:
            scaled = scale_mask(mask, size_hw)
            pixels = tint_mask(pixels, scaled, color_of(number))
            labels[str(number + 1)] = (scaled, color_of(number))
    for prompt_id, mask in sorted(prompts.items()):
        scaled = scale_mask(mask, size_hw)
        pixels = _outline(pixels, scaled, color_of(prompt_id))
        labels[f"P{prompt_id}"] = (scaled, color_of(prompt_id))
    return _write_labels(pixels, labels)


def _rendered_size(size_hw: SizeHW) -> SizeHW:
    height, width = size_hw
    if width > WIDTH_PX:
        return max(1, round(height * WIDTH_PX / width)), WIDTH_PX
    factor = -(-SMALL_WIDTH_PX // width)
    return height * factor, width * factor


def scale_mask(mask: BoolMask, size_hw: SizeHW) -> BoolMask:
    """Resize a mask. Marked pixels never disappear when downscaling."""
    if size_hw[1] >= mask.shape[1]:
        factors = np.array(size_hw) // np.array(mask.shape)
        return mask.repeat(factors[0], axis=0).repeat(factors[1], axis=1)
    rows, columns = np.nonzero(mask)
    small: BoolMask = np.zeros(size_hw, dtype=np.bool_)
    small[rows * size_hw[0] // mask.shape[0], columns * size_hw[1] // mask.shape[1]] = True
    return small


def _outline(pixels: ImageArray, mask: BoolMask, color: tuple[int, int, int]) -> ImageArray:
    """Render a ring around a region, which makes single pixels visible and keeps the image below visible."""
    wide, size = mask.copy(), BORDER_PX
    for row, column in np.argwhere(mask)[:1] if mask.sum() == 1 else ():
        wide[max(0, row - 4) : row + 5, max(0, column - 4) : column + 5] = True
    grown = np.pad(wide, size)
    ring = np.zeros_like(wide)
    for row in range(2 * size + 1):
        for column in range(2 * size + 1):
            ring |= grown[row : row + wide.shape[0], column : column + wide.shape[1]]
    result = pixels.copy()
    result[ring & ~wide] = color
    return result


def _write_labels(pixels: ImageArray, labels: Mapping[str, tuple[BoolMask, tuple[int, int, int]]]) -> ImageArray:
    """Write each label on a pixel of its mask, near the middle."""
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for text, (mask, color) in labels.items():
        spots = np.argwhere(mask)
        if len(spots) == 0:
            continue
        middle = spots[np.abs(spots - spots.mean(0)).sum(1).argmin()]
        x, y = float(middle[1]), float(middle[0])
        box = draw.textbbox((x, y), text, font=font, anchor="mm")
        draw.rectangle((box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), fill="white", outline=color, width=2)
        draw.text((x, y), text, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)


def jpeg_source(pixels: ImageArray) -> str:
    """Return an image as the `src` of an HTML image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

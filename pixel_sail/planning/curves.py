"""Cost over size as a picture.

Place in the flow: the benchmarks of `tools/` draw what they measured. Three points of two ways to compute attention:

    draw_curves([1332, 2664, 5328], {"dense": [0.1, 0.4, 1.6], "segments": [0.1, 0.2, 0.4]}, "tokens of the row", "")
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def draw_curves(tokens: Sequence[float], curves: dict[str, list[float]], label: str, title: str) -> Image.Image:
    """Return seconds over a size, both axes logarithmic."""
    width, height, left, right, top, bottom = 760, 440, 90, 730, 50, 370
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    values = [value for curve in curves.values() for value in curve]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
    span = math.log2(tokens[-1] / tokens[0]) or 1.0

    def place(size: float, value: float) -> tuple[float, float]:
        across = math.log2(size / tokens[0]) / span
        return left + across * (right - left), bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    draw.text((left, 14), title, fill="black", font=font)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#888888")
    for value in (min(values), max(values)):
        draw.text((left - 8, place(tokens[0], value)[1]), f"{value:.3g} s", fill="black", font=font, anchor="rm")
    for size in tokens:
        draw.text((place(size, min(values))[0], bottom + 8), f"{size:g}", fill="black", font=font, anchor="ma")
    draw.text(((left + right) / 2, height - 24), label, fill="black", font=font, anchor="mm")
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        draw.line([place(size, value) for size, value in zip(tokens, curve, strict=True)], fill=color, width=3)
        draw.text((left + 20, top + 20 * number), name, fill=color, font=font)
    return picture

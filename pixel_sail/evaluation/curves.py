"""Line charts over steps, as one picture.

Place in the flow: `tools/plot_run.py` makes one `Panel` per number from log files and saves `draw_panels(...)`:

    Panel(title="bce by source", curves=(Curve(label="refshapes", xs=(10, 20), ys=(0.39, 0.21), color=0), ...))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixel_sail.evaluation.overlay import PALETTE

COLORS = (PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[4], PALETTE[5], (60, 60, 60), (140, 81, 10))
"""The colours of the overlays but for yellow, which cannot be seen on white."""

PATTERNS = ((1, 0), (10, 6), (3, 4), (12, 4, 3, 4))
"""Drawn and left out in turn, pixels: solid, dashed, dotted, both."""

SCALE = 2
"""Everything is drawn this much larger and scaled down, which smooths lines."""

WIDTH, HEIGHT = 560, 330
"""Of one panel, pixels."""
LEFT, RIGHT, TOP, BOTTOM = 70, 22, 44, 44
"""Margins of the axes in a panel."""
LEGEND_ROW = 20
MARK = 3
"""Radius of the dots of a curve with few points, pixels."""

INK, AXIS, GRID = (30, 30, 30), (120, 120, 120), (232, 232, 232)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel."""

    label: str
    """Empty where the panel's title says enough."""
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    """As many as `xs`; a value that is not finite leaves a gap."""
    color: int = 0
    pattern: int = 0
    smooth: int = 1
    """Points of the running mean; above 1 the values themselves are drawn faintly behind it."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: tuple[Curve, ...]


def running_mean(values: Sequence[float], number: int) -> list[float]:
    """Return the mean of `number` (odd) values around each one, of fewer but as many on both sides at the ends.

    Values that are not finite stay as they are and count nowhere else.
    """
    half = number // 2
    result = []
    for index, value in enumerate(values):
        reach = min(half, index, len(values) - 1 - index)
        near = [one for one in values[index - reach : index + reach + 1] if math.isfinite(one)]
        result.append(sum(near) / len(near) if math.isfinite(value) else value)
    return result


def nice_ticks(low: float, high: float, number: int) -> list[float]:
    """Return about `number` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Return a tick's value, short: 0.02, 1.5e-05, 20k."""
    if abs(value) >= 10_000 and value < 1e6:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"


def draw_panels(panels: Sequence[Panel], title: str, *, columns: int = 3) -> Image.Image:
    """Return all panels in rows of at most `columns`, each row as high as its longest legend needs."""
    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [HEIGHT + max(_legend_rows(panel) for panel in row) * LEGEND_ROW for row in rows]
    head = 48
    picture = Image.new("RGB", (columns * WIDTH * SCALE, (head + sum(heights)) * SCALE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT * SCALE, 14 * SCALE), title, fill=INK, font=_font(20))
    top = head
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _Axes(draw, panel, left=column * WIDTH, top=top).draw_all()
        top += height
    return picture.resize((picture.width // SCALE, picture.height // SCALE), Image.Resampling.LANCZOS)


def _legend_rows(panel: Panel) -> int:
    return math.ceil(sum(1 for curve in panel.curves if curve.label) / 2)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


class _Axes:
    """The drawing of one panel."""

    def __init__(self, draw: ImageDraw.ImageDraw, panel: Panel, *, left: int, top: int) -> None:
        self.draw, self.panel, self.left, self.top = draw, panel, left, top
        points = [(x, y) for curve in panel.curves for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
        xs, ys = np.array(points or [(0.0, 0.0)]).T
        self.x_range = _widened(float(xs.min()), float(xs.max()), margin=0.0)
        # From zero where that wastes little: heights can then be compared.
        low = 0.0 if 0 <= ys.min() < 0.6 * ys.max() else float(ys.min())
        self.y_range = _widened(low, float(ys.max()), margin=0.05)
        if low == 0.0:
            self.y_range = (0.0, self.y_range[1])

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies, in enlarged pixels."""
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        across = self.left + LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = self.top + HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return across * SCALE, down * SCALE

    def draw_all(self) -> None:
        """Draw title, grid, curves and legend."""
        middle = (self.left + LEFT + (WIDTH - LEFT - RIGHT) / 2) * SCALE
        self.draw.text((middle, (self.top + 24) * SCALE), self.panel.title, fill=INK, font=_font(16), anchor="mm")
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        for y in nice_ticks(y_low, y_high, 5):
            start, end = self.place(x_low, y), self.place(x_high, y)
            self.draw.line([start, end], fill=GRID, width=SCALE)
            self.draw.text((start[0] - 8 * SCALE, start[1]), tick_text(y), fill=INK, font=_font(13), anchor="rm")
        base = self.place(x_low, y_low)[1]
        for x in nice_ticks(x_low, x_high, 5):
            at = self.place(x, y_low)[0]
            self.draw.line([(at, base), (at, base + 4 * SCALE)], fill=AXIS, width=SCALE)
            self.draw.text((at, base + 6 * SCALE), tick_text(x), fill=INK, font=_font(13), anchor="ma")
        self.draw.line([self.place(x_low, y_low), self.place(x_high, y_low)], fill=AXIS, width=SCALE)
        self.draw.text((middle, base + 30 * SCALE), "step", fill=AXIS, font=_font(12), anchor="mm")
        for curve in self.panel.curves:
            color = COLORS[curve.color % len(COLORS)]
            if curve.smooth > 1:
                self._line(curve.xs, curve.ys, _faint(color), 0, width=1)
            self._line(curve.xs, running_mean(curve.ys, curve.smooth), color, curve.pattern, width=2)
        self._legend()

    def _line(
        self, xs: Sequence[float], ys: Sequence[float], color: tuple[int, int, int], pattern: int, *, width: int
    ) -> None:
        """Draw a curve, a dot for each point where there are few or one stands alone."""
        piece: list[tuple[float, float]] = []
        for x, y in [*zip(xs, ys, strict=True), (0.0, math.nan)]:
            if math.isfinite(y):
                piece.append(self.place(x, y))
                continue
            for start, end in _dashes(piece, PATTERNS[pattern % len(PATTERNS)]) if pattern else ():
                self.draw.line([start, end], fill=color, width=width * SCALE)
            if not pattern and len(piece) > 1:
                self.draw.line(piece, fill=color, width=width * SCALE, joint="curve")
            if len(xs) <= 12 or len(piece) == 1:
                for across, down in piece:
                    self.draw.circle((across, down), MARK * SCALE, fill=color)
            piece = []

    def _legend(self) -> None:
        """Name the curves below the axes, in two columns."""
        room = (WIDTH - LEFT - RIGHT) / 2
        for index, curve in enumerate(curve for curve in self.panel.curves if curve.label):
            x = (self.left + LEFT + (index % 2) * room) * SCALE
            y = (self.top + HEIGHT + 8 + (index // 2) * LEGEND_ROW) * SCALE
            color = COLORS[curve.color % len(COLORS)]
            for start, end in _dashes([(x, y), (x + 34 * SCALE, y)], PATTERNS[curve.pattern % len(PATTERNS)]):
                self.draw.line([start, end], fill=color, width=3 * SCALE)
            font = _font(13)
            label = curve.label
            while font.getlength(label) > (room - 50) * SCALE:
                label = "..." + label.removeprefix("...")[1:]
            self.draw.text((x + 42 * SCALE, y), label, fill=INK, font=font, anchor="lm")


def _widened(low: float, high: float, *, margin: float) -> tuple[float, float]:
    """Return the range with some room, never empty."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = max(abs(high) * 0.1, 1e-12) if high else 1.0
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _faint(color: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (255 - (255 - part) // 4 for part in color)
    return red, green, blue


def _dashes(
    points: Sequence[tuple[float, float]], pattern: Sequence[int]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the drawn parts of a line through `points`, the pattern going on around corners."""
    if pattern[1] == 0:
        return list(pairwise(points))
    lengths = [part * SCALE for part in pattern]
    parts, phase, left = [], 0, float(lengths[0])
    for start, end in pairwise(points):
        whole = math.dist(start, end)
        done = 0.0
        while whole - done > 1e-9:
            reach = min(left, whole - done)
            if phase % 2 == 0:
                ends = [
                    (
                        start[0] + (end[0] - start[0]) * at / whole,
                        start[1] + (end[1] - start[1]) * at / whole,
                    )
                    for at in (done, done + reach)
                ]
                parts.append((ends[0], ends[1]))
            done += reach
            left -= reach
            if left <= 1e-9:
                phase = (phase + 1) % len(lengths)
                left = float(lengths[phase])
    return parts

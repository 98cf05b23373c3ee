"""Line charts, rendered by matplotlib.

`tools/plot_run.py` makes one `Panel` per logged metric, the benchmarks of `tools/` one per measured cost. `save_panels`
writes them. Figures are made without pyplot, so that no display is needed.

    Panel(title="bce by source", curves=(Curve(label="refshapes", xs=(10, 20), ys=(0.39, 0.21), color=0), ...))
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pixel_sail.evaluation.overlay import PALETTE
from pixel_sail.files import replace_bytes

COLORS = tuple(
    f"#{red:02x}{green:02x}{blue:02x}"
    for red, green, blue in (PALETTE[1], PALETTE[0], *PALETTE[2:6], (60, 60, 60), (140, 81, 10))
)
"""The colors of the overlays except yellow, which is invisible on white."""

PATTERNS = ("-", "--", ":", "-.")

FEW_POINTS = 12
"""Curves with at most this number of points get a dot per point."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel."""

    label: str
    """Empty if the panel's title is enough."""
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    """Same length as `xs`. A non-finite value leaves a gap."""
    color: int = 0
    pattern: int = 0
    smooth: int = 1
    """Window of the running mean. Above 1 the raw values are rendered faintly behind it."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: tuple[Curve, ...]
    x_label: str = "step"
    y_label: str = ""
    x_names: tuple[str, ...] = ()
    """Labels of the positions 1, 2, ... of a categorical axis. Curves then have dots only."""
    is_log: bool = False
    """Whether both axes are logarithmic, with the curves' xs as ticks."""


def running_mean(values: Sequence[float], number: int) -> list[float]:
    """Return the centered mean over `number` (odd) values, with a smaller symmetric window at the ends.

    Non-finite values are kept and excluded from other means.
    """
    half = number // 2
    result = []
    for index, value in enumerate(values):
        reach = min(half, index, len(values) - 1 - index)
        near = [one for one in values[index - reach : index + reach + 1] if math.isfinite(one)]
        result.append(sum(near) / len(near) if math.isfinite(value) else value)
    return result


def size_panel(
    title: str, sizes: Sequence[float], costs: Mapping[str, Sequence[float]], *, x_label: str, y_label: str
) -> Panel:
    """Return a panel of costs by size, both axes logarithmic."""
    curves = tuple(
        Curve(label=name, xs=tuple(sizes), ys=tuple(own), color=number)
        for number, (name, own) in enumerate(costs.items())
    )
    return Panel(title=title, curves=curves, x_label=x_label, y_label=y_label, is_log=True)


def render_panels(panels: Sequence[Panel], title: str, *, columns: int = 3) -> Figure:
    """Return all panels in rows of at most `columns`."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.6 * rows + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels, strict=False):
        _render(axes, panel)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    return figure


def save_panels(path: Path, panels: Sequence[Panel], title: str, *, columns: int = 3) -> None:
    """Write all panels to a PNG file atomically."""
    save_figure(path, render_panels(panels, title, columns=columns))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure to a PNG file atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_bytes(path, buffer.getvalue())


def _render(axes: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        color = COLORS[curve.color % len(COLORS)]
        if curve.smooth > 1:
            axes.plot(curve.xs, curve.ys, color=color, alpha=0.25, linewidth=1)
        means = running_mean(curve.ys, curve.smooth)
        axes.plot(
            curve.xs,
            [value if math.isfinite(value) else math.nan for value in means],
            color=color,
            linestyle="none" if panel.x_names else PATTERNS[curve.pattern % len(PATTERNS)],
            marker="o" if len(curve.xs) <= FEW_POINTS else None,
            markersize=4,
            label=curve.label or None,
        )
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="#e8e8e8")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.x_names:
        axes.set_xticks(range(1, len(panel.x_names) + 1), panel.x_names, rotation=20, ha="right")
        axes.set_xlim(0.5, len(panel.x_names) + 0.5)
    if panel.is_log:
        axes.loglog()
        ticks = sorted({x for curve in panel.curves for x in curve.xs})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        values = [y for curve in panel.curves for y in curve.ys if math.isfinite(y)]
        # Start at zero if that wastes little space, so that heights can be compared.
        if values and 0 <= min(values) < 0.6 * max(values):
            axes.set_ylim(bottom=0.0)
    if any(curve.label for curve in panel.curves):
        axes.legend(fontsize="small", frameon=False)

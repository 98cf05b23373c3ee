"""A figure of the data pipeline: an item of a source, its sample, the packed sequence, the batch.

`tools/show_batch.py` renders it from the data of a config. docs/data.md shows one. Colors of the token strips:

    image blue | question grey | supervised answer green | padding white; a line between samples
"""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pixel_sail.data.images import load_image
from pixel_sail.evaluation.curves import save_figure
from pixel_sail.evaluation.sample_image import render_masks
from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.types import Batch, Sample

KINDS = {"padding": "#ffffff", "image": "#6baed6", "question": "#bdbdbd", "answer (supervised)": "#41ab5d"}
"""Color of every kind of token."""
TURNS_SHOWN = 4
LINE = 80
DPI = 110


def token_kinds(batch: Batch) -> NDArray[np.int64]:
    """Return which of KINDS each token of a batch is: int64 [B, T]."""
    filled = (batch.sample_index_BT >= 0).numpy()
    kinds = np.where(filled, 2, 0)
    kinds[batch.in_image_BT.numpy() | (batch.patch_index_BT >= 0).numpy()] = 1
    rows, positions = batch.logit_positions_M2.numpy().T
    # The position before a token predicts it.
    kinds[rows, positions + 1] = 3
    return kinds


def write_stages(path: Path, sample: Sample, batch: Batch, *, source: str, num_items: int, item: int) -> None:
    """Write the figure as PNG. `sample`: a sample with an image, the first of the batch's first row. `source`: its name
    in the config. `item`: its index among `num_items` items. Raises: DataError for a missing image."""
    assert sample.image_path is not None and sample.image_hw is not None
    image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
    figure = Figure(figsize=(11, 8), dpi=DPI, layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=(3.2, 2.7, 2.1))
    source_axes, sample_axes = rows[0].subplots(1, 2)
    source_axes.imshow(np.asarray(image))
    height, width = sample.image_hw
    _title(
        source_axes,
        f"1. Source {source}: item {item:,} of {num_items:,}",
        f"{sample.image_path.name}, {height} x {width}",
    )
    masks = [mask for turn in sample.turns[:TURNS_SHOWN] for mask in turn.masks]
    sample_axes.imshow(render_masks(image, masks, {prompt.prompt_id: prompt.mask for prompt in sample.prompts}))
    _title(sample_axes, f"2. Sample: {len(sample.turns)} turns, {len(sample.prompts)} visual prompts", _turns(sample))
    strip_axes, mask_axes = rows[1].subplots(1, 2, width_ratios=(2.2, 1))
    kinds = token_kinds(batch)
    _strips(strip_axes, kinds[:1], batch.sample_index_BT[:1].numpy())
    num_samples = len(set(batch.sample_index_BT[0].tolist()) - {-1})
    _title(
        strip_axes, f"3. Packed sequence: {num_samples} samples in {kinds.shape[1]} tokens", "first row of the batch"
    )
    first = slice(0, 1)
    allowed = attention_mask(batch.sample_index_BT[first], batch.branch_ids_BT[first], batch.in_image_BT[first])[0, 0]
    filled = (batch.sample_index_BT[0] >= 0).numpy()
    mask_axes.imshow(allowed.numpy() & filled, cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
    _title(mask_axes, "attention of this sequence", "dark: the query (row) sees the key (column)")
    batch_axes = rows[2].subplots(1, 1)
    _strips(batch_axes, kinds, batch.sample_index_BT.numpy())
    shapes = f"input_ids_BT {list(kinds.shape)}, patches_SK {list(batch.patches_SK.shape)}, {len(batch.masks)} masks"
    _title(batch_axes, f"4. Batch: {kinds.shape[0]} packed sequences", shapes)
    for kind, color in KINDS.items():
        batch_axes.bar(0, 0, color=color, edgecolor="#888888", label=kind)
    batch_axes.legend(ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    save_figure(path, figure)


def _title(axes: Axes, title: str, text: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(text, loc="left", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_anchor("NW")


def _turns(sample: Sample) -> str:
    """Return the first turns as lines of text."""
    lines = [f"Q: {turn.question.strip()}   A: {turn.answer.strip()}" for turn in sample.turns[:TURNS_SHOWN]]
    more = [f"... and {len(sample.turns) - TURNS_SHOWN} more"] if len(sample.turns) > TURNS_SHOWN else []
    return "\n".join(textwrap.shorten(line, LINE) for line in lines + more)


def _strips(axes: Axes, kinds: NDArray[np.int64], owners: NDArray[np.int64]) -> None:
    """Render each row of tokens as a strip, with a line where another sample begins."""
    axes.imshow(
        kinds, cmap=ListedColormap(list(KINDS.values())), vmin=-0.5, vmax=len(KINDS) - 0.5, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    for row, own in enumerate(owners):
        axes.vlines(np.flatnonzero(np.diff(own)) + 0.5, row - 0.5, row + 0.5, color="black", linewidth=1)
        if row:
            axes.axhline(row - 0.5, color="white", linewidth=3)

"""Readable view of a packed batch: tokens as text with supervised ones marked, patches as images.

`tools/show_batch.py` collates the first batch of a config and calls `write_batch_view`. Everything is read from the
`Batch`, so the view shows exactly the model's inputs. One sample, supervised tokens between >> <<:

    refcoco/train/image=581857 (row 0, tokens 0 .. 1236)
    [image 30 x 40 patches]<|im_start|>user
    Segment the lady in blue.<|im_end|>
    >>It is [SEG].<|endoftext|><<
"""

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixel_sail.evaluation.overlay import ImageArray
from pixel_sail.evaluation.report import STYLE
from pixel_sail.evaluation.sample_image import render_masks
from pixel_sail.files import replace_text
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Batch, BoolMask, SizeHW

VIEW_STYLE = """
body { max-width: 80rem } .sample { display: grid; grid-template-columns: 26rem 1fr; gap: 1.2rem; margin: 1.2rem 0 }
.sample img { width: 100% } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
mark { background: #bfe5cf }
.branch { color: #a05a00 } h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
"""


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Consecutive tokens of one kind."""

    text: str
    num_tokens: int
    is_image: bool
    is_supervised: bool
    branch: int
    """0 for the part shared by all questions."""


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One sample of a batch."""

    name: str
    row: int
    first: int
    """Index of its first token in the row."""
    runs: tuple[TokenRun, ...]
    image: ImageArray | None


def view_samples(batch: Batch, processor: PixelSailProcessor) -> list[SampleView]:
    """Return every sample of a batch in order."""
    views = []
    for index, name in enumerate(batch.sample_ids):
        row, tokens = _tokens_of(batch, index)
        views.append(
            SampleView(
                name=name,
                row=row,
                first=int(tokens[0]),
                runs=_runs(batch, processor, row, tokens),
                image=_render_image(batch, index),
            )
        )
    return views


def _tokens_of(batch: Batch, index: int) -> tuple[int, torch.Tensor]:
    """Return row and token numbers of a sample."""
    rows, tokens = (batch.sample_index_BT == index).nonzero(as_tuple=True)
    assert len(rows) and bool((rows == rows[0]).all()), f"sample {index} is in several rows or in none"
    return int(rows[0]), tokens


def _runs(batch: Batch, processor: PixelSailProcessor, row: int, tokens: torch.Tensor) -> tuple[TokenRun, ...]:
    """Return the tokens of a sample, merged by kind."""
    # The position before a token predicts it, so the supervised token is the next one.
    supervised = set((batch.logit_positions_M2[batch.logit_positions_M2[:, 0] == row][:, 1] + 1).tolist())
    image_ids = set(processor.image_ids)
    kinds = [
        (int(batch.input_ids_BT[row, t]) in image_ids, int(t) in supervised, int(batch.branch_ids_BT[row, t]))
        for t in tokens
    ]
    runs = []
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            ids = batch.input_ids_BT[row, tokens[start:end]].tolist()
            is_image, is_supervised, branch = kinds[start]
            text = str(processor.tokenizer.decode(ids, skip_special_tokens=False))
            runs.append(
                TokenRun(
                    text=_image_text(batch, row, tokens) if is_image else text,
                    num_tokens=end - start,
                    is_image=is_image,
                    is_supervised=is_supervised,
                    branch=branch,
                )
            )
            start = end
    return tuple(runs)


def _image_text(batch: Batch, row: int, tokens: torch.Tensor) -> str:
    height, width = batch.grids[batch.image_samples.index(int(batch.sample_index_BT[row, tokens[0]]))]
    painted = sorted(set(batch.prompt_ids_BT[row, tokens].tolist()) - {-1})
    prompts = f", painted {' '.join(f'<Prompt{i}>' for i in painted)}" if painted else ""
    return f"[image {height} x {width} patches{prompts}]"


def _render_image(batch: Batch, index: int) -> ImageArray | None:
    """Return the pixels of the model's input, with masks and the patches of prompts."""
    if index not in batch.image_samples:
        return None
    image = batch.image_samples.index(index)
    grid = batch.grids[image]
    first = sum(h * w for h, w in batch.grids[:image])
    pixels = patches_to_pixels(batch.patches_SK[first : first + grid[0] * grid[1]], grid)
    size_hw = (pixels.shape[0], pixels.shape[1])
    begin = sum(batch.masks_per_image[:image])
    here = range(begin, begin + batch.masks_per_image[image])
    masks = [_resize(batch.masks[number].numpy(), size_hw) for number in here]
    ignored = [_resize(mask.numpy(), size_hw) for number in here if (mask := batch.ignored[number]) is not None]
    row, tokens = _tokens_of(batch, index)
    ids = batch.prompt_ids_BT[row, tokens[batch.patch_index_BT[row, tokens] >= 0]].numpy().reshape(grid)
    cell = size_hw[0] // grid[0]
    prompts = {int(i): (ids == i).repeat(cell, axis=0).repeat(cell, axis=1) for i in np.unique(ids) if i >= 0}
    return render_masks(Image.fromarray(pixels), masks, prompts, ignored)


def patches_to_pixels(patches_PK: torch.Tensor, grid_hw: SizeHW) -> ImageArray:
    """Return the image [H, W, 3] of patches made by `image_to_patches`."""
    side = round((patches_PK.shape[1] / 3) ** 0.5)
    tiles = patches_PK.view(*grid_hw, 3, side, side).permute(0, 3, 1, 4, 2)
    pixels: ImageArray = tiles.reshape(grid_hw[0] * side, grid_hw[1] * side, 3).numpy()
    return pixels


def _resize(mask: BoolMask, size_hw: SizeHW) -> BoolMask:
    """Return a mask at the size the image was resized to."""
    rows = (np.arange(size_hw[0]) + 0.5) * mask.shape[0] / size_hw[0]
    columns = (np.arange(size_hw[1]) + 0.5) * mask.shape[1] / size_hw[1]
    return mask[rows.astype(int)[:, None], columns.astype(int)[None]]


def batch_facts(batch: Batch) -> list[str]:
    """Return the statistics of a batch."""
    num_filled, num_slots = int((batch.sample_index_BT >= 0).sum()), batch.sample_index_BT.numel()
    return [
        f"{batch.input_ids_BT.shape[0]} rows of {batch.input_ids_BT.shape[1]} tokens, {num_filled} of {num_slots} "
        f"({100 * num_filled / num_slots:.1f} %) filled",
        f"{len(batch.sample_ids)} samples of {', '.join(sorted(set(batch.sources)))}",
        f"{len(batch.grids)} images with {len(batch.patches_SK)} patches, {len(batch.masks)} masks",
        f"{len(batch.targets_M)} supervised tokens",
    ]


def text_view(batch: Batch, views: list[SampleView]) -> str:
    """Return the batch as plain text, supervised tokens between >> and <<."""
    lines = batch_facts(batch)
    for view in views:
        num_tokens = sum(run.num_tokens for run in view.runs)
        lines += ["", f"{view.name} (row {view.row}, tokens {view.first} .. {view.first + num_tokens - 1})"]
        lines.append("".join(f">>{run.text}<<\n" if run.is_supervised else run.text for run in view.runs).rstrip())
    return "\n".join(lines) + "\n"


def write_batch_view(folder: Path, batch: Batch, processor: PixelSailProcessor) -> list[SampleView]:
    """Write index.html, batch.txt and one PNG per image into a folder; return the samples."""
    views = view_samples(batch, processor)
    replace_text(folder / "batch.txt", text_view(batch, views))
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>First batch</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}{VIEW_STYLE}</style><h1>First batch</h1>",
        "<ul>",
        *(f"<li>{html.escape(fact)}</li>" for fact in batch_facts(batch)),
        "</ul><p><mark>Marked</mark> tokens are supervised. Numbers on the image count its different masks, P names "
        "the patches that carry a prompt, grey pixels do not count.</p>",
    ]
    for number, view in enumerate(views):
        image = ""
        if view.image is not None:
            name = f"sample_{number:03d}.png"
            Image.fromarray(view.image).save(folder / name)
            image = f'<img alt="{html.escape(view.name)}" src="{name}">'
        heading = f"<h3>row {view.row}: {html.escape(view.name)}</h3>"
        page.append(f"<div class=sample><div>{image}</div><div>{heading}<pre>{_html_runs(view)}</pre></div></div>")
    replace_text(folder / "index.html", "\n".join([*page, "</html>"]) + "\n")
    return views


def _html_runs(view: SampleView) -> str:
    parts = []
    for before, run in zip((None, *view.runs), view.runs, strict=False):
        if before is not None and run.branch not in (before.branch, 0) and before.branch != 0:
            parts.append("<span class=branch>--- does not see the question before ---</span>\n")
        text = html.escape(run.text)
        parts.append(f"<mark>{text}</mark>\n" if run.is_supervised else f"<span class=dim>{text}</span>" if run.is_image
                     else text)  # fmt: skip
    return "".join(parts)

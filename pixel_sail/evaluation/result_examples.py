"""Example images of items with their answers: selection and rendering.

Every task makes a `ResultExample` from an item and its record. `run.py` selects the best, median and worst ones
(`ranked`), `report.py` adds them to the page and `sheet` to one PNG. One of referring segmentation:

    image | predicted mask | true mask | best: "the small striped circle" (IoU 0.87, answer: It is [SEG].)
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation.overlay import PREDICTED_COLOR, TRUE_COLOR, ImageArray, tint_mask
from pixel_sail.evaluation.predictions import prediction_key, score_prediction
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.types import RLE, Expression, Prediction

Item = TypeVar("Item")

Color = tuple[int, int, int]

ColoredMasks = tuple[tuple[RLE, Color], ...]
"""Masks painted on one copy of the image, with their colors."""

RANKS = ("best", "median", "worst")

_FONT_PX = 18


@dataclass(frozen=True, kw_only=True)
class ResultExample:
    """One item with its answer, ready to be rendered."""

    text: str
    """The question."""
    answer: str
    source_image: SourceImage
    panels: tuple[ColoredMasks, ...]
    """Rendered to the right of the plain image."""
    expected: str = ""
    """Expected answer, for text tasks."""
    iou: float | None = None
    rank: str = ""
    """One of RANKS within its benchmark; "" if it was not selected by score."""

    def image(self) -> ImageArray:
        """Return the image and its panels side by side [H, W of all + gaps, 3]."""
        image = self.source_image.open(str(self.source_image.path))
        gap = np.full((image.height, 4, 3), 255, dtype=np.uint8)
        parts = [np.asarray(image)]
        for panel in self.panels:
            painted: ImageArray = np.asarray(image)
            for rle, color in panel:
                painted = tint_mask(painted, decode_rle(rle), color)
            parts += [gap, painted]
        return np.concatenate(parts, axis=1)

    def remarks(self) -> str:
        """Return the text next to the question."""
        iou = [] if self.iou is None else [f"IoU {self.iou:.2f}"]
        expected = [f"expected: {self.expected}"] if self.expected else []
        return ", ".join([*iou, f"answer: {self.answer}", *expected])


def expression_example(item: Expression, prediction: Prediction, *, is_upright: bool = False) -> ResultExample:
    """Return an expression with its predicted and target mask."""
    masks = ((prediction.segmentation, PREDICTED_COLOR), (item.target, TRUE_COLOR))
    return ResultExample(
        text=item.text,
        answer=prediction.answer,
        source_image=SourceImage(path=item.image_path, size_hw=item.image_hw, is_upright=is_upright),
        panels=tuple(() if rle is None else ((rle, color),) for rle, color in masks),
        iou=score_prediction(item, prediction).iou_sum,
    )


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return `number` evenly spaced items, independent of their scores."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(number, len(items)))]


def spread_examples(items: Sequence[Expression], predictions: Sequence[Prediction], number: int) -> list[ResultExample]:
    """Return `number` evenly spaced expressions of the split with their predictions."""
    by_id = {prediction_key(prediction): prediction for prediction in predictions}
    return [expression_example(item, by_id[prediction_key(item)]) for item in spread(items, number)]


def ranked(values: NDArray[np.float64], images: Sequence[Hashable], number: int) -> list[tuple[str, int]]:
    """Return the selected items and their rank: a third each best, nearest to the median, and worst, without repeats.

    Items of one rank are about different images if possible.
    values: one score per item, higher is better, ties in order. images: the image of each item.
    """
    order = np.argsort(-values, kind="stable").tolist()
    number = min(number, len(order))
    from_middle = sorted(range(len(order)), key=lambda place: abs(2 * place - len(order) + 1))
    ranks = {
        "best": (order, (number + 2) // 3),
        "worst": (order[::-1], (number + 1) // 3),
        "median": ([order[place] for place in from_middle], number // 3),
    }
    taken: set[int] = set()
    chosen: dict[str, list[int]] = {}
    for rank, (candidates, share) in ranks.items():
        free = [index for index in candidates if index not in taken]
        first_of_image: dict[Hashable, int] = {}
        for index in free:
            first_of_image.setdefault(images[index], index)
        chosen[rank] = list(dict.fromkeys([*first_of_image.values(), *free]))[:share]
        taken.update(chosen[rank])
    return [(rank, index) for rank in RANKS for index in chosen[rank]]


def sheet(rows: Sequence[Sequence[ResultExample]], width: int) -> ImageArray:
    """Return the images of several examples in rows, each `width` pixels wide and captioned with its expression."""
    sampled = [[_cell(example, width) for example in row] for row in rows]
    heights = [max(cell.shape[0] for cell in row) for row in sampled]
    page = np.full((sum(heights), max(map(len, rows)) * (width + 16), 3), 255, dtype=np.uint8)
    for index, row in enumerate(sampled):
        top = sum(heights[:index])
        for column, pixels in enumerate(row):
            left = column * (width + 16)
            page[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return page


def _cell(example: ResultExample, width: int) -> ImageArray:
    """Return one captioned image."""
    image = Image.fromarray(example.image())
    image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.NEAREST)
    cell = Image.new("RGB", (width + 16, image.height + 44), "white")
    cell.paste(image, (8, 34))
    ImageDraw.Draw(cell).text((8, 8), _caption(example, width), fill="black", font=ImageFont.load_default(_FONT_PX))
    return np.asarray(cell)


def _caption(example: ResultExample, width: int) -> str:
    """Return a one-line caption: rank, question, IoU."""
    before = f"{example.rank}: " if example.rank else ""
    after = "" if example.iou is None else f"   IoU {example.iou:.2f}"
    text = " ".join(example.text.split())
    font = ImageFont.load_default(_FONT_PX)
    shown = text
    while shown and font.getlength(f'{before}"{shown}"{after}') > width:
        shown = shown[:-4].rstrip() + "..." if len(shown) > 4 else ""
    return f'{before}"{shown}"{after}'

"""The report of a run: scores as tables, the loss curve, and pictures of what was asked, predicted and true.

Place in the flow: `run.py` and the quickstart call `write_report` after scoring. It writes `report.md`, `report.html`
(one file, pictures inside) and `examples/*.png` into the run folder. Every task makes `Case`s of its items; one of
referring segmentation shows

    image | predicted mask | true mask | "the small striped circle" (IoU 0.87, answer: It is [SEG].)
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation.overlay import PREDICTED_COLOR, TRUE_COLOR, Picture, paint
from pixel_sail.evaluation.photos import Photo
from pixel_sail.evaluation.predictions import prediction_key, score_prediction
from pixel_sail.files import replace_text
from pixel_sail.types import RLE, Expression, Prediction

Scores = Mapping[str, float | int]
Item = TypeVar("Item")

COLUMNS = ("ciou", "giou", "p50", "p70", "p90", "n_acc", "t_acc")
"""Scores that stand first in a table; other ones follow, but for these."""
LAST_COLUMNS = ("count", "missing")
HIDDEN_COLUMNS = ("p60", "p80", *(f"{prefix}bleu{order}" for prefix in ("", "paper_") for order in (1, 2, 3)))

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem } figure img { width: 100%;
image-rendering: pixelated } figcaption { font-size: .9rem } .dim { color: #666 } svg { max-width: 100% }
"""


Color = tuple[int, int, int]

Panel = tuple[tuple[RLE, Color], ...]
"""Masks painted on one copy of the image, with their colours."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One item with what was answered, ready to be shown."""

    text: str
    """What was asked."""
    answer: str
    photo: Photo
    panels: tuple[Panel, ...]
    """Shown right of the plain image."""
    expected: str = ""
    """Where the answer is text, what it should have been."""
    iou: float | None = None

    def picture(self) -> Picture:
        """Return the image and its panels side by side [H, W of all + gaps, 3]."""
        image = self.photo.open(str(self.photo.path))
        gap = np.full((image.height, 4, 3), 255, dtype=np.uint8)
        parts = [np.asarray(image)]
        for panel in self.panels:
            painted: Picture = np.asarray(image)
            for rle, color in panel:
                painted = paint(painted, decode_rle(rle), color)
            parts += [gap, painted]
        return np.concatenate(parts, axis=1)

    def remarks(self) -> str:
        """Return what stands beside the question."""
        iou = [] if self.iou is None else [f"IoU {self.iou:.2f}"]
        expected = [f"expected: {self.expected}"] if self.expected else []
        return ", ".join([*iou, f"answer: {self.answer}", *expected])


def expression_case(item: Expression, prediction: Prediction, *, is_upright: bool = False) -> Case:
    """Return an expression with its predicted and its true mask."""
    masks = ((prediction.segmentation, PREDICTED_COLOR), (item.target, TRUE_COLOR))
    return Case(
        text=item.text,
        answer=prediction.answer,
        photo=Photo(path=item.image_path, size_hw=item.image_hw, is_upright=is_upright),
        panels=tuple(() if rle is None else ((rle, color),) for rle, color in masks),
        iou=score_prediction(item, prediction).iou_sum,
    )


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return `number` items at even distances, good and bad as they come."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(number, len(items)))]


def spread_cases(items: Sequence[Expression], predictions: Sequence[Prediction], number: int) -> list[Case]:
    """Return `number` expressions at even distances over the split with their predictions."""
    by_id = {prediction_key(prediction): prediction for prediction in predictions}
    return [expression_case(item, by_id[prediction_key(item)]) for item in spread(items, number)]


def write_report(
    folder: Path,
    *,
    title: str,
    facts: Sequence[str],
    tables: Mapping[str, Mapping[str, Scores]],
    cases: Mapping[str, Sequence[Case]],
    log_file: Path | None = None,
) -> None:
    """Write report.md, report.html and examples/ into `folder`; `tables` is {heading: {row: scores}}."""
    text, page = [f"# {title}", ""], [f"<h1>{html.escape(title)}</h1>"]
    text += [f"- {fact}" for fact in facts]
    page += ["<ul>", *[f"<li>{html.escape(fact)}</li>" for fact in facts], "</ul>"]
    for heading, rows in tables.items():
        text += ["", f"## {heading}", "", *_markdown_table(rows)]
        page += [f"<h2>{html.escape(heading)}</h2>", *_html_table(rows)]
    if log_file is not None:
        page += ["<h2>Training loss</h2>", loss_curve(log_file)]
    for heading, shown in cases.items():
        title_of_cases = f"Examples from {heading}{_legend(shown)}"
        text += ["", f"## {title_of_cases}", ""]
        page += [f"<h2>{html.escape(title_of_cases)}</h2>", "<div class=grid>"]
        for index, case in enumerate(shown):
            name = f"examples/{heading}_{index:02d}.png"
            data = _save_png(folder / name, case.picture())
            caption = f"{case.text} ({case.remarks()})".replace("\n", " ")
            text += [f"**{caption}**", "", f"![{heading} {index}]({name})", ""]
            page.append(_figure(case, data))
        page.append("</div>")
    masks = [case for shown in cases.values() for case in shown[:2] if case.iou is not None]
    if masks:
        _save_png(folder / "montage.png", montage(masks))
    replace_text(folder / "report.md", "\n".join(text) + "\n")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    replace_text(folder / "report.html", "\n".join([head, view, f"<style>{STYLE}</style>", *page, "</html>"]) + "\n")


def montage(cases: Sequence[Case], columns: int = 2, width: int = 640) -> Picture:
    """Return the pictures of several cases in a grid, each enlarged to `width` and captioned with its expression."""
    cells = []
    for case in cases:
        picture = Image.fromarray(case.picture())
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.NEAREST)
        cell = Image.new("RGB", (width + 16, picture.height + 44), "white")
        cell.paste(picture, (8, 34))
        caption = f'"{case.text}"   IoU {case.iou:.2f}'
        ImageDraw.Draw(cell).text((8, 8), caption, fill="black", font=ImageFont.load_default(18))
        cells.append(np.asarray(cell))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    height = [max(cell.shape[0] for cell in row) for row in rows]
    page = np.full((sum(height), columns * (width + 16), 3), 255, dtype=np.uint8)
    for index, row in enumerate(rows):
        top = sum(height[:index])
        for column, pixels in enumerate(row):
            left = column * (width + 16)
            page[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return page


def _legend(cases: Sequence[Case]) -> str:
    """Return what the panels show."""
    is_masks = any(case.iou is not None for case in cases)
    return ": image, predicted mask, true mask" if is_masks else ": image, marked or predicted, true where there is one"


def _figure(case: Case, png: bytes) -> str:
    """Return one picture with its caption as HTML."""
    source = base64.b64encode(png).decode()
    caption = f'"{html.escape(case.text)}" <span class=dim>{html.escape(case.remarks())}</span>'
    image = f'<img alt="{html.escape(case.text)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _save_png(path: Path, picture: Picture) -> bytes:
    """Write a picture and return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _cell(value: float | int | None) -> str:
    """Return a number for a table."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _columns(rows: Mapping[str, Scores]) -> list[str]:
    """Return the scores that any row has, the usual ones first."""
    found = dict.fromkeys(name for scores in rows.values() for name in scores)
    others = [name for name in found if name not in (*COLUMNS, *LAST_COLUMNS, *HIDDEN_COLUMNS)]
    return [name for name in (*COLUMNS, *others, *LAST_COLUMNS) if name in found]


def _markdown_table(rows: Mapping[str, Scores]) -> list[str]:
    """Return rows of scores as a Markdown table."""
    columns = _columns(rows)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return lines + [
        f"| {name} | " + " | ".join(_cell(scores.get(column)) for column in columns) + " |"
        for name, scores in rows.items()
    ]


def _html_table(rows: Mapping[str, Scores]) -> list[str]:
    """Return rows of scores as an HTML table."""
    columns = _columns(rows)
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = [
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_cell(scores.get(column))}</td>" for column in columns)
        + "</tr>"
        for name, scores in rows.items()
    ]
    return ["<table>", f"<tr><th></th>{head}</tr>", *body, "</table>"]


def loss_curve(log_file: Path, width: int = 720, height: int = 200) -> str:
    """Return the total loss over steps of a log.jsonl as an SVG drawing."""
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    points = [(line["step"], line["total"]) for line in lines if "total" in line]
    if len(points) < 2:
        return "<p class=dim>fewer than two logged steps</p>"
    steps, losses = np.array(points).T
    left, bottom, top = 48, height - 28, 10
    x = left + (steps - steps[0]) / (steps[-1] - steps[0]) * (width - left - 10)
    highest = losses.max()
    y = bottom - losses / highest * (bottom - top)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="training loss over steps">'
        f'<line x1="{left}" y1="{bottom}" x2="{width - 10}" y2="{bottom}" stroke="#888"/>'
        f'<line x1="{left}" y1="{top}" x2="{left}" y2="{bottom}" stroke="#888"/>'
        f'<polyline fill="none" stroke="#0072b2" stroke-width="2" points="{line}"/>'
        f'<text x="{left - 6}" y="{top + 6}" font-size="12" text-anchor="end">{highest:.2f}</text>'
        f'<text x="{left - 6}" y="{bottom}" font-size="12" text-anchor="end">0</text>'
        f'<text x="{width - 10}" y="{height - 8}" font-size="12" text-anchor="end">step {int(steps[-1])}</text></svg>'
    )

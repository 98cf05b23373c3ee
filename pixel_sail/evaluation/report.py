"""The report of an evaluation: score tables, the loss curve, and example images with prediction and ground truth.

`run.py` and the quickstart call `write_html_report` after scoring. It writes to the run folder

    report.md, report.html     facts, tables, images; the HTML file embeds its images
    examples/<eval>_00.png     one image each
    sheets/<eval>.png          all images of an eval that has masks: its best, median and worst ones
    montage.png                two of each eval with masks

The images are `ResultExample`s of `result_examples.py`, the tables come from `tables.py` and `paper_tables.py`.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from pixel_sail.evaluation.overlay import ImageArray
from pixel_sail.evaluation.result_examples import ResultExample, sheet
from pixel_sail.evaluation.tables import Table
from pixel_sail.files import read_json_lines, replace_bytes, replace_text
from pixel_sail.renamed import current_log_line
from pixel_sail.types import DataError

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse } th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; white-space: nowrap } .own td { font-weight: 600 }
.wide { overflow-x: auto; font-size: .82rem }
h3 { font-size: 1rem; margin-bottom: .4rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .6rem } figure img { width: 100%;
image-rendering: pixelated } figcaption { font-size: .9rem } .dim { color: #666 } svg { max-width: 100% }
"""


def write_html_report(
    folder: Path,
    *,
    title: str,
    facts: Sequence[str],
    tables: Sequence[Table],
    examples: Mapping[str, Sequence[ResultExample]],
    log_file: Path | None = None,
) -> None:
    """Write report.md, report.html and their images to `folder`. `examples`: by eval, sorted by rank."""
    text, page = [f"# {title}", ""], [f"<h1>{html.escape(title)}</h1>"]
    text += [f"- {fact}" for fact in facts]
    page += ["<ul>", *[f"<li>{html.escape(fact)}</li>" for fact in facts], "</ul>"]
    for table in tables:
        text += ["", *table.markdown()]
        page += table.html()
    if log_file is not None:
        page += ["<h2>Training loss</h2>", loss_curve(log_file)]
    for heading, shown in examples.items():
        markdown, figures = _figures(folder, heading, shown)
        text += markdown
        page += figures
    masks = [example for shown in examples.values() for example in shown[:2] if example.iou is not None]
    if masks:
        _save_png(folder / "montage.png", sheet([masks[i : i + 2] for i in range(0, len(masks), 2)], 640))
    replace_text(folder / "report.md", "\n".join(text) + "\n")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    replace_text(folder / "report.html", "\n".join([head, view, f"<style>{STYLE}</style>", *page, "</html>"]) + "\n")


def _figures(folder: Path, heading: str, examples: Sequence[ResultExample]) -> tuple[list[str], list[str]]:
    """Write the images of one eval and return its Markdown and HTML."""
    title = f"Examples from {heading}{_legend(examples)}"
    text, page = ["", f"## {title}", ""], [f"<h2>{html.escape(title)}</h2>"]
    numbered = enumerate(examples)
    for rank, group in groupby(numbered, key=lambda pair: pair[1].rank):
        if rank:
            text += [f"### {rank.capitalize()}", ""]
            page.append(f"<h3>{rank.capitalize()}</h3>")
        page.append("<div class=grid>")
        for index, example in group:
            name = f"examples/{heading}_{index:02d}.png"
            data = _save_png(folder / name, example.image())
            caption = f"{example.text} ({example.remarks()})".replace("\n", " ")
            text += [f"**{caption}**", "", f"![{heading} {index}]({name})", ""]
            page.append(_figure(example, data))
        page.append("</div>")
    if examples and examples[0].rank:
        rows = [list(group) for _, group in groupby(examples, key=lambda example: example.rank)]
        _save_png(folder / "sheets" / f"{heading}.png", sheet(rows, 480))
    return text, page


def _legend(examples: Sequence[ResultExample]) -> str:
    """Return the legend of the panels."""
    is_masks = any(example.iou is not None for example in examples)
    return ": image, predicted mask, true mask" if is_masks else ": image, marked or predicted, true where there is one"


def _figure(example: ResultExample, png: bytes) -> str:
    """Return one image with its caption as HTML."""
    source = base64.b64encode(png).decode()
    caption = f'"{html.escape(example.text)}" <span class=dim>{html.escape(example.remarks())}</span>'
    image = f'<img alt="{html.escape(example.text)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _save_png(path: Path, image: ImageArray) -> bytes:
    """Write an image and return its bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    replace_bytes(path, buffer.getvalue())
    return buffer.getvalue()


def loss_curve(log_file: Path, width: int = 720, height: int = 200) -> str:
    """Return the total loss over steps of a log.jsonl as an SVG figure."""
    remedy = "correct or delete that line"
    lines = map(current_log_line, read_json_lines(log_file, {"step": int}, fail=DataError, remedy=remedy))
    points = [(line["step"], line["loss/total"]) for line in lines if "loss/total" in line]
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

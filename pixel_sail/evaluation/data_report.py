"""The HTML report of the data check: tables, findings, and rendered samples.

`tools/check_data.py` calls `write_data_report` with the result of `data_check.py`. For each source it shows images with
numbered masks and prompts, above their questions and answers.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.data.checking.findings import SourceReport
from pixel_sail.data.checking.report import (
    FILE_COLUMNS,
    REPORT_COLUMNS,
    SPLIT_COLUMNS,
    file_rows,
    report_verdict,
    shown_findings,
    source_row,
    split_rows,
)
from pixel_sail.data.images import load_image
from pixel_sail.evaluation.data_check import CheckResult
from pixel_sail.evaluation.report import STYLE
from pixel_sail.evaluation.sample_image import color_of, jpeg_source, mask_numbers, render_masks
from pixel_sail.files import replace_text
from pixel_sail.model.tokenization import SEG_TOKEN
from pixel_sail.types import Sample

SHEET_STYLE = """
body { max-width: 80rem } td, th { font-size: .9rem } .wide { overflow-x: auto } .bad { color: #a00 }
.good { color: #075 } .chip { border-radius: 3px; padding: 0 .35em; color: #000; font-weight: 600 }
figure img { image-rendering: auto } figcaption p { margin: .35rem 0 } li { overflow-wrap: anywhere }
.grid { grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)) }
"""


def write_data_report(path: Path, result: CheckResult) -> None:
    """Write the HTML report."""
    bad = any(report.num_troubles for report in result.reports)
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Data check</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}{SHEET_STYLE}</style><h1>Data check</h1>",
        f"<p class={'bad' if bad else 'good'}>{html.escape(report_verdict(result.reports))}</p>",
        *_table(REPORT_COLUMNS, [source_row(report) for report in result.reports]),
        "<p class=dim>images, masks: sound of those that were decoded; empty: masks without a pixel; text chars: "
        "shortest, median and longest text</p>",
    ]
    if rows := split_rows(result.reports):
        page += ["<h2>Splits</h2>", *_table(SPLIT_COLUMNS, rows)]
        page += [f"<p class=dim>{html.escape(text)}</p>" for text in _origins(result.reports)]
    page += [line for report in result.reports for line in _findings(report)]
    for name, samples in result.samples.items():
        if samples:
            page += [f"<h2>Samples of {html.escape(name)}</h2>", "<div class=grid>"]
            page += [sample_figure(sample) for sample in samples]
            page.append("</div>")
    if rows := file_rows(result.reports):
        page += ["<h2>Files</h2>", *_table(FILE_COLUMNS, rows)]
    replace_text(path, "\n".join([*page, "</html>"]) + "\n")


def sample_figure(sample: Sample) -> str:
    """Return one sample as HTML: its image and texts."""
    masks = [mask for turn in sample.turns for mask in turn.masks]
    figure = ""
    if sample.image_path is not None:
        image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        prompts = {prompt.prompt_id: prompt.mask for prompt in sample.prompts}
        ignored = [turn.ignored for turn in sample.turns if turn.ignored is not None]
        rendered = render_masks(image, masks, prompts, ignored)
        figure = f'<img alt="{len(masks)} masks, {len(sample.prompts)} prompts" src="{jpeg_source(rendered)}">'
    numbers = iter(mask_numbers(masks))
    lines = []
    for turn in sample.turns:
        answer = html.escape(turn.answer)
        for _ in turn.masks:
            answer = answer.replace(SEG_TOKEN, mask_chip(next(numbers)), 1)
        lines.append(f"<p><b>{html.escape(turn.question)}</b><br>{answer}</p>")
    caption = f"<span class=dim>{html.escape(sample.sample_id)}</span>{''.join(lines)}"
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"


def mask_chip(number: int) -> str:
    """Return the HTML for a [SEG] in a text: its number on the color of its mask."""
    red, green, blue = color_of(number)
    # Not SEG_TOKEN itself, which the next replacement would match.
    return f'<span class=chip style="background:rgb({red},{green},{blue})">SEG {number + 1}</span>'


def _findings(report: SourceReport) -> list[str]:
    lines = [f"<h2>{html.escape(report.name)}</h2>", f"<p class=dim>{html.escape(report.reads)}</p>"]
    if not report.findings:
        return [*lines, "<p class=good>nothing wrong found</p>"]
    for heading, shown, num_more in shown_findings(report.findings):
        items = [f"<li>{html.escape(finding.subject)}: {html.escape(finding.message)}</li>" for finding in shown]
        more = f"<li>... and {num_more} more in report.json</li>" if num_more else ""
        name = "bad" if heading.startswith("TROUBLE") else "dim"
        lines += [f"<p class={name}>{html.escape(heading)}</p>", "<ul>", *items, more, "</ul>"]
    return lines + [f"<p>To download: {html.escape(text)}</p>" for text in report.to_download]


def _origins(reports: Sequence[SourceReport]) -> list[str]:
    """Return the origins of the published sizes, each split once."""
    origins = {f"published size of {count.file} {count.split}: {count.origin}" for report in reports
               for count in report.splits if count.origin}  # fmt: skip
    return sorted(origins)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return ["<div class=wide><table>", f"<tr>{head}</tr>", *body, "</table></div>"]

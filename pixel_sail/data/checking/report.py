"""Formats the result of a data check as text and JSON.

`tools/check_data.py` prints `text_report` and writes `json_report`; `evaluation/data_report.py` renders the same tables
as HTML. The first lines of a report:

    source   items  images  masks  empty  text chars  ms/item  trouble  notes
    refcoco  16994  199/200  200/200     0     1/17/113      8.1        1      0
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from pixel_sail.data.checking.findings import Finding, SourceReport, SplitCount

SHOWN_PER_KIND = 20
"""Maximum findings shown per kind and source; the JSON report has all of them."""

REPORT_COLUMNS = ("source", "items", "images", "masks", "empty", "text chars", "ms/item", "trouble", "notes")
SPLIT_COLUMNS = (
    "file",
    "split",
    "images",
    "refs",
    "sentences",
    "no target",
    "several",
    "published (images refs sentences)",
)
FILE_COLUMNS = ("source", "file", "MB", "sha256")


def source_row(report: SourceReport) -> tuple[str, ...]:
    """Return the cells of SOURCE_COLUMNS."""
    return (
        report.name,
        "-" if report.items is None else str(report.items),
        str(report.images),
        str(report.masks),
        str(report.empty_masks),
        "-" if report.texts is None else str(report.texts),
        "-" if report.milliseconds is None else f"{report.milliseconds:.1f}",
        str(report.num_troubles),
        str(report.num_notes),
    )


def split_row(count: SplitCount) -> tuple[str, ...]:
    """Return the cells of SPLIT_COLUMNS."""
    known = (count.known_images, count.known_refs, count.known_sentences)
    published = " ".join("?" if number is None else str(number) for number in known) if count.origin else "-"
    numbers = (count.images, count.refs, count.sentences, count.refs_without_target, count.refs_with_several)
    return (count.file, count.split, *(str(number) for number in numbers), published)


def split_rows(reports: Sequence[SourceReport]) -> list[tuple[str, ...]]:
    """Return the rows of all splits, each file once."""
    rows = {split_row(count): None for report in reports for count in report.splits}
    return list(rows)


def file_rows(reports: Sequence[SourceReport]) -> list[tuple[str, ...]]:
    """Return the cells of FILE_COLUMNS for all files."""
    return [(report.name, fact.path, f"{fact.num_bytes / 1e6:.2f}", fact.sha256) for report in reports
            for fact in report.files]  # fmt: skip


def shown_findings(findings: Sequence[Finding]) -> list[tuple[str, list[Finding], int]]:
    """Return (kind, its first findings, number of further ones)."""
    groups = []
    for (is_trouble, kind), members in groupby(findings, key=lambda finding: (finding.is_trouble, finding.kind)):
        group = list(members)
        heading = f"{'TROUBLE' if is_trouble else 'note'}: {kind} ({len(group)})"
        groups.append((heading, group[:SHOWN_PER_KIND], max(0, len(group) - SHOWN_PER_KIND)))
    return groups


def text_report(reports: Sequence[SourceReport]) -> str:
    """Return the report for the terminal."""
    lines = _table(REPORT_COLUMNS, [source_row(report) for report in reports])
    if splits := split_rows(reports):
        lines += ["", *_table(SPLIT_COLUMNS, splits)]
    if files := file_rows(reports):
        lines += ["", *_table(FILE_COLUMNS, [(*row[:3], row[3][:16]) for row in files])]
    for report in reports:
        if report.findings:
            lines += ["", f"{report.name}: {report.reads}"]
        for heading, shown, num_more in shown_findings(report.findings):
            lines.append(f"  {heading}")
            lines += [f"    {finding.subject}: {finding.message}" for finding in shown]
            lines += [f"    ... and {num_more} more in report.json"] if num_more else []
    if advice := list(dict.fromkeys(text for report in reports for text in report.to_download)):
        lines += ["", "What to download:"]
        lines += [textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="    ") for text in advice]
    return "\n".join([*lines, "", report_verdict(reports)])


def report_verdict(reports: Sequence[SourceReport]) -> str:
    """Return the last line."""
    num_troubles = sum(report.num_troubles for report in reports)
    result = "sound" if num_troubles == 0 else _plural(num_troubles, "trouble")
    num_notes = sum(report.num_notes for report in reports)
    return f"{_plural(len(reports), 'source')} checked: {result}, {_plural(num_notes, 'note')}"


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def json_report(reports: Sequence[SourceReport], *, settings: dict[str, object]) -> str:
    """Return the complete report."""
    content = [asdict(report) | {"troubles": report.num_troubles, "notes": report.num_notes} for report in reports]
    return json.dumps({"settings": settings, "verdict": report_verdict(reports), "sources": content}, indent=1) + "\n"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a table of aligned columns, numbers right-aligned."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    numeric = [all(not row[i] or row[i][0] in "-?0123456789" for row in rows) for i in range(len(columns))]
    lines = []
    for row in (tuple(columns), *rows):
        cells = [cell.rjust(width) if right else cell.ljust(width)
                 for cell, width, right in zip(row, widths, numeric, strict=True)]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]

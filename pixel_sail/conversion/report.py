"""The report of a conversion: what happened to every key.

`convert` writes it to the new folder and the tool prints a summary:

    {"layout": "qwen2", ..., "entries": [{"source": "model.norm.weight", "target": "decoder.norm.weight",
     "shape": [896], "dtype": "bfloat16", "note": "copied", "sha256": "9f.."}, ...]}
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixel_sail.conversion.plan import COPIED, ConversionPlan

REPORT = "conversion.json"


def write_conversion_report(
    folder: Path, plan: ConversionPlan, hashes: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Write the report of a conversion."""
    entries = [entry.as_dict(hashes) for entry in plan.entries]
    (folder / REPORT).write_text(json.dumps({**facts, "entries": entries}, indent=1))


def conversion_summary(plan: ConversionPlan) -> list[str]:
    """Return the printed summary: one line per note, with the keys unless they were copied."""
    counts = Counter(entry.note for entry in plan.entries)
    lines = []
    for note, count in counts.items():
        own = [entry.source or entry.target or "" for entry in plan.entries if entry.note == note]
        shown = "" if note == COPIED else f": {', '.join(own[:3])}{' ..' if count > 3 else ''}"
        lines.append(f"{count:5d} {note}{shown}")
    return lines

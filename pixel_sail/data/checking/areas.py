"""Compares the areas stated by a COCO file with the pixels of its masks.

`instances.py` adds every decoded mask; one note reports how many differ. Example: a square with a square hole, written
as two polygons, is filled (COCO unites polygons) and has 1600 pixels where `area` is 1200.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixel_sail.data.checking.findings import FindingKind, Findings
from pixel_sail.data.remarks import AREA_TOLERANCE, areas_differ

MAX_LISTED = 3


@dataclass(kw_only=True)
class AreaCheck:
    """Counts masks as they are decoded."""

    checked: int = 0
    differing: list[str] = field(default_factory=list)

    def add(self, num_pixels: int, row: dict[str, Any], where: str) -> None:
        """Compare a mask with the area stated by its record, if any."""
        stated = row.get("area")
        if not isinstance(stated, int | float):
            return
        self.checked += 1
        if areas_differ(num_pixels, stated):
            self.differing.append(f"{where.rpartition(': ')[2]}: {num_pixels} pixels, stated {stated:g}")

    def report(self, path: Path, findings: Findings) -> None:
        """Add one note if any mask differs."""
        if not self.differing:
            return
        found = f"found {len(self.differing)} of {self.checked} masks whose pixels differ from the stated area by more "
        examples = "; ".join(self.differing[:MAX_LISTED])
        findings.note(
            FindingKind.AREA,
            path,
            f"{found}than {AREA_TOLERANCE:.0%} ({examples}); holes that are written as polygons are filled, or the "
            "coordinates are of another scale",
        )

"""List the licences of the pinned packages, as stated in their metadata.

Run it after a change of requirements/, in the environment created by `make setup`. It rewrites the table of
docs/licences.md. One row:

    | torch | 2.13.0 | BSD-3-Clause | cpu |

Packages that are pinned but not installed (those of another platform or of the documentation) keep their row, and are
printed.

    python tools/list_licences.py            # rewrites docs/licences.md
    python tools/list_licences.py --check    # exit status 1 if a pinned package has no row
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pixel_sail.entry import one_message
from pixel_sail.files import replace_text

ROOT = Path(__file__).resolve().parent.parent
LICENCES_PAGE = ROOT / "docs" / "licences.md"
FILES = ("cpu", "captions", "cuda", "dev", "docs")
"""Requirement files without suffix. A package is attributed to the first that pins it."""
TABLE_HEAD = "| package | version | licence | pinned in requirements/ |\n|---|---|---|---|\n"
NOT_STATED = "not stated"
NOT_READ = "not read here"


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned package."""

    name: str
    version: str
    file: str
    """Requirement file without suffix."""


def pinned() -> list[Package]:
    """Return every pinned package once, sorted by name."""
    found: dict[str, Package] = {}
    for file in FILES:
        for line in (ROOT / "requirements" / f"{file}.txt").read_text().splitlines():
            if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
                name, version = match.groups()
                found.setdefault(normal(name), Package(name=name, version=version, file=file))
    return [found[key] for key in sorted(found)]


def normal(name: str) -> str:
    """Return the name by which packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str) -> str | None:
    """Return the licence of an installed package on one short line, None if it is not installed."""
    try:
        fields = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return None
    expression = str(fields.get("license_expression", ""))
    kinds = [entry for entry in fields.get("classifier", []) if entry.startswith("License :: ")]
    classifiers = [entry.rpartition(" :: ")[2] for entry in kinds]
    named = [entry for entry in classifiers if entry != "OSI Approved"]
    # Some packages put the full text of the licence into the field; its first line is the name.
    text = str(fields.get("license", "")).strip().split("\n")[0]
    stated = expression or ", ".join(named) or (text if len(text) < 80 else "")
    return stated.replace("|", "/") or NOT_STATED


def rows_of(page: Path) -> dict[str, str]:
    """Return the licence of every package in the table of the page."""
    if not page.exists():
        return {}
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| ([^|]*) \| \w+ \|$", page.read_text(), re.MULTILINE)
    return {f"{normal(name)}=={version}": stated for name, version, stated in rows}


def table(packages: Sequence[Package], known: dict[str, str]) -> str:
    """Return the table; packages that are not installed keep the known row of the same version."""
    lines = []
    for package in packages:
        stated = licence(package.name) or known.get(f"{normal(package.name)}=={package.version}", NOT_READ)
        lines.append(f"| {package.name} | {package.version} | {stated} | {package.file} |\n")
    return TABLE_HEAD + "".join(lines)


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page, or check it; return the exit status."""
    parser = argparse.ArgumentParser(description="List the licences of the pinned packages.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a pinned package is missing"
    )
    options = parser.parse_args(arguments)
    packages, known = pinned(), rows_of(LICENCES_PAGE)
    missing = [p.name for p in packages if f"{normal(p.name)}=={p.version}" not in known]
    if options.check:
        if missing:
            print(f"{LICENCES_PAGE}: found no row for {missing}; run python tools/list_licences.py", file=sys.stderr)
        return 1 if missing else 0
    before = LICENCES_PAGE.read_text().partition(TABLE_HEAD)[0]
    replace_text(LICENCES_PAGE, before + table(packages, known))
    unread = [package.name for package in packages if licence(package.name) is None]
    print(f"{LICENCES_PAGE}: {len(packages)} packages, {len(unread)} not installed here: {', '.join(unread)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

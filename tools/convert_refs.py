"""Convert refs(*).p to refs(*).jsonl once, so that sources no longer read pickles.

    python tools/convert_refs.py data/ref_seg
    python tools/convert_refs.py "data/ref_seg/refcocog/refs(umd).p"

Writes a .jsonl file next to every refs(*).p and grefs(*).p below a folder; sources prefer it. Its first line is the
SHA-256 of the pickle. If the pickle changes, sources raise an error until it is converted again. The pickle may be
deleted afterwards. Exit status 1 if a file could not be converted, 2 if none was found.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pixel_sail.data.refs_files import convert, is_current
from pixel_sail.files import is_hidden
from pixel_sail.types import DataError


def pickles_below(path: Path) -> list[Path]:
    """Return the refs pickles of a folder and the folders in it, or the file itself."""
    return [path] if path.is_file() else sorted(found for found in path.rglob("*refs(*).p") if not is_hidden(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and print one line per file; a file that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pickle, or folder with pickles below it")
    parser.add_argument("--force", action="store_true", help="also rewrite files that are up to date")
    options = parser.parse_args(arguments)
    files = [file for path in options.paths for file in pickles_below(path)]
    if not files:
        print(f"{[str(path) for path in options.paths]}: found no refs(*).p or grefs(*).p", file=sys.stderr)
        return 2
    num_failed = 0
    for file in tqdm(files, desc="converting", disable=len(files) < 2, leave=False):
        try:
            tqdm.write(_convert(file, force=options.force))
        except (DataError, OSError) as error:
            num_failed += 1
            tqdm.write(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1 if num_failed else 0


def _convert(file: Path, *, force: bool) -> str:
    """Convert one file and return a message about it."""
    if not force and file.with_suffix(".jsonl").is_file():
        try:
            if is_current(file):
                return f"{file.with_suffix('.jsonl')}: up to date"
        except DataError as error:
            tqdm.write(f"{error}; rewritten", file=sys.stderr)
    converted, num_refs = convert(file)
    return f"{converted}: {num_refs} refs"


if __name__ == "__main__":
    sys.exit(main())

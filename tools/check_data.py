"""Check datasets before training or evaluation. All problems are reported, not only the first.

    python tools/check_data.py                                            # all of configs/source
    python tools/check_data.py source=refcoco,refcocog sample=all
    python tools/check_data.py experiment=quickstart                      # the sources of a run, with its overrides
    python tools/check_data.py evals=paper                                # the data of scripts/evaluate.py
    python tools/check_data.py root=DIR dataset=refcocog split=val        # one folder of refs and instances

Prints tables and writes report.json and report.html (with rendered samples) to `out=` (default: runs/data_check). Exit
status: 0 for no errors (notes are allowed), 1 for errors that must be fixed, 2 for a wrong command line. `sample=N|all`
sets the number of items, masks and images decoded per source (200). Records, sizes and file names are always checked
completely. `strict=true` treats notes as errors, `sheet=N` sets the number of rendered samples, `progress=false`
disables the progress bar.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.cli import script_help, wants_help
from pixel_sail.data.checking.report import json_report, text_report
from pixel_sail.entry import one_message
from pixel_sail.evaluation.check_plan import parse_arguments
from pixel_sail.evaluation.data_check import run_check
from pixel_sail.evaluation.data_report import write_data_report
from pixel_sail.files import replace_text


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit status."""
    if wants_help(sys.argv[1:] if arguments is None else arguments):
        print(script_help(Path(__file__)))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    plan, settings = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    result = run_check(plan, settings)
    replace_text(settings.out / "report.json", json_report(result.reports, settings=vars(settings) | {"out": None}))
    write_data_report(settings.out / "report.html", result)
    print(text_report(result.reports))
    if plan.left_out:
        print(f"skipped, as they are missing and not part of a download: {', '.join(plan.left_out)}")
    print(f"written: {settings.out / 'report.html'}, {settings.out / 'report.json'}")
    num_troubles = sum(report.num_troubles for report in result.reports)
    num_notes = sum(report.num_notes for report in result.reports)
    return int(num_troubles > 0 or (settings.strict and num_notes > 0))


if __name__ == "__main__":
    sys.exit(main())

"""Export a checkpoint of a run to a plain Hugging Face folder, as the run does at its end.

    python tools/export_checkpoint.py runs/mine                        the newest -> runs/mine/exports/step_00000500
    python tools/export_checkpoint.py runs/mine --step 250 --to best   that one   -> best

The run may continue meanwhile. `scripts/evaluate.py checkpoint=FOLDER` scores the result.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pixel_sail.config import ConfigError
from pixel_sail.entry import one_message
from pixel_sail.files import check_writable, recover_folder
from pixel_sail.training.checkpoint import CheckpointError, checkpoint_name, complete_checkpoints
from pixel_sail.training.saved_export import export_saved


def chosen(run_dir: Path, step: int | None) -> Path:
    """Return the checkpoint of a step, None: the newest. Raises: CheckpointError if it does not exist."""
    found = complete_checkpoints(run_dir / "checkpoints")
    wanted = [path for path in found if step is None or path.name == checkpoint_name(step)]
    if not wanted:
        names = [path.name for path in found]
        what = "a complete checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{run_dir / 'checkpoints'}: found {names or 'none'}, expected {what}")
    return wanted[-1]


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Export; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="output folder (default: exports/step_* in the run folder)"
    )
    options = parser.parse_args(arguments)
    saved = chosen(options.run, options.step)
    folder = options.to or options.run / "exports" / saved.name
    if folder.parent.is_dir():
        recover_folder(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists; delete it or set --to to another folder")
    check_writable(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_saved(options.run, saved, folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

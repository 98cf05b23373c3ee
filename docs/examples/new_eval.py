"""A custom benchmark: the expressions of RefShapes that contain a color.

Files -> `load` -> list of `Expression` (or a `Task`) -> predictions, scores, report. Expressions are scored with cIoU,
gIoU, P@0.5 .. 0.9, N-acc and T-acc. For other answers return a `pixel_sail.evaluation.task.Task`, as
`region_choice.load` does.
"""

from pathlib import Path

from tiny import export_model, work_folder

from pixel_sail.config import EvalConfig, load_config
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.evaluation.run import run_evals
from pixel_sail.types import Expression

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")


def load(*, root: str | Path, split: str) -> list[Expression]:
    """Return the expressions: the `_target_` of an eval, whose other keys are its arguments."""
    found = expressions(load_refer(root, "refshapes", split))
    return [item for item in found if set(item.text.split()) & set(COLOURS)]


def main(folder: Path) -> dict[str, dict[str, float]]:
    """Evaluate a random model on the new benchmark and return the scores."""
    export = export_model(folder)
    config = load_config("evaluate", EvalConfig, [f"checkpoint={export}", "progress=false", "resamples=100"])
    config.evals = {
        "colours": {"_target_": "new_eval.load", "root": str(folder / "data" / "refshapes"), "split": "val"}
    }
    config.predict.answer = "forced"
    scores = run_evals(config)
    print(f"colours: cIoU {scores['colours']['ciou']:.3f} over {scores['colours']['count']:.0f} expressions")
    print(f"report: {folder / 'evaluation' / 'report.html'}")
    return scores


if __name__ == "__main__":
    main(work_folder())

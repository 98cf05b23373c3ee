"""All configured evals of one checkpoint.

Place in the flow: `scripts/evaluate.py` and the quickstart call `run_evals`. Results are appended to
`<output>/results.jsonl`, one line per eval, each with what made it:

    {"eval": "refshapes_val", "scores": {"ciou": 0.81, ...}, "protocol": {"weights_sha256": ..., "predict": ...},
     "code": "1a2b3c4", "world_size": 2, "precision": "fp32"}

`<output>/report.html` shows the scores of this call and pictures from every eval.
"""

import json
import logging
import subprocess
from pathlib import Path

from pixel_sail import dist
from pixel_sail.config import ConfigError, EvalConfig, build
from pixel_sail.evaluation.predict import DTYPES, Predictor
from pixel_sail.evaluation.predictions import read_predictions
from pixel_sail.evaluation.refer_seg import evaluate, first_images, protocol_of
from pixel_sail.evaluation.report import spread_cases, write_report
from pixel_sail.files import sha256

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Folder inside a run folder that holds the Hugging Face files."""


def run_evals(config: EvalConfig) -> dict[str, dict[str, float | int]]:
    """Score the checkpoint on every eval and return {eval name: scores}, on every rank.

    Raises: ConfigError when the checkpoint or the evals are missing; DataError for wrong annotations or images.
    """
    folder = checkpoint_folder(config.checkpoint)
    if not config.evals:
        raise ConfigError("evals is empty; name some, for example evals=[refshapes_val]")
    if config.precision not in DTYPES:
        raise ConfigError(f"precision is {config.precision!r}, expected one of {sorted(DTYPES)}")
    expressions = {name: build(node, f"evals.{name}") for name, node in config.evals.items()}
    predictor = Predictor.from_pretrained(
        folder, config=config.predict, precision=config.precision, device=str(dist.local_device())
    )
    weights = sha256(folder / "model.safetensors")
    output = folder.parent / "evaluation" if config.output is None else Path(config.output)
    results, cases = {}, {}
    for name, items in expressions.items():
        protocol = protocol_of(
            config.predict,
            checkpoint=str(folder),
            weights_sha256=weights,
            eval_node=config.evals[name] | {"max_images": config.max_images},
        )
        chosen = first_images(items, config.max_images)
        sums = evaluate(predictor, chosen, output / name, protocol=protocol, progress=config.progress)
        results[name] = sums.summary()
        if dist.rank() == 0:
            line = {
                "eval": name,
                "scores": results[name],
                "protocol": protocol,
                "code": code_version(),
                "world_size": dist.world_size(),
                "precision": config.precision,
            }
            with (output / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            cases[name] = spread_cases(chosen, read_predictions(output / name / "predictions.jsonl"), config.examples)
    if dist.rank() == 0:
        write_report(
            output,
            title=f"Referring segmentation: {folder}",
            facts=[
                f"weights {weights[:12]}, code {code_version()}, {config.precision}",
                f"prompt {config.predict.prompt}, mask {config.predict.mask}, answer {config.predict.answer}",
                "A missing prediction counts as an empty mask.",
            ],
            tables={"Scores": results},
            cases=cases,
        )
    return results


def checkpoint_folder(name: str) -> Path:
    """Return the exported folder of a checkpoint given as that folder or as its run folder."""
    for folder in (Path(name), Path(name) / EXPORT):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise ConfigError(
        f"checkpoint {name}: neither it nor its {EXPORT}/ holds config.json and model.safetensors; "
        "give a run folder whose training finished, or an exported folder"
    )


def code_version() -> str:
    """Return the commit of the code, with "+" when files differ from it, "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

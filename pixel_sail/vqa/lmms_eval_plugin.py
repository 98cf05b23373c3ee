"""Registration of the model and the tasks with lmms-eval.

The entry point `pixel_sail` of group `lmms_eval.models` is `manifest`, so that the kit's own command accepts `--model
pixel_sail`. `python -m pixel_sail.vqa` calls `register` and needs no entry point. Both register

    ModelManifest(model_id="pixel_sail", simple_class_path="pixel_sail.vqa.lmms_eval_model.PixelSail")
"""

from pathlib import Path

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "pixel_sail"
TASK_FOLDER = Path(__file__).resolve().parent / "tasks"
"""The benchmarks with the released templates, for `--include_path`."""


def manifest() -> ModelManifest:
    """Return the manifest for the kit's registry."""
    return ModelManifest(model_id=MODEL_NAME, simple_class_path="pixel_sail.vqa.lmms_eval_model.PixelSail")


def register() -> None:
    """Add the model to the registry of this process."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def with_default_options(arguments: list[str]) -> list[str]:
    """Return the kit's command line with our model and task folder, unless others are given.

    The kit prints an exception and ends with status 0 unless its verbosity is DEBUG, which is therefore the default.
    """
    defaults = {"--model": MODEL_NAME, "--include_path": str(TASK_FOLDER), "--verbosity": "DEBUG"}
    given = {argument.split("=")[0] for argument in arguments}
    return arguments + [part for name, value in defaults.items() if name not in given for part in (name, value)]

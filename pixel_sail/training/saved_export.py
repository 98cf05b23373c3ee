"""A plain Hugging Face folder from a checkpoint, without its run.

`tools/export_checkpoint.py` calls it for a run that is going on or was given up; a run that ends exports by itself
(`checkpoint.export`), to the same files:

    runs/mine/checkpoints/step_00000500/  ->  runs/mine/exports/step_00000500/{config.json, model.safetensors, ...}
"""

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixel_sail.config import ConfigError, ModelConfig, check_plain
from pixel_sail.files import read_json, reason_of
from pixel_sail.model.distill_head import PREFIX as DISTILL_HEAD
from pixel_sail.model.lora import fold_lora
from pixel_sail.model.reading import check_sizes
from pixel_sail.renamed import current_config
from pixel_sail.training import checkpoint
from pixel_sail.training.average import AVERAGE
from pixel_sail.training.build import build_model


def export_saved(run_dir: Path, saved: Path, folder: Path) -> None:
    """Write what the checkpoint `saved` of a run holds, complete or not at all.

    Averaged weights where the run averages them, adapters folded in, no layers towards teachers.
    Raises: CheckpointError for a damaged checkpoint; ConfigError or DataError for a configuration that is damaged or
    asks for anything to be looked up, or a tokenizer that is not there any more; WriteError.
    """
    checkpoint.verify(saved)
    config = _model_config(run_dir / "config.json")
    weights = checkpoint.read_tensors(saved / checkpoint.MODEL)
    check_sizes(config.architecture, weights, saved / checkpoint.MODEL)
    # The checkpoint has all weights: those that the run started from may be gone.
    config.init_from = None
    model, processor = build_model(config, seed=0, teachers={})
    averages = {
        name.removeprefix(f"{AVERAGE}."): tensor
        for name, tensor in checkpoint.read_tensors(saved / checkpoint.OPTIMIZER).items()
        if name.startswith(f"{AVERAGE}.")
    }
    weights = {name: tensor for name, tensor in (weights | averages).items() if not name.startswith(DISTILL_HEAD)}
    checkpoint.load_parameters(model, weights)
    model.config.averaged_weights = bool(averages)
    checkpoint.write_export(folder, model, processor, fold_lora(model, weights))


def _model_config(path: Path) -> ModelConfig:
    """Return the model's part of a run's configuration. Raises: ConfigError."""
    remedy = "give the folder of a run, with the config.json that the run wrote"
    own = current_config(read_json(path, {"model": dict}, fail=ConfigError, remedy=remedy))["model"]
    # The run may be somebody else's: ${oc.env:...} would put the environment of this process into its settings.
    check_plain(own, str(path))
    try:
        plain = OmegaConf.merge(OmegaConf.structured(ModelConfig), own)
        config = OmegaConf.to_object(plain)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: found no model that can be made ({reason_of(error)}); {remedy}") from error
    assert isinstance(config, ModelConfig)
    return config

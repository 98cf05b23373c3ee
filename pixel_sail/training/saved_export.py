"""Exports a checkpoint as a Hugging Face folder, without resuming its run.

`tools/export_checkpoint.py` calls it for runs in progress or aborted ones. A run that finishes exports the same files
itself (`checkpoint.export`):

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
    """Write the model of the checkpoint `saved` of a run atomically.

    Weights are averaged if the run averages them, adapters are merged, distillation layers are dropped.
    Raises: CheckpointError for a damaged checkpoint; ConfigError or DataError for a configuration that is damaged or
    contains interpolations, or a missing tokenizer; WriteError.
    """
    checkpoint.verify(saved)
    config = _model_config(run_dir / "config.json")
    weights = checkpoint.read_tensors(saved / checkpoint.MODEL)
    check_sizes(config.architecture, weights, saved / checkpoint.MODEL)
    # The checkpoint has all weights, and the folder that the run started from may be deleted.
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
    # The run is untrusted: ${oc.env:...} would insert environment variables of this process.
    check_plain(own, str(path))
    try:
        plain = OmegaConf.merge(OmegaConf.structured(ModelConfig), own)
        config = OmegaConf.to_object(plain)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: found no valid model settings ({reason_of(error)}); {remedy}") from error
    assert isinstance(config, ModelConfig)
    return config

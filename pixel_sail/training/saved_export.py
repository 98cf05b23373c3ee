"""A plain Hugging Face folder from a checkpoint, without its run.

Place in the flow: `tools/export_checkpoint.py` calls it for a run that is going on or was given up; a run that ends
exports by itself (`checkpoint.export`), to the same files:

    runs/mine/checkpoints/step_00000500/  ->  runs/mine/exports/step_00000500/{config.json, model.safetensors, ...}
"""

import json
import os
import shutil
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import load_file

from pixel_sail.config import ModelConfig, check_plain
from pixel_sail.model.distill_head import PREFIX as DISTILL_HEAD
from pixel_sail.model.lora import fold_lora
from pixel_sail.training import checkpoint
from pixel_sail.training.average import AVERAGE
from pixel_sail.training.build import build_model


def export_saved(run_dir: Path, saved: Path, folder: Path) -> None:
    """Write what the checkpoint `saved` of a run holds, complete or not at all.

    Averaged weights where the run averages them, adapters folded in, no layers towards experts.
    Raises: CheckpointError for a damaged checkpoint; DataError for a configuration that asks for anything to be looked
    up; ConfigError for a tokenizer that is not there any more.
    """
    checkpoint.verify(saved)
    stored = json.loads((run_dir / "config.json").read_text())["model"]
    # The run may be somebody else's: ${oc.env:...} would put the environment of this process into its settings.
    check_plain(stored, str(run_dir / "config.json"))
    plain = OmegaConf.merge(OmegaConf.structured(ModelConfig), stored)
    config = OmegaConf.to_object(plain)
    assert isinstance(config, ModelConfig)
    # The checkpoint has all weights: those that the run started from may be gone.
    config.init_from = None
    model, processor = build_model(config, seed=0, experts={})
    weights = load_file(saved / checkpoint.MODEL)
    averages = {
        name.removeprefix(f"{AVERAGE}."): tensor
        for name, tensor in load_file(saved / checkpoint.OPTIMIZER).items()
        if name.startswith(f"{AVERAGE}.")
    }
    weights = {name: tensor for name, tensor in (weights | averages).items() if not name.startswith(DISTILL_HEAD)}
    checkpoint.load_parameters(model, weights)
    model.config.averaged_weights = bool(averages)
    working = folder.with_name(f".writing_{folder.name}")
    shutil.rmtree(working, ignore_errors=True)
    model.save_pretrained(working, state_dict=fold_lora(model, weights))
    processor.save_pretrained(working)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(working, folder)

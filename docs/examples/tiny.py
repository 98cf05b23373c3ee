"""Setup shared by the other examples: a few synthetic scenes and a small model with random weights.

Synthetic files -> tokenizer -> model -> exported folder, as `make quickstart` creates them at full size:

    folder/data/refshapes/{images,refshapes,grefshapes,tokenizer,...}
    folder/export/{config.json, model.safetensors, tokenizer.json, ...}
"""

import os
import sys
import tempfile
from pathlib import Path

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.sources.refer import expressions, load_refer
from pixel_sail.model.tokenization import train_tokenizer
from pixel_sail.refshapes import RefShapesSpec, write_refshapes
from pixel_sail.training.build import build_model

SMALL = [
    "name=example",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.mask_dim=16",
]
"""Overrides of a model of 0.1 M parameters."""


def work_folder() -> Path:
    """Return the folder named on the command line, by default a new temporary one."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="pixel_sail_"))


def make_data(folder: Path) -> Path:
    """Render RefShapes into `folder`, set PIXEL_SAIL_DATA to it, and return the data folder."""
    data = folder / "data"
    if write_refshapes(data / "refshapes", RefShapesSpec(seed=1, num_train=8, num_eval=3), num_workers=1):
        texts = [item.text for item in expressions(load_refer(data / "refshapes", "refshapes", "train"))]
        tokenizer = train_tokenizer(texts, vocab_size=400, num_visual_prompts=15)
        tokenizer.save_pretrained(str(data / "refshapes" / "tokenizer"))
    os.environ["PIXEL_SAIL_DATA"] = str(data)
    return data


def export_model(folder: Path) -> Path:
    """Render the data, build a model with random weights, and return its exported folder."""
    make_data(folder)
    model, processor = build_model(load_config("train", TrainConfig, SMALL).model, seed=0, teachers={})
    export = folder / "export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    return export


if __name__ == "__main__":
    print(export_model(work_folder()))

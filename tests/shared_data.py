"""Path of the read-only data next to the checkout that some tests use.

Imported by tests only. Example: SHARED / "data" / "derived_iou_pairs" / "pairs.json".
"""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("PIXEL_SAIL_SHARED", Path(__file__).resolve().parents[2] / "shared"))

SHARED_CONFIGS = (f"hydra.searchpath=[file://{Path(__file__).parent / 'configs'}]", f"paths.data={SHARED / 'data'}")
"""Overrides that add the sources, mixtures, evals, experiments and path of this data to `load_config`."""


def shared_data(name: str) -> Path:
    """Return one data folder, or skip the test if it is missing."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set PIXEL_SAIL_SHARED to the folder that holds data/{name}")
    return folder


def parity_folder(name: str) -> Path:
    """Return one folder of recorded outputs of the released model, or skip the test if it is missing."""
    folder = SHARED / "parity" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set PIXEL_SAIL_SHARED to the folder that holds parity/{name}")
    return folder

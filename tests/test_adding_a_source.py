"""A dataset is added with one module and one YAML file, both of which may be outside the repository."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.data.packing import PackedStream
from pixel_sail.training.prepare import build_mixture

MODULE = '''
"""Images whose left half is to be segmented."""

import json
from pathlib import Path

import numpy as np

from pixel_sail.types import Sample, Turn


def load(*, root, side="left"):
    return HalfSource(Path(root), side)


class HalfSource:
    name = "halves"

    def __init__(self, root, side):
        self.items = json.loads((root / "halves.json").read_text())
        self.root, self.side = root, side

    def __len__(self):
        return len(self.items)

    def image_path(self, index):
        return self.root / self.items[index]["file"]

    def get(self, index, rng):
        height, width = self.items[index]["size"]
        mask = np.zeros((height, width), dtype=bool)
        mask[:, : width // 2] = self.side == "left"
        mask[:, width // 2 :] = self.side == "right"
        question = ["the {} half", "everything on the {}"][rng.integers(2)].format(self.side)
        turn = Turn(question=question, answer="It is [SEG].", masks=(mask,))
        return Sample(
            sample_id=f"halves/{index}", source=self.name, image_path=self.image_path(index),
            image_hw=(height, width), turns=(turn,),
        )
'''

YAML = """halves:
  _target_: half_source.load
  root: ${paths.data}/halves
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A folder with the new module, its YAML in a separate config folder, and its data."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "half_source.py").write_text(MODULE)
    (tmp_path / "configs" / "source").mkdir(parents=True)
    (tmp_path / "configs" / "source" / "halves.yaml").write_text(YAML)
    data = tmp_path / "data" / "halves"
    data.mkdir(parents=True)
    sizes = [(16, 24), (24, 16), (8, 40)]
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(np.full((height, width, 3), 40 * index, dtype=np.uint8)).save(data / f"{index}.png")
    (data / "halves.json").write_text(
        json.dumps([{"file": f"{index}.png", "size": size} for index, size in enumerate(sizes)])
    )
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(tmp_path / "data"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield f"hydra.searchpath=[file://{tmp_path / 'configs'}]"
    sys.modules.pop("half_source", None)


def test_a_new_source_is_mixed_packed_and_configured_like_any_other(added, processor):
    config = load_config(
        "train",
        TrainConfig,
        ["name=x", "+source@data.sources=halves", "+data.sources.halves.side=right", added],
    )
    config.data.sources = {"halves": config.data.sources["halves"]}
    mixture = build_mixture(config.data, seed=0)
    assert mixture.epoch_length == 3
    sequence = next(iter(PackedStream(mixture, processor, config.data.packing, index=0, num_streams=1)))
    assert {example.source for example in sequence.examples} == {"halves"}
    for example in sequence.examples:
        (mask,) = example.masks
        assert mask[:, mask.shape[1] // 2 :].all() and not mask[:, : mask.shape[1] // 2].any()


def test_a_misspelled_argument_of_a_new_source_is_named(added):
    config = load_config("train", TrainConfig, ["name=x", "+source@data.sources=halves", added])
    config.data.sources = {"halves": config.data.sources["halves"] | {"sides": "left"}}
    with pytest.raises(ConfigError, match=r"(?s)data\.sources\.halves.*sides"):
        build_mixture(config.data, seed=0)

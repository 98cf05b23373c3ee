"""A custom dataset: images in a folder, one box per image in a JSON file.

Files -> `load` -> `Source` -> mixture -> packing, as every source. An item of `boxes.json`:

    {"file": "0.png", "size": [16, 24], "name": "the dark corner", "box": [0, 0, 12, 8]}

Configure it with `_target_: new_dataset.load` and this file's folder on PYTHONPATH.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import SMALL, make_data, work_folder

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.packing import PackedSequence, PackedStream
from pixel_sail.training.build import build_model
from pixel_sail.training.prepare import build_mixture
from pixel_sail.types import Sample, Turn


def load(*, root: str | Path) -> "BoxSource":
    """Return the source: the `_target_` of a configuration, whose other keys are its arguments."""
    return BoxSource(Path(root))


class BoxSource:
    """One item per image; all randomness comes from the `rng` argument."""

    name = "boxes"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.items = json.loads((root / "boxes.json").read_text())

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)

    def image_path(self, index: int) -> Path:
        """Return the image of an item without opening it."""
        return self.root / self.items[index]["file"]

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return an item: a question, an answer with one [SEG] per mask, and the masks at image size."""
        item = self.items[index]
        left, top, right, bottom = item["box"]
        mask = np.zeros(item["size"], dtype=bool)
        mask[top:bottom, left:right] = True
        question = ["Please segment {}.", "Where is {}?"][rng.integers(2)].format(item["name"])
        turn = Turn(question=question, answer="It is [SEG].", masks=(mask,))
        return Sample(
            sample_id=f"boxes/{item['file']}",
            source=self.name,
            image_path=self.image_path(index),
            image_hw=tuple(item["size"]),
            turns=(turn,),
        )


def write_files(root: Path) -> None:
    """Write two images and their boxes."""
    root.mkdir(parents=True, exist_ok=True)
    items = []
    for index, (height, width) in enumerate([(32, 48), (48, 32)]):
        Image.new("RGB", (width, height), (40, 40, 200 * index)).save(root / f"{index}.png")
        items.append({"file": f"{index}.png", "size": [height, width], "name": "the corner", "box": [0, 0, 12, 8]})
    (root / "boxes.json").write_text(json.dumps(items))


def main(folder: Path) -> PackedSequence:
    """Configure the new source as the only one and return the first packed sequence."""
    write_files(make_data(folder) / "boxes")
    config = load_config("train", TrainConfig, SMALL)
    config.data.sources = {"boxes": {"_target_": "new_dataset.load", "root": str(folder / "data" / "boxes")}}
    config.data.repeats = {}
    _, processor = build_model(config.model, seed=0, teachers={})
    mixture = build_mixture(config.data, seed=0)
    sequence = next(iter(PackedStream(mixture, processor, config.data.packing, index=0, num_streams=1)))
    for example in sequence.examples[:2]:
        print(f"{example.sample_id}: {len(example)} tokens, {len(example.masks)} mask")
    return sequence


if __name__ == "__main__":
    main(work_folder())

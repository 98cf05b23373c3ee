"""Evaluation images are excluded from training by COCO image ID, independent of folder and year in the file name."""

import json
from pathlib import Path

import numpy as np
import pytest

from pixel_sail.config import DataConfig
from pixel_sail.data.decontamination import (
    DecontaminationConfig,
    HeldOut,
    coco_image_id,
    evaluation_image_ids,
    without_images,
)
from pixel_sail.training.prepare import build_mixture
from pixel_sail.types import DataError, Sample, Turn


class ListedSource:
    """Items that consist of a path only."""

    name = "listed"

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def image_path(self, index):
        return self.paths[index]

    def get(self, index, rng):
        path = self.paths[index]
        return Sample(sample_id=str(path), source="listed", image_path=path, image_hw=None, turns=(TURN,))


TURN = Turn(question="what is this", answer="an image")
PATHS = [
    Path("coco/train2017/000000000007.jpg"),
    Path("train2014/COCO_train2014_000000000008.jpg"),
    None,
    Path("gqa/7.jpg"),
    Path("val2017/000000000009.jpg"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("COCO_train2014_000000581857.jpg", 581857),
        ("COCO_val2014_000000000042.jpg", 42),
        ("000000581857.jpg", 581857),
        ("581857.jpg", None),
        ("sa_000000581857.jpg", None),
        ("000000581857_1.jpg", None),
    ],
)
def test_coco_images_are_known_by_their_number(name, expected):
    assert coco_image_id(Path("anywhere") / name) == expected


def test_items_of_excluded_images_are_removed_and_the_others_keep_their_order():
    part = without_images(ListedSource(PATHS), frozenset({7, 9}))
    assert [part.image_path(index) for index in range(len(part))] == PATHS[1:4]
    rng = np.random.default_rng(0)
    assert [part.get(index, rng).image_path for index in range(len(part))] == PATHS[1:4]
    assert part.name == "listed"


def test_a_source_without_excluded_images_is_unchanged():
    source = ListedSource(PATHS)
    assert without_images(source, frozenset({123})) is source
    assert without_images(source, frozenset()) is source


def _write_refer(root, splits):
    """Write a gRefCOCO folder with one image per entry of splits: image id -> split."""
    folder = root / "grefs"
    folder.mkdir(parents=True)
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 4, "width": 4} for i in splits]
    refs = [
        {
            "ref_id": i,
            "ann_id": [-1],
            "image_id": i,
            "split": split,
            "sentences": [{"sent_id": i, "sent": "a hat", "raw": "a hat"}],
        }
        for i, split in splits.items()
    ]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (folder / "grefs(unc).json").write_text(json.dumps(refs))


def test_excluded_images_are_those_of_the_named_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))
    _write_refer(tmp_path, {7: "val", 8: "train", 9: "testA"})
    entry = HeldOut(root=str(tmp_path), dataset="grefs", splits=["val", "testA"])
    assert evaluation_image_ids([entry]) == {7, 9}


def test_a_missing_split_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))
    _write_refer(tmp_path, {8: "train"})
    with pytest.raises(DataError, match=r"(?s)expected \['val'\].*data.decontamination.enabled=false"):
        evaluation_image_ids([HeldOut(root=str(tmp_path), dataset="grefs", splits=["val"])])


@pytest.mark.parametrize("enabled", [True, False])
def test_the_mixture_of_a_run_excludes_them_unless_configured(tmp_path, monkeypatch, enabled):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))
    _write_refer(tmp_path, {7: "val", 8: "train", 9: "train", 10: "val"})
    source = {
        "_target_": "pixel_sail.data.sources.refer.load",
        "root": str(tmp_path),
        "dataset": "grefs",
        "split": "val",
    }
    held_out = [HeldOut(root=str(tmp_path), dataset="grefs", splits=["val"])]
    config = DataConfig(
        sources={"grefs": source}, decontamination=DecontaminationConfig(enabled=enabled, held_out=held_out)
    )
    if enabled:
        with pytest.raises(DataError, match="found no items in"):
            build_mixture(config, seed=0)
    else:
        assert build_mixture(config, seed=0).epoch_length == 2

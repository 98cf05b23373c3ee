"""Readers of visual-prompt, chat and region-benchmark files on altered records: a result or a DataError."""

import copy
import json

import numpy as np
import pytest
from region_samples import get

from pixel_sail.data.sources import llava, osprey, perbench, region_caption, sam_captions
from pixel_sail.types import DataError

JUNK = (None, True, -1, 0, 3, 10**30, 1.5, float("nan"), "", "x", "<region9>", "<obj1>", [], [[]], {}, [None], [5],
        {"size": [4, 4], "counts": "x"}, {"size": [0, 4], "counts": []}, {"size": [2, 2], "counts": [4]},
        [[1, 1, 2, 2, 3, 1]], {"from": "human", "value": "<image>"})  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _places(value, path=()):
    """Yield the path of every value in a record, as a sequence of keys."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _altered(record, rng):
    """Return a copy of a record with one to three places replaced, removed or repeated."""
    record = copy.deepcopy(record)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(record))
        if not places:
            break
        *path, last = places[rng.integers(len(places))]
        parent = record
        for key in path:
            parent = parent[key]
        kind = rng.integers(4)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
    return record


def _drain(source):
    """Read all items of a training source; return how many were rejected."""
    refused = 0
    for index in range(len(source)):
        try:
            source.image_path(index)
            sample = get(source, index)
            assert sample.turns and all(turn.question and turn.answer for turn in sample.turns)
            assert all(prompt.mask.any() for prompt in sample.prompts)
        except DataError as error:
            assert "file.json" in str(error) or "record=" in str(error)
            refused += 1
    return refused


SOURCES = {
    "osprey_conversation": ("osprey/osprey_conversation.json", {"name": "x"}),
    "osprey_detail": ("osprey/osprey_detail_description.json", {"name": "x", "content": "description"}),
    "sam_captions": ("perbench/STBench_Detailed_Caption.json", {}),
    "llava": ("llava/llava_v1_5_mix665k.json", {}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_altered_training_records_end_in_a_sample_or_in_the_named_error(data_root, tmp_path, name):
    file, settings = SOURCES[name]
    records = json.loads((data_root / "refshapes" / file).read_text())
    rng = np.random.default_rng(0)
    altered = [_altered(records[i % len(records)], rng) for i in range(400)]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(altered))
    if name.startswith("osprey"):
        source = osprey.load(annotations=path, image_dirs=[tmp_path], **settings)
    else:
        load = sam_captions.load if name == "sam_captions" else llava.load
        source = load(annotations=path, image_dir=tmp_path, **settings)
    assert 20 < _drain(source) < len(source)


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("STBench_Detailed_Caption.json", perbench.load_captions),
        ("STBench_MCQ.json", perbench.load_choices),
        ("STBench_VRES.json", perbench.load_visual_referring),
    ],
)
def test_altered_benchmark_records_end_in_items_or_in_the_named_error(data_root, tmp_path, file, load):
    records = json.loads((data_root / "refshapes" / "perbench" / file).read_text())
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        (tmp_path / "file.json").write_text(json.dumps([_altered(records[number % len(records)], rng)]))
        try:
            load(tmp_path / "file.json", image_dir=tmp_path)
        except DataError as error:
            assert "file.json" in str(error)
            refused += 1
    assert 20 < refused < 120


def test_altered_region_caption_files_end_in_items_or_in_the_named_error(tmp_path):
    rle = {"size": [4, 4], "counts": [0, 4, 12]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 4, "caption": "a cat"}],
        "annotations": [{"id": 1, "image_id": 1, "segmentation": rle}],
    }
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        (tmp_path / "file.json").write_text(json.dumps(_altered(content, rng)))
        try:
            region_caption.load_region_captions(tmp_path / "file.json", image_dir=tmp_path)
        except DataError as error:
            assert "file.json" in str(error)
            refused += 1
    assert 20 < refused < 150

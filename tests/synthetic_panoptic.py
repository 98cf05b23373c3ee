"""A small panoptic dataset that tests write to disk: one image with things, a crowd and stuff, one without segments.

Imported by the panoptic tests only. Example: root = write(tmp_path), then coco_panoptic.load(root=root).get(0, rng).
"""

import copy
import json

import numpy as np
from PIL import Image

DOG, GRASS, WALL = 18, 193, 199
CATEGORIES = [
    {"id": DOG, "name": "dog", "isthing": 1},
    {"id": GRASS, "name": "grass-merged", "isthing": 0},
    {"id": WALL, "name": "wall-other-merged", "isthing": 0},
]
PIXELS = np.array(
    [
        [3, 3, 0, 0, 1, 1],
        [3, 3, 2, 0, 1, 70000],
        [9, 9, 2, 2, 70000, 70000],
        [9, 9, 9, 8, 8, 8],
    ]
)
"""Dogs 1 (right), 2 (middle) and the crowd 3; grass 9 and 8; wall 70000; 0 is unlabeled."""


def segment_entry(number, category_id, **more):
    return {"id": number, "category_id": category_id, "iscrowd": 0, **more}


SEGMENTS = [
    segment_entry(1, DOG, description="the dog on the right"),
    segment_entry(2, DOG, description=" the dog in the middle "),
    segment_entry(3, DOG, iscrowd=1, description="short"),
    segment_entry(9, GRASS, description="wet grass"),
    segment_entry(8, GRASS, description="wet grass"),
    segment_entry(70000, WALL),
]
DATA = {
    "images": [
        {"id": 5, "file_name": "000000000005.jpg", "height": 4, "width": 6},
        {"id": 4, "file_name": "000000000004.jpg", "height": 4, "width": 6},
    ],
    "annotations": [
        {"image_id": 4, "file_name": "000000000004.png", "segments_info": []},
        {"image_id": 5, "file_name": "000000000005.png", "segments_info": SEGMENTS},
    ],
    "categories": CATEGORIES,
}


def save_png(path, pixels):
    rgb = np.stack((pixels % 256, pixels // 256 % 256, pixels // 65536), axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)


def write(root, data=DATA, pixels=PIXELS, annotations="annotations", split="train2017"):
    folder = root / annotations
    for record in data["annotations"]:
        if isinstance(record.get("file_name"), str):
            save_png(folder / f"panoptic_{split}" / record["file_name"], pixels)
    (folder / f"panoptic_{split}.json").write_text(json.dumps(data))
    return root


def changed(**fields):
    """Return the data with fields of its record with segments changed; None removes a field."""
    data = copy.deepcopy(DATA)
    record = {**data["annotations"][1], **fields}
    data["annotations"][1] = {name: value for name, value in record.items() if value is not None}
    return data


def changed_segment(index, **fields):
    segments = copy.deepcopy(SEGMENTS)
    segments[index] |= fields
    return changed(segments_info=segments)


def sampled_turns(source, seeds=range(40)):
    return [turn for seed in seeds for turn in source.get(0, np.random.default_rng(seed)).turns]


def mask_areas(turn):
    return [int(mask.sum()) for mask in turn.masks]


def json_file(root):
    return root / "annotations" / "panoptic_train2017.json"


def pixels_of(number):
    return np.equal(PIXELS, number)

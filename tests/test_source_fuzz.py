"""Every source reads damaged annotation files or rejects them with a DataError, whichever value is wrong."""

import copy
import json
import shutil

import numpy as np
import pytest
import synthetic_panoptic
from PIL import Image
from running import ROOT
from test_reader_fuzz import limited_memory, mutated_bytes, own_cache  # noqa: F401, the fixtures hold for this file too

from pixel_sail.data.sources import (
    boxed_expressions,
    coco_panoptic,
    coco_semantic,
    coco_vp,
    flickr_gcg,
    gcg_benchmark,
    grandf,
    llava,
    muse,
    osprey,
    perbench,
    pix2cap_seg,
    pix2cap_vp,
    reasonseg,
    refcocog_gcg,
    region_caption,
    sam_captions,
)
from pixel_sail.refshapes.formats import SCENE_RULES
from pixel_sail.refshapes.grounded_format import grounded_record, write_grounded
from pixel_sail.refshapes.scene import encode_jpeg, paint_scene, sample_scene
from pixel_sail.types import DataError

NUM_DAMAGES = 60
WRONG_VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    "",
    "x",
    "<region1>",
    [],
    [None],
    [[]],
    {},
    {"a": 1},
    "nul\0",
)


def _places(value, path=()):
    """Return the path of every value in parsed JSON."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key in value for place in _places(value[key], (*path, key))]
    elif isinstance(value, list):
        found += [place for i, item in enumerate(value[:20]) for place in _places(item, (*path, i))]
    return found


def _with_wrong_value(rng, content):
    """Return parsed JSON with one value replaced, removed or doubled."""
    changed = copy.deepcopy(content)
    places = _places(changed)
    *path, last = places[rng.integers(len(places))]
    parent = changed
    for step in path:
        parent = parent[step]
    action = rng.integers(6)
    if action == 0:
        del parent[last]
    elif action == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[last]))
    else:
        parent[last] = WRONG_VALUES[rng.integers(len(WRONG_VALUES))]
    return changed


def _go_through(source):
    for index in range(len(source)):
        source.image_path(index)
        sample = source.get(index, np.random.default_rng(index))
        assert sample.turns


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, data_root):
    """Sample two images in every grounded format, and copy the first items of the others."""
    out = tmp_path_factory.mktemp("sampled")
    images = out / "images"
    images.mkdir()
    records = []
    for image_id, split in ((1, "train"), (2, "train"), (3, "val")):
        rng = np.random.default_rng(image_id)
        scene = sample_scene(rng, SCENE_RULES[split])
        height, width = scene.image_hw
        image = {"id": image_id, "file_name": f"COCO_train2014_{image_id:012d}.jpg", "height": height, "width": width}
        (images / image["file_name"]).write_bytes(encode_jpeg(paint_scene(rng, scene)))
        records.append({"split": split, "image": image, "grounded": grounded_record(rng, scene, image)})
    write_grounded(out, records, images)
    for path in (data_root / "refshapes").glob("*/*.json"):
        if path.parent.name in ("osprey", "llava", "perbench"):
            (out / path.parent.name).mkdir(exist_ok=True)
            (out / path.parent.name / path.name).write_text(json.dumps(json.loads(path.read_text())[:2]))
    synthetic_panoptic.write(out / "coco")
    for name in ("000000000004.jpg", "000000000005.jpg"):
        Image.new("RGB", (6, 4)).save(images / name)
    shape = {"segmentation": [[0, 0, 3, 0, 3, 3]], "image_id": 1, "id": 1}
    image = {"id": 1, "file_name": "000000000004.jpg", "height": 4, "width": 6, "caption": "a thing"}
    boxed = {
        "image_id": 4,
        "local_image": "000000000004.jpg",
        "expression": "a thing",
        "bbox_xyxy": [1.0, 0.2, 5.0, 3.1],
    }
    boxed |= {"height": 4, "width": 6}
    (out / "boxed.json").write_text(json.dumps([boxed, {**boxed, "bbox_xyxy": None}]))
    (out / "regions.json").write_text(json.dumps({"images": [image], "annotations": [shape]}))
    return out


GCG = "glamm_data/annotations/"
PANOPTIC = "coco/annotations/panoptic_train2017.json"
READERS = {
    "boxed expressions": ("boxed.json", lambda f, d: boxed_expressions.load(annotations=f, image_dir=d / "images")),
    "osprey": ("osprey/osprey_conversation.json",
               lambda f, d: _go_through(osprey.load(annotations=f, image_dirs=[d / "images"], name="osprey"))),
    "osprey details": ("osprey/osprey_detail_description.json",
                       lambda f, d: _go_through(osprey.load(
                           annotations=f, image_dirs=[d / "images"], name="osprey", content="description"))),
    "llava": ("llava/llava_v1_5_mix665k.json",
              lambda f, d: _go_through(llava.load(annotations=f, image_dir=d / "images"))),
    "sam captions": ("perbench/STBench_Detailed_Caption.json",
                     lambda f, d: _go_through(sam_captions.load(annotations=f, image_dir=d / "images"))),
    "perbench captions": ("perbench/STBench_Detailed_Caption.json",
                          lambda f, d: perbench.load_captions(f, image_dir=d / "images")),
    "perbench choices": ("perbench/STBench_MCQ.json", lambda f, d: perbench.load_choices(f, image_dir=d / "images")),
    "perbench vres": ("perbench/STBench_VRES.json",
                      lambda f, d: perbench.load_visual_referring(f, image_dir=d / "images")),
    "region captions": ("regions.json", lambda f, d: region_caption.load_region_captions(f, image_dir=d / "images")),
    "grandf": (GCG + "GranDf_HA_GCG_train.json",
               lambda f, d: _go_through(grandf.load(annotations=f, image_dir=d / "images"))),
    "refcocog gcg": (GCG + "RefCOCOg_GCG_train.json",
                     lambda f, d: _go_through(refcocog_gcg.load(annotations=f, image_dir=d / "images"))),
    "flickr gcg": (GCG + "flickr_mergedGT_GCG_train.json",
                   lambda f, d: _go_through(flickr_gcg.load(annotations=f, image_dir=d / "images"))),
    "gcg masks": (GCG + "gcg_val_test/val_gcg_coco_mask_gt.json",
                  lambda f, d: gcg_benchmark.load(root=f.parent, split="val", image_dir=d / "images")),
    "gcg captions": (GCG + "gcg_val_test/val_gcg_coco_caption_gt.json",
                     lambda f, d: gcg_benchmark.load(root=f.parent, split="val", image_dir=d / "images")),
    "muse": ("muse/MUSE_train.json", lambda f, d: _go_through(muse.load(annotations=f, image_dir=d / "images"))),
    "coco panoptic": (PANOPTIC, lambda f, d: _go_through(
        coco_panoptic.load(root=d / "coco", image_dir=d / "images"))),
    "coco semantic": (PANOPTIC, lambda f, d: _go_through(
        coco_semantic.load(root=d / "coco", image_dir=d / "images"))),
    "coco vp": (PANOPTIC, lambda f, d: _go_through(coco_vp.load(root=d / "coco", image_dir=d / "images"))),
    "pix2cap seg": (PANOPTIC, lambda f, d: _go_through(
        pix2cap_seg.load(file=f, root=d / "coco", image_dir=d / "images"))),
    "pix2cap vp": (PANOPTIC, lambda f, d: _go_through(
        pix2cap_vp.load(file=f, root=d / "coco", image_dir=d / "images"))),
}  # fmt: skip


def damage_and_read(file, folder, read, *, seed, number=NUM_DAMAGES):
    """Damage a file in place repeatedly; return how often it was read and rejected. Other errors propagate."""
    data = file.read_bytes()
    content = json.loads(data)
    rng = np.random.default_rng(seed)
    counts = {"read": 0, "refused": 0}
    read(file, folder)
    for i in range(number):
        # One damage in five is of bytes, which mostly ends as invalid JSON; the others are of values.
        wrong = mutated_bytes(rng, data) if i % 5 == 0 else json.dumps(_with_wrong_value(rng, content)).encode()
        file.write_bytes(wrong)
        try:
            read(file, folder)
            counts["read"] += 1
        except DataError:
            counts["refused"] += 1
    return counts


@pytest.mark.parametrize("name", READERS)
def test_damaged_annotations_are_read_or_rejected(name, sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "data")
    file, read = READERS[name]
    counts = damage_and_read(tmp_path / "data" / file, tmp_path / "data", read, seed=1)
    assert min(counts.values()) > 0


def test_damaged_reasonseg_items_are_read_or_rejected(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "data")
    file = sorted((tmp_path / "data" / "reason_seg" / "train").glob("*.json"))[0]

    def read(file, folder):
        _go_through(reasonseg.load(root=folder / "reason_seg", split="train"))
        reasonseg.expressions(root=folder / "reason_seg", split="train")

    assert min(damage_and_read(file, tmp_path / "data", read, seed=2).values()) > 0


def test_damaged_panoptic_pngs_are_read_or_rejected(sampled, tmp_path):
    shutil.copytree(sampled, tmp_path / "data")
    file = tmp_path / "data" / "coco" / "annotations" / "panoptic_train2017" / "000000000005.png"
    data, refused = file.read_bytes(), 0
    rng = np.random.default_rng(3)
    for _ in range(NUM_DAMAGES):
        file.write_bytes(mutated_bytes(rng, data))
        try:
            READERS["coco panoptic"][1](file, tmp_path / "data")
        except DataError:
            refused += 1
    assert refused > NUM_DAMAGES // 2


def test_every_source_module_is_tried():
    tried = {
        "refer",
        "refcocog_vp",
        "blind_baseline",
        "grounded_caption",
        "__init__",
        "reasonseg",
    }  # elsewhere, or no reader
    text = (ROOT / "tests" / "test_source_fuzz.py").read_text()
    names = {path.stem for path in (ROOT / "pixel_sail" / "data" / "sources").glob("*.py")}
    assert {name for name in names - tried if f" {name}.load" not in text and f"({name}.load" not in text} == set()

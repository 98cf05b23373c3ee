"""Writes the RefShapes scenes of all splits in the file formats of the public datasets that they replace.

`tools/make_refshapes.py` calls `write_refshapes`, which creates this folder:

    images/train2014/COCO_train2014_000000000001.jpg
    refshapes/refs(unc).p, instances.json             REFER (RefCOCO)
    grefshapes/grefs(unc).json, instances.json        gRefCOCO: one, several or no target
    groupshapes/grefs(unc).json, instances.json       gRefCOCO: all objects with one attribute, train images
    perbench/STBench_{Detailed_Caption,MCQ,VRES}.json PerBench, from val images
    osprey/osprey_{conversation,short_form,detail_description}.json   Osprey, from train images
    llava/llava_v1_5_mix665k.json                     LLaVA-1.5, from train images and without image
    panoptic/, pix2cap/                               COCO panoptic and Pix2Cap, see panoptic_format.py
    glamm_data/, muse/, reason_seg/                   grounded captions, MUSE, ReasonSeg, see grounded_format.py
    attribute_maps/                                   outputs of a perfect teacher for train images
    meta.json                                         settings and counts

One entry of the refs, for example:

    {"ref_id": 7, "ann_id": 12, "image_id": 2, "category_id": 4, "split": "train", "sent_ids": [19],
     "file_name": "COCO_train2014_000000000002_12.jpg",
     "sentences": [{"sent_id": 19, "sent": "red star", "raw": "red star", "tokens": ["red", "star"]}]}

Each image depends only on (seed, split, index), and ids are assigned afterwards, in order: the same seed writes the
same bytes whatever the number of workers.
"""

import json
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pixel_sail.distillation.attributes import CELL_PX
from pixel_sail.refshapes.attribute_maps import attribute_map, write_attribute_maps
from pixel_sail.refshapes.expressions import Describer
from pixel_sail.refshapes.focus import FOCI, FOCUS_FRACTIONS, SceneRules, pick_focus
from pixel_sail.refshapes.grounded_format import grounded_record, write_grounded
from pixel_sail.refshapes.groups import group_sentences
from pixel_sail.refshapes.kinds import HELD_OUT_PAIRS, SHAPES
from pixel_sail.refshapes.panoptic_format import write_panoptic
from pixel_sail.refshapes.queries import SceneExpression, is_put_to_the_test
from pixel_sail.refshapes.question_formats import caption, llava_record, osprey_record, perbench_record
from pixel_sail.refshapes.scene import Scene, SceneObject, encode_jpeg, paint_scene, sample_scene
from pixel_sail.refshapes.summary import summarize
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError, Json

SceneJob = tuple[str, int, int]
"""(split, index within the split, image id)."""

GENERATOR_VERSION = 5
"""Increment when the same seed no longer gives the same bytes."""
KIND_SPLITS = {f"val_{focus}": focus for focus in FOCI}
"""Splits whose expressions are decided by one kind of words only, see `is_put_to_the_test`."""
SCENE_RULES = {
    "train": SceneRules(),
    "val": SceneRules(),
    **{split: SceneRules(focus=focus) for split, focus in KIND_SPLITS.items()},
    "testA": SceneRules(one_shape=True),
    "testB": SceneRules(held_out=True),
}
SPLITS = tuple(SCENE_RULES)
NUM_SENTENCES = {"train": 16, "val": 6, "testA": 6, "testB": 6}
"""Maximum number of single-target expressions per image of a split."""
NUM_OF_KIND = (2, 3)
"""Minimum and maximum number of expressions per image in the splits of one kind."""
IMAGE_FOLDER = Path("images") / "train2014"
FULLY_ANNOTATED = ("train", "val", "testA")
"""Splits of which some images are also written in the larger formats."""
CATEGORY_ID = {shape: index + 1 for index, shape in enumerate(SHAPES)}


@dataclass(frozen=True, kw_only=True)
class RefShapesSpec:
    """Settings of a dataset; equal settings give equal bytes."""

    seed: int = 0
    num_train: int = 12000
    num_eval: int = 150
    """Images in each of the other splits."""
    num_fully_annotated: int = 300
    """Images of each split in FULLY_ANNOTATED that are also written in the larger formats: panoptic, Pix2Cap, grounded
    captions, MUSE, ReasonSeg."""

    def header(self) -> Json:
        """Return the part of meta.json that identifies a dataset."""
        return {
            "generator_version": GENERATOR_VERSION,
            "seed": self.seed,
            "num_images": {split: self.num_train if split == "train" else self.num_eval for split in SPLITS},
            "num_fully_annotated": self.num_fully_annotated,
            "attribute_cell_px": CELL_PX,
            "held_out": [list(pair) for pair in sorted(HELD_OUT_PAIRS)],
            "focus_shares": FOCUS_FRACTIONS,
        }

    def jobs(self) -> list[SceneJob]:
        """Return the job of every image; image ids count from 1 over all splits."""
        pairs = [(split, index) for split in SPLITS for index in range(self.header()["num_images"][split])]
        return [(split, index, image_id) for image_id, (split, index) in enumerate(pairs, start=1)]


def write_refshapes(
    out: Path, spec: RefShapesSpec, *, num_workers: int, on_image: Callable[[], object] = lambda: None
) -> bool:
    """Write the dataset and return True, or return False if `out` already contains exactly this dataset.

    Files are written to a sibling folder that is renamed at the end, so `out` is never incomplete. Raises: DataError if
    `out` exists and is something else.
    """
    if out.exists():
        check_same_spec(out, spec)
        return False
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial_out, ignore_errors=True)
    try:
        (partial_out / IMAGE_FOLDER).mkdir(parents=True)
        render = partial(_render_record, spec.seed, spec.num_fully_annotated, partial_out / IMAGE_FOLDER)
        records: list[Json] = []
        with closing(_run(render, spec.jobs(), num_workers)) as rendered:  # Stop workers before the folder is removed.
            for record in rendered:
                records.append(record)
                on_image()
        _write_files(partial_out, spec, records)
        partial_out.rename(out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return True


def check_same_spec(out: Path, spec: RefShapesSpec) -> None:
    """Raise DataError unless `out` is the dataset with these settings."""
    advice = "choose another --out, or move that folder away"
    if not (out / "meta.json").is_file():
        raise DataError(f"{out}: exists but holds no meta.json, expected a RefShapes folder or nothing; {advice}")
    meta = json.loads((out / "meta.json").read_text())
    version = meta.get("generator_version")
    if version != GENERATOR_VERSION:
        raise DataError(
            f"{out}: found RefShapes of generator version {version}, expected version {GENERATOR_VERSION} with "
            f"other scenes and the splits {', '.join(SPLITS)}; {advice}. What is there is not touched: its splits can "
            "still be trained on and scored"
        )
    for key, value in spec.header().items():
        if meta.get(key) != value:
            raise DataError(f"{out}/meta.json: {key} is {meta.get(key)!r}, expected {value!r} as asked for; {advice}")


def _run(render: Callable[[SceneJob], Json], jobs: list[SceneJob], num_workers: int) -> Generator[Json, None, None]:
    """Yield the records in the order of the jobs."""
    if num_workers <= 1:
        yield from map(render, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield from pool.imap(render, jobs, chunksize=8)


def sample_described_scene(
    seed: int, split: str, index: int
) -> tuple[np.random.Generator, Scene, list[SceneExpression]]:
    """Return the scene of one image, its single-target expressions, and the generator for everything else.

    Scenes without an expression of their focus are resampled.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    rules = replace(SCENE_RULES[split], focus=pick_focus(rng, SCENE_RULES[split]))
    fewest = NUM_OF_KIND[0] if split in KIND_SPLITS else 1
    while True:
        scene = sample_scene(rng, rules)
        sentences = _expressions(_describer(rng, scene, split), split)
        if sum(found.kind == scene.focus for found in sentences) >= fewest:
            return rng, scene, sentences


def _describer(rng: np.random.Generator, scene: Scene, split: str) -> Describer:
    return Describer(scene, rng, may_name_held_out=split == "testB")


def _expressions(describer: Describer, split: str) -> list[SceneExpression]:
    """Return the expressions of one image; in testB only about objects of a held-out kind."""
    scene = describer.scene
    if split in KIND_SPLITS:
        found = describer.singles(4 * NUM_OF_KIND[1])
        fitting = [item for item in found if item.kind == scene.focus and is_put_to_the_test(scene, item)]
        return fitting[: NUM_OF_KIND[1]]
    held_out = [item.index for item in scene.objects if item.is_held_out]
    return describer.singles(NUM_SENTENCES[split], held_out)


def _render_record(seed: int, num_fully_annotated: int, folder: Path, job: SceneJob) -> Json:
    """Render one image, write its JPEG, and return its entries of the annotation files, without global ids."""
    split, index, image_id = job
    rng, scene, sentences = sample_described_scene(seed, split, index)
    file_name = f"COCO_train2014_{image_id:012d}.jpg"
    (folder / file_name).write_bytes(encode_jpeg(paint_scene(rng, scene)))
    height, width = scene.image_hw
    record: Json = {
        "split": split,
        "focus": scene.focus,
        "image": {"id": image_id, "file_name": file_name, "height": height, "width": width},
        "objects": [_annotation(item) for item in scene.objects],
        "colours": [item.colour for item in scene.objects],
        "sentences": sentences,
    }
    if split not in KIND_SPLITS:
        record["grefs"] = _generalised(rng, _describer(rng, scene, split), 4 if split == "train" else 7)
    if split == "val":
        record["perbench"] = perbench_record(rng, scene, file_name)
    if split == "train":
        record["attributes"] = attribute_map(scene)
        record["osprey"] = osprey_record(rng, scene, record)
        record["llava"] = llava_record(rng, scene, record["image"])
        record["groups"] = group_sentences(rng, scene)
    if index < num_fully_annotated and split in FULLY_ANNOTATED:
        if split == "train":
            record["descriptions"] = [caption(scene, item) for item in scene.objects]
        # A separate generator, so that the other files have the same bytes whether or not these are written.
        own_rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
        record["grounded"] = grounded_record(own_rng, scene, record["image"])
    return record


def _annotation(item: SceneObject) -> Json:
    x0, y0, x1, y1 = item.box_xyxy
    return {"category_id": CATEGORY_ID[item.shape], "segmentation": encode_mask(item.mask), "area": item.area,
            "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}  # fmt: skip


def _generalised(rng: np.random.Generator, describer: Describer, count: int) -> list[SceneExpression]:
    """Return about `count` sentences: half with one target, three in ten with several, two in ten with none."""
    found: dict[str, SceneExpression] = {}
    for _ in range(count):
        roll = rng.random()
        for _ in range(12):
            if roll < 0.5:
                sentence = next(iter(describer.singles(1)), None)
            else:
                sentence = describer.plural() if roll < 0.8 else describer.no_target()
            if sentence is not None and sentence.text not in found:
                found[sentence.text] = sentence
                break
    return list(found.values())


def _write_files(out: Path, spec: RefShapesSpec, records: list[Json]) -> None:
    """Assign ids in order and write every file, meta.json last."""
    annotations: list[Json] = []
    for record in records:
        record["ann_ids"] = range(len(annotations) + 1, len(annotations) + 1 + len(record["objects"]))
        numbered = zip(record["ann_ids"], record["objects"], strict=True)
        annotations += [{"id": number, "image_id": record["image"]["id"], **item} for number, item in numbered]
    instances = {
        "info": {"description": "RefShapes", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": 1, "name": "drawn by pixel_sail", "url": ""}],
        "images": [record["image"] for record in records],
        "annotations": annotations,
        "categories": [{"id": index, "name": shape, "supercategory": "shape"} for shape, index in CATEGORY_ID.items()],
    }
    refs, grefs = _refs(records), _grefs(records, "grefs")
    _write_json(out / "grefshapes" / "grefs(unc).json", grefs)
    _write_json(out / "groupshapes" / "grefs(unc).json", _grefs(records, "groups"))
    written = json.dumps(instances)
    for folder in ("refshapes", "grefshapes", "groupshapes"):
        (out / folder).mkdir(exist_ok=True)
        (out / folder / "instances.json").write_text(written)
    # Through JSON: pickle writes a repeated string as a back reference, and strings of workers are never shared.
    (out / "refshapes" / "refs(unc).p").write_bytes(pickle.dumps(json.loads(json.dumps(refs)), protocol=2))
    rendered = {out / IMAGE_FOLDER / r["image"]["file_name"]: r["attributes"] for r in records if "attributes" in r}
    write_attribute_maps(out / "attribute_maps", rendered)
    perbench = [record["perbench"] for record in records if "perbench" in record]
    _write_json(out / "perbench" / "STBench_Detailed_Caption.json", [item["caption"] for item in perbench])
    _write_json(out / "perbench" / "STBench_MCQ.json", [item["mcq"] for item in perbench])
    _write_json(out / "perbench" / "STBench_VRES.json", [entry for item in perbench for entry in item["vres"]])
    osprey = [record["osprey"] for record in records if "osprey" in record]
    for name in ("conversation", "short_form", "detail_description"):
        _write_json(out / "osprey" / f"osprey_{name}.json", [item[name] for item in osprey])
    _write_json(out / "llava" / "llava_v1_5_mix665k.json", [item for r in records for item in r.get("llava", ())])
    write_panoptic(out, [record for record in records if "descriptions" in record], CATEGORY_ID)
    write_grounded(out, [record for record in records if "grounded" in record], out / IMAGE_FOLDER)
    num_refs = {
        name: Counter(ref["split"] for ref in found) for name, found in (("num_refs", refs), ("num_grefs", grefs))
    }
    _write_json(out / "meta.json", {**spec.header(), **summarize(SPLITS, records, num_refs)})


def _write_json(path: Path, value: Json | list[Json]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _sentences(texts: list[str], first_id: int) -> list[Json]:
    numbered = enumerate(texts, start=first_id)
    return [{"sent_id": number, "sent": text, "raw": text, "tokens": text.split()} for number, text in numbered]


def _refs(records: list[Json]) -> list[Json]:
    """Return the REFER entries: one per described object, with all its sentences."""
    refs: list[Json] = []
    next_sent_id = 1
    for record in records:
        for target in range(len(record["objects"])):
            found = [sentence for sentence in record["sentences"] if sentence.targets == (target,)]
            if not found:
                continue
            sentences = _sentences([sentence.text for sentence in found], next_sent_id)
            next_sent_id += len(sentences)
            ann_id, image = record["ann_ids"][target], record["image"]
            refs.append({
                "ref_id": len(refs) + 1, "ann_id": ann_id, "image_id": image["id"], "split": record["split"],
                "category_id": record["objects"][target]["category_id"],
                "file_name": image["file_name"].replace(".jpg", f"_{ann_id}.jpg"),
                "sent_ids": [sentence["sent_id"] for sentence in sentences], "sentences": sentences,
            })  # fmt: skip
    return refs


def _grefs(records: list[Json], key: str) -> list[Json]:
    """Return the gRefCOCO entries: one sentence each, with any number of targets."""
    grefs: list[Json] = []
    for record in records:
        for sentence in record.get(key, ()):
            number, targets, image = len(grefs) + 1, sentence.targets, record["image"]
            grefs.append({
                "ref_id": number, "image_id": image["id"], "file_name": image["file_name"], "split": record["split"],
                "sentences": _sentences([sentence.text], number), "sent_ids": [number],
                "category_id": [record["objects"][index]["category_id"] for index in targets] or [-1],
                "ann_id": [record["ann_ids"][index] for index in targets] or [-1],
                "no_target": not targets,
            })  # fmt: skip
    return grefs

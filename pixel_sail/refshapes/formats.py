"""Writers of RefShapes: the scenes of all splits in the on-disk formats of the public datasets they stand in for.

Place in the flow: the top of the package; `tools/make_refshapes.py` calls `write_refshapes`, which leaves this folder:

    images/train2014/COCO_train2014_000000000001.jpg
    refshapes/refs(unc).p, instances.json             REFER (RefCOCO)
    grefshapes/grefs(unc).json, instances.json        gRefCOCO: one, several or no target
    groupshapes/grefs(unc).json, instances.json       gRefCOCO: all objects with one attribute, train images
    perbench/STBench_{Detailed_Caption,MCQ,VRES}.json PerBench, from val images
    osprey/osprey_{conversation,short_form,detail_description}.json   Osprey, from train images
    llava/llava_v1_5_mix665k.json                     LLaVA-1.5, from train images and without image
    meta.json                                         what was asked for, and counts

One entry of the refs, as an example of the data:

    {"ref_id": 7, "ann_id": 12, "image_id": 2, "category_id": 4, "split": "train", "sent_ids": [19],
     "file_name": "COCO_train2014_000000000002_12.jpg",
     "sentences": [{"sent_id": 19, "sent": "red star", "raw": "red star", "tokens": ["red", "star"]}]}

Each image depends on (seed, split, index) alone and ids are given out afterwards, in order: the same seed writes the
same bytes whatever the number of workers.
"""

import json
import math
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.refshapes.expressions import Describer, Sentence
from pixel_sail.refshapes.groups import group_sentences
from pixel_sail.refshapes.scene import (
    HELD_OUT,
    SHAPES,
    VALUES,
    Scene,
    SceneObject,
    SceneRules,
    encode_jpeg,
    pick,
    sample_scene,
)
from pixel_sail.types import RLE, BoolMask, DataError

Json = dict[str, Any]
"""One item of an annotation file, as written."""
Job = tuple[str, int, int]
"""(split, index within the split, image id)."""

GENERATOR_VERSION = 1
"""Raise this whenever the same seed no longer gives the same bytes."""
SPLITS = ("train", "val", "testA", "testB")
RULES = {
    "train": SceneRules(num_objects=(3, 5)),
    "val": SceneRules(num_objects=(3, 5)),
    "testA": SceneRules(num_objects=(4, 6)),
    "testB": SceneRules(num_objects=(3, 5), num_held_out=(2, 3)),
}
IMAGE_FOLDER = Path("images") / "train2014"
CATEGORY_ID = {shape: index + 1 for index, shape in enumerate(SHAPES)}


@dataclass(frozen=True, kw_only=True)
class RefShapesSpec:
    """What is asked for; equal specs give equal bytes."""

    seed: int = 0
    num_train: int = 8000
    num_eval: int = 150
    """Images in each of val, testA and testB."""

    def header(self) -> Json:
        """Return the part of meta.json that identifies a dataset."""
        return {
            "generator_version": GENERATOR_VERSION,
            "seed": self.seed,
            "num_images": {split: self.num_train if split == "train" else self.num_eval for split in SPLITS},
            "held_out": [list(pair) for pair in sorted(HELD_OUT)],
        }

    def jobs(self) -> list[Job]:
        """Return the job of every image; image ids count from 1 over all splits."""
        pairs = [(split, index) for split in SPLITS for index in range(self.header()["num_images"][split])]
        return [(split, index, image_id) for image_id, (split, index) in enumerate(pairs, start=1)]


def write_refshapes(
    out: Path, spec: RefShapesSpec, *, num_workers: int, on_image: Callable[[], object] = lambda: None
) -> bool:
    """Write the dataset and return True, or return False if `out` already holds exactly this dataset.

    Everything is written to a sibling folder that is renamed at the end, so `out` is never half-written.
    Raises: DataError if `out` exists and is something else.
    """
    if out.exists():
        check_same(out, spec)
        return False
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial_out, ignore_errors=True)
    try:
        (partial_out / IMAGE_FOLDER).mkdir(parents=True)
        draw = partial(_draw_record, spec.seed, partial_out / IMAGE_FOLDER)
        records: list[Json] = []
        with closing(_run(draw, spec.jobs(), num_workers)) as drawn:  # Workers must stop before the folder goes.
            for record in drawn:
                records.append(record)
                on_image()
        _write_files(partial_out, spec, records)
        partial_out.rename(out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return True


def check_same(out: Path, spec: RefShapesSpec) -> None:
    """Raise DataError unless `out` holds the dataset that `spec` asks for."""
    advice = "choose another --out, or move that folder away"
    if not (out / "meta.json").is_file():
        raise DataError(f"{out}: exists but holds no meta.json, expected a RefShapes folder or nothing; {advice}")
    meta = json.loads((out / "meta.json").read_text())
    for key, value in spec.header().items():
        if meta.get(key) != value:
            raise DataError(f"{out}/meta.json: {key} is {meta.get(key)!r}, expected {value!r} as asked for; {advice}")


def _run(draw: Callable[[Job], Json], jobs: list[Job], num_workers: int) -> Generator[Json, None, None]:
    """Yield the records in the order of the jobs."""
    if num_workers <= 1:
        yield from map(draw, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield from pool.imap(draw, jobs, chunksize=8)


def _draw_record(seed: int, folder: Path, job: Job) -> Json:
    """Draw one image, write its JPEG, and return everything the annotation files say about it, without global ids."""
    split, index, image_id = job
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, RULES[split])
    file_name = f"COCO_train2014_{image_id:012d}.jpg"
    (folder / file_name).write_bytes(encode_jpeg(scene))
    describer = Describer(scene, rng, may_name_held_out=split == "testB")
    record: Json = {
        "split": split,
        "image": {
            "id": image_id,
            "file_name": file_name,
            **dict(zip(("height", "width"), scene.image_hw, strict=True)),
        },
        "objects": [_annotation(item) for item in scene.objects],
        "refs": [describer.singles(target, 3) for target in _ref_targets(rng, scene, split)],
        "grefs": _generalised(rng, describer, 4 if split == "train" else 7),
    }
    if split == "val":
        record["perbench"] = _perbench(rng, scene, file_name)
    if split == "train":
        record["osprey"] = _osprey(rng, scene, record)
        record["llava"] = _llava(rng, scene, record["image"])
        record["groups"] = group_sentences(rng, scene)
    return record


def encode_mask(mask: BoolMask) -> RLE:
    """Return a mask as a compressed COCO RLE whose counts are text."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _annotation(item: SceneObject) -> Json:
    x0, y0, x1, y1 = item.box_xyxy
    return {"category_id": CATEGORY_ID[item.shape], "segmentation": encode_mask(item.mask), "area": item.area,
            "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}  # fmt: skip


def _ref_targets(rng: np.random.Generator, scene: Scene, split: str) -> list[int]:
    """Return which objects get refs: all in train, three in val and testA, mostly held-out kinds in testB."""
    order = rng.permutation(len(scene.objects)).tolist()
    if split == "testB":
        held_out = [index for index in order if scene.objects[index].is_held_out]
        return held_out + [index for index in order if index not in held_out][: int(rng.random() < 0.3)]
    return order if split == "train" else order[:3]


def _generalised(rng: np.random.Generator, describer: Describer, count: int) -> list[Sentence]:
    """Return about `count` sentences, half with one target, three in ten with several, two in ten with none."""
    found: dict[str, Sentence] = {}
    for _ in range(count):
        roll = rng.random()
        for _ in range(12):
            if roll < 0.5:
                sentence = next(iter(describer.singles(int(rng.integers(len(describer.scene.objects))), 1)), None)
            else:
                sentence = describer.plural() if roll < 0.8 else describer.no_target()
            if sentence is not None and sentence.text not in found:
                found[sentence.text] = sentence
                break
    return list(found.values())


def _spot(scene: Scene, item: SceneObject) -> str:
    """Return in which ninth of the picture an object stands."""
    height, width = scene.image_hw
    row = ("top ", "middle ", "bottom ")[min(2, int(item.centre_xy[1] / height * 3))]
    column = ("left", "center", "right")[min(2, int(item.centre_xy[0] / width * 3))]
    return (row + column).replace("middle center", "center")


def _caption(scene: Scene, item: SceneObject) -> str:
    """Describe one object completely."""
    others = (other for other in scene.objects if other is not item)
    near = min(others, key=lambda other: math.dist(other.centre_xy, item.centre_xy))
    look = f"A {item.size} {item.texture} {item.colour} {item.shape} in the {_spot(scene, item)} of the image"
    return f"{look}, nearest to a {near.size} {near.colour} {near.shape}."


def _perbench(rng: np.random.Generator, scene: Scene, file_name: str) -> Json:
    chosen = [scene.objects[index] for index in rng.permutation(len(scene.objects)).tolist()[:3]]
    mcqs: list[Json] = []
    for item in chosen:
        name = pick(rng, tuple(VALUES))
        value = getattr(item, name)
        wrong = [other for other in rng.permutation(VALUES[name]).tolist() if other != value]
        options = rng.permutation([value, *wrong[:3]]).tolist()
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
        question = f"What is the {name} of the marked object?\n" + "\n".join(lines) + "\n"
        mcqs.append({"object": encode_mask(item.mask), "question": question, "answer": lines[options.index(value)]})
    captions = [{"segmentation": encode_mask(item.mask), "caption": _caption(scene, item)} for item in chosen]
    named = {"image_name": file_name}
    vres = [{**named, **item} for item in _vres(rng, scene)]
    return {"caption": {**named, "object_annotations": captions}, "mcq": {**named, "mcqs": mcqs}, "vres": vres}


def _vres(rng: np.random.Generator, scene: Scene) -> list[Json]:
    """Return up to two questions that point at one object and ask for the only other one sharing an attribute."""
    items: list[Json] = []
    for index in rng.permutation(len(scene.objects)).tolist():
        prompt, name = scene.objects[index], pick(rng, tuple(VALUES))
        same = [item for item in scene.objects if item is not prompt and getattr(item, name) == getattr(prompt, name)]
        if len(same) == 1 and len(items) < 2:
            segmentations = {"<obj0>": encode_mask(prompt.mask), "<obj1>": encode_mask(same[0].mask)}
            question = f"Please segment the other object of the same {name} as <obj0>."
            items.append({"question": question, "answer": "It is <obj1>.", "segmentations": segmentations})
    return items


def _osprey(rng: np.random.Generator, scene: Scene, record: Json) -> Json:
    """Return one item of each Osprey file about two to four of the image's objects, called <region1> and so on."""
    order = rng.permutation(len(scene.objects)).tolist()[: int(rng.integers(2, 5))]
    chosen = [scene.objects[index] for index in order]
    regions = [{key: record["objects"][index][key] for key in ("segmentation", "bbox")} for index in order]
    base = {**{key: record["image"][key] for key in ("file_name", "height", "width")}, "annotation": regions}
    talk, short = [], []
    for number, item in enumerate(chosen, start=1):
        name = pick(rng, tuple(VALUES))
        short += _turn(f"What is the {name} of <region{number}>?", getattr(item, name))
        talk += _turn(f"What is <region{number}>?", f"It is a {item.texture} {item.colour} {item.shape}.")
    name = pick(rng, ("colour", "shape", "size"))
    first, second = (getattr(item, name) for item in chosen[:2])
    reason = f"Yes, both are {first}." if first == second else f"No, {first} and {second}."
    talk += _turn(f"Do <region1> and <region2> have the same {name}?", reason)
    captions = [_caption(scene, item) for item in chosen]
    described = [f"<region{number}>: {caption}" for number, caption in enumerate(captions, start=1)]
    detail = [_turn(f"Please describe <region{number}> in detail.", text) for number, text in enumerate(captions, 1)]
    description = {"conversations": [message for turn in detail for message in turn], "description": described}
    conversations = {"conversation": {"conversations": talk}, "short_form": {"conversations": short}}
    return {name: {**base, **rest} for name, rest in (conversations | {"detail_description": description}).items()}


def _turn(question: str, answer: str) -> list[Json]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _llava(rng: np.random.Generator, scene: Scene, image: Json) -> list[Json]:
    """Return one conversation about the whole image and, for one image in five, one without any image."""
    shape = pick(rng, SHAPES)
    colour = pick(rng, scene.objects).colour if rng.random() < 0.7 else pick(rng, VALUES["colour"])
    item = pick(rng, scene.objects)
    colours, shapes = ([getattr(other, name) for other in scene.objects] for name in ("colour", "shape"))
    turns = [
        _turn(f"How many {colour} objects are there?", str(colours.count(colour))),
        _turn(f"Is there a {shape} in the image?", "Yes" if shape in shapes else "No"),
        _turn("How many objects are there in total?", str(len(scene.objects))),
    ]
    if shapes.count(item.shape) == 1:
        turns.append(_turn(f"Where is the {item.shape}?", f"In the {_spot(scene, item)} of the image."))
        turns.append(_turn(f"What is the colour of the {item.shape}?", item.colour.capitalize()))
    talk = [message for i in rng.permutation(len(turns)).tolist()[:3] for message in turns[i]]
    talk[0] = {**talk[0], "value": "<image>\n" + talk[0]["value"]}
    name = f"{image['id']:012d}"
    with_image = {"id": name, "image": f"train2014/{image['file_name']}", "conversations": talk}
    text_only = {"id": f"text-{name}", "conversations": _text_turn(rng)}
    return [with_image, text_only] if rng.random() < 0.2 else [with_image]


def _text_turn(rng: np.random.Generator) -> list[Json]:
    first, second = (int(value) for value in rng.integers(1, 20, 2))
    shape, count = pick(rng, (("square", "four"), ("triangle", "three"), ("circle", "no straight")))
    options = (
        (f"What is {first} plus {second}?", f"{first} plus {second} is {first + second}."),
        (f"What is {max(first, second)} minus {min(first, second)}?", f"It is {abs(first - second)}."),
        (f"How many sides does a {shape} have?", f"A {shape} has {count} sides."),
    )
    return _turn(*pick(rng, options))


def _write_files(out: Path, spec: RefShapesSpec, records: list[Json]) -> None:
    """Give out ids in order and write every file; meta.json comes last."""
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
    for folder in ("refshapes", "grefshapes", "groupshapes"):
        _write_json(out / folder / "instances.json", instances)
    # Through JSON, as pickle writes a string seen before as a back reference, and workers' strings are never shared.
    (out / "refshapes" / "refs(unc).p").write_bytes(pickle.dumps(json.loads(json.dumps(refs)), protocol=2))
    perbench = [record["perbench"] for record in records if "perbench" in record]
    _write_json(out / "perbench" / "STBench_Detailed_Caption.json", [item["caption"] for item in perbench])
    _write_json(out / "perbench" / "STBench_MCQ.json", [item["mcq"] for item in perbench])
    _write_json(out / "perbench" / "STBench_VRES.json", [entry for item in perbench for entry in item["vres"]])
    osprey = [record["osprey"] for record in records if "osprey" in record]
    for name in ("conversation", "short_form", "detail_description"):
        _write_json(out / "osprey" / f"osprey_{name}.json", [item[name] for item in osprey])
    _write_json(out / "llava" / "llava_v1_5_mix665k.json", [item for r in records for item in r.get("llava", ())])
    _write_json(out / "meta.json", {**spec.header(), **_counts(records, refs, grefs)})


def _write_json(path: Path, value: Json | list[Json]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _sentences(texts: list[str], first_id: int) -> list[Json]:
    numbered = enumerate(texts, start=first_id)
    return [{"sent_id": number, "sent": text, "raw": text, "tokens": text.split()} for number, text in numbered]


def _refs(records: list[Json]) -> list[Json]:
    """Return the REFER entries: one per described object, with up to three sentences."""
    refs: list[Json] = []
    next_sent_id = 1
    for record in records:
        for found in filter(None, record["refs"]):
            target = found[0].targets[0]
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


def _counts(records: list[Json], refs: list[Json], grefs: list[Json]) -> Json:
    """Count what was written, by split and by kind of sentence."""
    return {
        "num_refs": Counter(ref["split"] for ref in refs),
        "num_sentences": Counter(ref["split"] for ref in refs for _ in ref["sent_ids"]),
        "num_grefs": Counter(ref["split"] for ref in grefs),
        "ref_kinds": Counter(
            sorted(found.kind for record in records for several in record["refs"] for found in several)
        ),
        "gref_kinds": Counter(sorted(found.kind for record in records for found in record["grefs"])),
    }

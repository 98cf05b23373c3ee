"""Writes RefShapes in the formats of grounded captions, MUSE and ReasonSeg.

`formats.py` calls `grounded_record` for the entries of an image and finally `write_grounded` for these files:

    glamm_data/annotations/{GranDf_HA,OpenPsg,RefCOCOg,flickr_mergedGT}..._train.json   train images, as named below
    glamm_data/annotations/gcg_val_test/{val,test}_gcg_coco_{mask,caption}_gt.json      val and testA images
    muse/MUSE_train.json                                                                train images
    reason_seg/{train,val,test}/<image>.jpg and .json                                   with copies of the images

An image with two red stars and a blue ring may contribute, for example:

    {"file_name": "COCO_train2014_000000000001.jpg", "height": 128, "width": 128, "image_id": "1",
     "caption": "Two red stars and a blue ring on a dull background.",
     "groundings": {"Two red stars": {"token_positives": [0, 13], "rle_masks": [{...}, {...}]},
                    "a blue ring": {"token_positives": [18, 29], "rle_masks": [{...}]}, "a dull background": null}}
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from pixel_sail.refshapes.kinds import SHAPES, pick
from pixel_sail.refshapes.scene import Scene, SceneObject
from pixel_sail.rle import encode_mask
from pixel_sail.types import RLE, BoolMask, Json

NamedObjects = tuple[str, list[SceneObject]]
"""A phrase and its objects."""

PHRASE_ATTRIBUTES = (("colour", "shape"), ("shape",), ("size", "colour", "shape"), ("texture", "colour", "shape"))
"""Attributes in the phrases of one caption."""

COUNTS = ("no", "a", "two", "three", "four", "five", "six")
BACKGROUND_PHRASE = "a dull background"
"""Phrase in captions without a mask."""

BENCHMARK_SPLITS = {"val": "val", "testA": "test"}
"""Split of RefShapes -> split of the benchmark files."""

NUM_REASON_TRAIN = 239
"""Maximum training images of the ReasonSeg folder, as in the real dataset."""


def grounded_record(rng: np.random.Generator, scene: Scene, image: Json) -> Json:
    """Return the entries of an image for each file; `image` has id, file_name, height and width."""
    return {
        "grandf": _grandf(*_caption(rng, scene), image),
        "refcocog": _refcocog(rng, *_caption(rng, scene), image),
        "flickr": _flickr(*_caption(rng, scene), image),
        "muse": _muse(rng, scene, image),
        "reason": _reason(rng, scene, image),
    }


def write_grounded(out: Path, records: Sequence[Json], image_folder: Path) -> None:
    """Write all files below `out`; a record has `split`, `image` and, as `grounded`, the result of `grounded_record`.

    `image_folder`: folder of the images. OpenPSG gets every second training image, GranD-f the others.
    """
    train = [record for record in records if record["split"] == "train" and "grounded" in record]
    items = {name: [record["grounded"][name] for record in train] for name in ("grandf", "refcocog", "muse")}
    annotations = out / "glamm_data" / "annotations"
    _write_json(annotations / "GranDf_HA_GCG_train.json", items["grandf"][::2])
    _write_json(annotations / "OpenPsgGCG_train.json", items["grandf"][1::2])
    _write_json(annotations / "RefCOCOg_GCG_train.json", items["refcocog"])
    _write_json(annotations / "flickr_mergedGT_GCG_train.json", _flickr_file([r["grounded"]["flickr"] for r in train]))
    _write_json(out / "muse" / "MUSE_train.json", items["muse"])
    _write_reason(out / "reason_seg" / "train", train[:NUM_REASON_TRAIN], image_folder)
    for split, name in BENCHMARK_SPLITS.items():
        scored = [record for record in records if record["split"] == split and "grounded" in record]
        masks, captions = _benchmark_files([record["grounded"]["grandf"] for record in scored])
        _write_json(annotations / "gcg_val_test" / f"{name}_gcg_coco_mask_gt.json", masks)
        _write_json(annotations / "gcg_val_test" / f"{name}_gcg_coco_caption_gt.json", captions)
        _write_reason(out / "reason_seg" / name, scored, image_folder)


def rectangles(mask: BoolMask) -> list[tuple[int, int, int, int]]:
    """Return disjoint boxes (x0, y0, x1, y1), with exclusive ends, whose union is the mask."""
    boxes: list[tuple[int, int, int, int]] = []
    open_boxes: dict[tuple[int, int], int] = {}
    padded = np.pad(mask, ((0, 1), (1, 1))).astype(np.int8)
    for y, row in enumerate(padded):
        steps = np.flatnonzero(np.diff(row)).tolist()
        runs = set(zip(steps[::2], steps[1::2], strict=True))
        for run in [run for run in open_boxes if run not in runs]:
            boxes.append((run[0], open_boxes.pop(run), run[1], y))
        for run in sorted(runs - set(open_boxes)):
            open_boxes[run] = y
    return sorted(boxes)


def _polygons(mask: BoolMask) -> list[list[int]]:
    """Return COCO polygons that decode to exactly this mask, holes included."""
    return [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in rectangles(mask)]


def _uncompressed(mask: BoolMask) -> RLE:
    """Return the run lengths in column order, background first."""
    flat = np.concatenate(([False], mask.ravel(order="F"), [False]))
    steps = np.flatnonzero(np.diff(flat)).tolist()
    counts = [end - start for start, end in zip([0, *steps], [*steps, mask.size], strict=True)]
    return {"size": list(mask.shape), "counts": counts if counts[-1] else counts[:-1]}


def _box(item: SceneObject) -> list[int]:
    x0, y0, x1, y1 = item.box_xyxy
    return [x0, y0, x1 - x0, y1 - y0]


def _groups(rng: np.random.Generator, scene: Scene) -> list[NamedObjects]:
    """Return all objects in groups with one phrase each, at a level of detail sampled for the whole caption."""
    details = pick(rng, PHRASE_ATTRIBUTES)
    by_words: dict[str, list[SceneObject]] = {}
    for item in scene.objects:
        words = [str(getattr(item, name)) for name in details]
        by_words.setdefault(" ".join(word for word in words if word != "plain"), []).append(item)
    return [(_counted(words, len(items)), items) for words, items in by_words.items()]


def _counted(words: str, count: int) -> str:
    """Return "a red star", "an orange cross" or "two red stars"."""
    if count > 1:
        return f"{COUNTS[count]} {words}{'es' if words.endswith('s') else 's'}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _caption(rng: np.random.Generator, scene: Scene) -> tuple[str, list[NamedObjects]]:
    """Return a caption and its phrases, verbatim and in its order."""
    groups = [(phrase, items) for phrase, items in _groups(rng, scene)]
    phrases = [phrase for phrase, _ in groups]
    listed = " and ".join([*([", ".join(phrases[:-1])] if len(phrases) > 1 else []), phrases[-1]])
    if rng.random() < 0.5:
        return f"The image shows {listed} on {BACKGROUND_PHRASE}.", groups
    first = groups[0][0][0].upper() + groups[0][0][1:]
    return f"{listed[0].upper()}{listed[1:]} on {BACKGROUND_PHRASE}.", [(first, groups[0][1]), *groups[1:]]


def _spans(caption: str, groups: list[NamedObjects]) -> list[list[int]]:
    """Return the span of each phrase; phrases are in reading order, so each is searched after the previous one."""
    spans, end = [], 0
    for phrase, _ in groups:
        start = caption.index(phrase, end)
        end = start + len(phrase)
        spans.append([start, end])
    return spans


def _grandf(caption: str, groups: list[NamedObjects], image: Json) -> Json:
    groundings: Json = {
        phrase: {"token_positives": span, "rle_masks": [encode_mask(item.mask) for item in items]}
        for span, (phrase, items) in zip(_spans(caption, groups), groups, strict=True)
    }
    size = {key: image[key] for key in ("file_name", "height", "width")}
    return {
        **size,
        "image_id": str(image["id"]),
        "caption": caption,
        "groundings": {**groundings, BACKGROUND_PHRASE: None},
    }


def _refcocog(rng: np.random.Generator, caption: str, groups: list[NamedObjects], image: Json) -> Json:
    """Return the refs in random order, as their position in the caption is not stated."""
    refs = []
    for i in rng.permutation(len(groups)).tolist():
        phrase, items = groups[i]
        polygons = [polygon for item in items for polygon in _polygons(item.mask)]
        refs.append({"sentence": phrase, "bbox": _box(items[0]), "segmentation": polygons})
    return {str(image["id"]): {"img_file_name": image["file_name"], "caption": f'"{caption}"', "refs": refs}}


def _flickr(caption: str, groups: list[NamedObjects], image: Json) -> Json:
    annotations = [
        {"bbox": _box(item), "area": item.area, "tokens_positive": [span], "sam_mask": encode_mask(item.mask)}
        for span, (_, items) in zip(_spans(caption, groups), groups, strict=True)
        for item in items
    ]
    return {"image": {**image, "caption": caption}, "annotations": annotations}


def _flickr_file(items: list[Json]) -> Json:
    annotations = [{"image_id": item["image"]["id"], **rest} for item in items for rest in item["annotations"]]
    numbered = [{"id": i, "category_id": 1, "iscrowd": 0, **rest} for i, rest in enumerate(annotations, start=1)]
    return {
        "images": [item["image"] for item in items],
        "annotations": numbered,
        "categories": [{"id": 1, "name": "object"}],
    }


def _muse(rng: np.random.Generator, scene: Scene, image: Json) -> Json:
    """Return up to two questions; the first has an answer text, the second has none."""
    questions: list[str] = []
    answers: list[list[Json]] = []
    texts: list[str | None] = []
    for name in rng.permutation(["colour", "shape", "size"]).tolist()[:2]:
        value = getattr(pick(rng, scene.objects), name)
        items = [item for item in scene.objects if getattr(item, name) == value]
        as_rle = rng.random() < 0.5
        questions.append(f"Which objects have the {name} called {value}?")
        answers.append([
            {"segmentation": _uncompressed(item.mask) if as_rle else _polygons(item.mask), "category_name": item.shape,
             "rephrased_name": f"{item.colour} {item.shape}"}
            for item in items
        ])  # fmt: skip
        texts.append(None if texts else "Look at " + ", ".join(f"the {item.shape} {{seg}}" for item in items) + ".")
    size = {key: image[key] for key in ("file_name", "height", "width")}
    listed = [{"category_id": SHAPES.index(item.shape) + 1, "bbox": _box(item)} for item in scene.objects]
    return {**size, "ann_list": listed, "questions": questions, "answers": answers, "text_answers": texts}


def _reason(rng: np.random.Generator, scene: Scene, image: Json) -> Json:
    """Return a LabelMe file: every object of one color and shape, sometimes with another one to be ignored."""
    chosen = pick(rng, scene.objects)
    targets = [item for item in scene.objects if (item.colour, item.shape) == (chosen.colour, chosen.shape)]
    others = [item for item in scene.objects if all(item is not target for target in targets)]
    is_sentence = bool(rng.random() < 0.5)
    look = f"{chosen.colour} and has the form of a {chosen.shape}"
    texts = [
        f"If somebody asked for everything that is {look}, what would you hand over?",
        f"Which part of the scene must go when all that is {look} is taken away?",
        f"What would be found by a search for anything that is {look}?",
    ]
    shapes = [shape for item in targets for shape in _shapes("target", item, image)]
    if others and rng.random() < 0.4:
        shapes += _shapes("ignore", pick(rng, others), image)
    if rng.random() < 0.1:
        shapes += _shapes("flag", chosen, image)[:1]
    return {
        "text": texts if is_sentence else [f"the thing that is {look}"],
        "is_sentence": is_sentence,
        "shapes": shapes,
    }


def _shapes(label: str, item: SceneObject, image: Json) -> list[Json]:
    """Return LabelMe polygons that, painted with their outline, are exactly the object."""
    rest = {"labels": [label], "shape_type": "polygon", "image_name": image["file_name"], "group_id": None,
            "group_ids": [None], "flags": {}}  # fmt: skip
    corners = [(x0, y0, x1 - 1, y1 - 1) for x0, y0, x1, y1 in rectangles(item.mask)]
    points = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1]] for x0, y0, x1, y1 in corners]
    return [{"label": label, "points": [[float(x), float(y)] for x, y in polygon], **rest} for polygon in points]


def _benchmark_files(items: list[Json]) -> tuple[Json, Json]:
    """Return the mask file and the caption file for the captions of one split."""
    images, captions, masks = [], [], []
    for item in items:
        image_id = Path(item["file_name"]).stem
        images.append({"id": image_id, "height": item["height"], "width": item["width"]})
        found = {phrase: value for phrase, value in item["groundings"].items() if value is not None}
        captions.append({"image_id": image_id, "caption": item["caption"], "labels": list(found)})
        for value in found.values():
            united = coco_mask.merge(value["rle_masks"], intersect=False)
            rle = {"size": united["size"], "counts": united["counts"].decode("ascii")}
            area, box = int(coco_mask.area(united)), coco_mask.toBbox(united).tolist()
            masks.append({"image_id": image_id, "category_id": 1, "segmentation": rle, "area": area, "bbox": box})
    categories = [{"id": 1, "name": "object"}]
    numbered = [{"id": i, "iscrowd": 0, **mask} for i, mask in enumerate(masks, start=1)]
    texts = [{"id": i, **caption} for i, caption in enumerate(captions, start=1)]
    return (
        {"images": images, "annotations": numbered, "categories": categories},
        {"images": [{"id": image["id"]} for image in images], "annotations": texts},
    )


def _write_reason(folder: Path, records: Sequence[Json], image_folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        image = image_folder / record["image"]["file_name"]
        shutil.copyfile(image, folder / image.name)
        _write_json((folder / image.name).with_suffix(".json"), record["grounded"]["reason"])


def _write_json(path: Path, value: Json | list[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

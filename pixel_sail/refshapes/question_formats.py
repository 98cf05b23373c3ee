"""Writes RefShapes in the formats of questions about regions and whole images: PerBench, Osprey, LLaVA.

`formats.py` calls it for the entries of each image. For example:

    {"file_name": "COCO_train2014_000000000006.jpg", "height": 144, "width": 112, "annotation": [{"segmentation": {...},
     "bbox": [54, 84, 51, 51]}], "conversations": [{"from": "human", "value": "What is the shape of <region1>?"},
     {"from": "gpt", "value": "square"}]}
"""

import math

import numpy as np

from pixel_sail.refshapes.kinds import SHAPES, VALUES, pick
from pixel_sail.refshapes.scene import Scene, SceneObject
from pixel_sail.rle import encode_mask
from pixel_sail.types import Json


def _spot(scene: Scene, item: SceneObject) -> str:
    """Return in which ninth of the image an object is."""
    height, width = scene.image_hw
    row = ("top ", "middle ", "bottom ")[min(2, int(item.centre_xy[1] / height * 3))]
    column = ("left", "center", "right")[min(2, int(item.centre_xy[0] / width * 3))]
    return (row + column).replace("middle center", "center")


def caption(scene: Scene, item: SceneObject) -> str:
    """Describe one object completely."""
    others = (other for other in scene.objects if other is not item)
    near = min(others, key=lambda other: math.dist(other.centre_xy, item.centre_xy))
    look = f"A {item.size} {item.texture} {item.colour} {item.shape} in the {_spot(scene, item)} of the image"
    return f"{look}, nearest to a {near.size} {near.colour} {near.shape}."


def perbench_record(rng: np.random.Generator, scene: Scene, file_name: str) -> Json:
    """Return the entries of one image in PerBench's three files."""
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
    captions = [{"segmentation": encode_mask(item.mask), "caption": caption(scene, item)} for item in chosen]
    named = {"image_name": file_name}
    vres = [{**named, **item} for item in _vres(rng, scene)]
    return {"caption": {**named, "object_annotations": captions}, "mcq": {**named, "mcqs": mcqs}, "vres": vres}


def _vres(rng: np.random.Generator, scene: Scene) -> list[Json]:
    """Return up to two questions that refer to one object and request the only other one sharing an attribute."""
    items: list[Json] = []
    for index in rng.permutation(len(scene.objects)).tolist():
        prompt = scene.objects[index]
        same = {name: [o for o in scene.objects if getattr(o, name) == getattr(prompt, name)] for name in VALUES}
        names = [name for name, found in same.items() if len(found) == 2]
        if names and len(items) < 2:
            name = pick(rng, names)
            other = next(item for item in same[name] if item is not prompt)
            segmentations = {"<obj0>": encode_mask(prompt.mask), "<obj1>": encode_mask(other.mask)}
            question = f"Please segment the other object of the same {name} as <obj0>."
            items.append({"question": question, "answer": "It is <obj1>.", "segmentations": segmentations})
    return items


def osprey_record(rng: np.random.Generator, scene: Scene, record: Json) -> Json:
    """Return one item of each Osprey file about two to four of the image's objects, named `<region1>` and so on."""
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
    captions = [caption(scene, item) for item in chosen]
    described = [f"<region{number}>: {caption}" for number, caption in enumerate(captions, start=1)]
    detail = [_turn(f"Please describe <region{number}> in detail.", text) for number, text in enumerate(captions, 1)]
    description = {"conversations": [message for turn in detail for message in turn], "description": described}
    conversations = {"conversation": {"conversations": talk}, "short_form": {"conversations": short}}
    return {name: {**base, **rest} for name, rest in (conversations | {"detail_description": description}).items()}


def _turn(question: str, answer: str) -> list[Json]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava_record(rng: np.random.Generator, scene: Scene, image: Json) -> list[Json]:
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

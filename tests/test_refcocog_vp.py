"""Referring expressions are used as answers about marked objects, and every sentence is reached."""

import json
import re
from collections import Counter

import numpy as np
from region_samples import get
from shared_data import shared_data

from pixel_sail.data.images import load_image
from pixel_sail.data.refer_annotations import load_refer
from pixel_sail.data.sources import refcocog_vp
from pixel_sail.data.templates.region import SHORT_QUESTIONS


def _refer_root(tmp_path, refs):
    folder = tmp_path / "toy"
    folder.mkdir()
    square = [0, 0, 2, 0, 2, 2, 0, 2]
    instances = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 8} for i in (1, 2)],
        "annotations": [
            {"id": 10, "image_id": 1, "segmentation": [square]},
            {"id": 11, "image_id": 1, "segmentation": [[x + 4 * (i % 2 == 0) for i, x in enumerate(square)]]},
            {"id": 20, "image_id": 2, "segmentation": [square]},
        ],
    }
    refs = [
        {"ref_id": i, "image_id": image, "ann_id": ann, "split": "train",
         "sentences": [{"sent_id": 10 * i + k, "sent": text, "raw": text} for k, text in enumerate(texts)]}
        for i, (image, ann, texts) in enumerate(refs)
    ]  # fmt: skip
    (folder / "grefs(x).json").write_text(json.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(instances))
    return tmp_path


REFS = [(1, [10], ["The A.", "first"]), (1, [11], ["the B", " . "]), (1, [10], ["the a", "Third .."]),
        (2, [-1], ["nothing"]), (1, [10, 11], ["both"])]  # fmt: skip


def test_every_sentence_of_every_object_is_reached_with_its_mask(tmp_path, caplog):
    source = refcocog_vp.load(root=_refer_root(tmp_path, REFS), dataset="toy", name="vp", absent_fraction=0.0)
    assert len(source) == 1  # the other image has nothing that could be marked
    assert "skipped 3 of 8 sentences" in caplog.text
    area = {"the a": 4, "first": 4, "third .": 4, "the b": 4, "both": 8}
    column = {"the a": 0, "first": 0, "third .": 0, "the b": 4, "both": 0}
    seen, counts = Counter(), Counter()
    for seed in range(300):
        sample = get(source, seed=seed)
        masks = {prompt.prompt_id: prompt.mask for prompt in sample.prompts}
        assert len(masks) == len(sample.turns)
        for turn in sample.turns:
            number, text = re.fullmatch(r"<Prompt(\d+)>: (.*)", turn.answer).groups()
            mask = masks[int(number)]
            assert (mask.sum(), np.argwhere(mask)[:, 1].min()) == (area[text], column[text])
            assert turn.question.replace(f"<Prompt{number}>", "{region}") in SHORT_QUESTIONS
            seen[text] += 1
        assert len({mask.tobytes() for mask in masks.values()}) == len(masks)
        counts[len(masks)] += 1
    assert set(seen) == set(area) and min(seen.values()) > 30
    assert set(counts) == {1, 2, 3}
    assert (sample.sample_id, sample.image_hw) == ("vp/train/image=1", (4, 8))


def test_the_released_fine_tuning_asks_one_question(tmp_path):
    root = _refer_root(tmp_path, REFS)
    asked = {}
    for option in ("ours", "released"):
        source = refcocog_vp.load(root=root, dataset="toy", absent_fraction=0.5, templates=option)
        turns = [turn for seed in range(60) for turn in get(source, seed=seed).turns]
        assert any("not in the image" in turn.answer for turn in turns)
        asked[option] = {re.sub(r"<Prompt\d+>", "{region}", turn.question) for turn in turns}
    assert asked["released"] == {"Please give me a short description of {region}."}
    assert asked["ours"] == set(SHORT_QUESTIONS)


def test_shared_refcocog_sample_loads_as_marked_objects():
    root = shared_data("derived_refer_mini")
    source = refcocog_vp.load(root=root, split="val", absent_fraction=0.0)
    annotations = load_refer(root, "refcocog", "val")
    sentences = {s.raw for refs in annotations.refs_by_image.values() for ref in refs for s in ref.sentences}
    seen = set()
    for seed in range(30):
        for index in range(len(source)):
            sample = get(source, index, seed)
            seen |= {turn.answer.split(": ", 1)[1] for turn in sample.turns}
            load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
    assert seen == {text.lower().strip().removesuffix(".").strip() for text in sentences}
    assert len(seen) == 4


def test_shared_refcocog_sample_without_images_reaches_every_sentence():
    root = shared_data("derived_refer_mini_nophotos")
    source = refcocog_vp.load(root=root, absent_fraction=0.0)
    annotations = load_refer(root, "refcocog", "train")
    sentences = [s.raw for refs in annotations.refs_by_image.values() for ref in refs for s in ref.sentences]
    samples = [get(source, index, seed) for index in range(len(source)) for seed in range(60)]
    seen = {turn.answer.split(": ", 1)[1] for sample in samples for turn in sample.turns}
    assert len(sentences) == 16
    assert seen == {text.lower().strip().removesuffix(".").strip() for text in sentences}

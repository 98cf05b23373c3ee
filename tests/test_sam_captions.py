"""Captions of SAM objects: every object is reached, and mentions of the annotators' marker are removed."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from region_samples import SIZE, column, get, marked_regions
from shared_data import shared_data

from pixel_sail.data.images import load_image
from pixel_sail.data.sources import sam_captions
from pixel_sail.data.templates.marker import remove_marker
from pixel_sail.data.templates.region import DETAILED_SUFFIX
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _sam(tmp_path, records, **settings):
    (tmp_path / "sam.json").write_text(json.dumps(records))
    settings = {"absent_fraction": 0.0} | settings
    return sam_captions.load(annotations=tmp_path / "sam.json", image_dir=tmp_path / "images", **settings)


def _image(captions, name="sa_1.jpg"):
    items = [{"segmentation": encode_mask(column(i)), "caption": text} for i, text in enumerate(captions)]
    return {"image_name": name, "object_annotations": items}


def test_an_image_is_as_many_items_as_groups_and_every_object_is_reached_with_any_other(tmp_path):
    source = _sam(tmp_path, [_image([f"Thing number {k}." for k in range(12)]), _image(["A cat here."], "sa_2.jpg")])
    assert len(source) == 4
    pairs, seen = set(), Counter()
    for seed in range(120):
        for index in range(3):
            sample = get(source, index, seed)
            assert len(sample.turns) == len(sample.prompts) == 4
            regions = marked_regions(sample)
            for turn in sample.turns:
                prompt_id = int(re.match(r"<Prompt(\d+)>", turn.answer)[1])
                assert turn.answer == f"<Prompt{prompt_id}>: Thing number {regions[prompt_id]}."
                assert turn.question.endswith(DETAILED_SUFFIX)
                seen[regions[prompt_id]] += 1
            pairs |= {(a, b) for a in regions.values() for b in regions.values() if a < b}
    assert len(pairs) == 66 and min(seen.values()) > 60
    last = get(source, 3)
    assert last.image_path == source.image_path(3) == tmp_path / "images/sa_2.jpg"
    assert (last.image_hw, len(last.turns)) == (SIZE, 1)
    assert len({get(source, i).sample_id for i in range(4)}) == 4


def test_captions_about_the_marker_only_are_skipped_and_counted(tmp_path, caplog):
    records = [_image(["The cat is highlighted.", "A dog, outlined by a yellow edge, sleeps.", " "]), _image([""])]
    source = _sam(tmp_path, records)
    assert len(source) == 1
    assert "skipped 3 of 4 captions" in caplog.text and "1 of 2 images" in caplog.text
    sample = get(source)
    assert [turn.answer.split(": ")[1] for turn in sample.turns] == ["A dog sleeps."]
    assert list(marked_regions(sample).values()) == [1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"object_annotations": []}, "found image_name = None"),
        ({"image_name": "a.jpg"}, "found object_annotations = None"),
        ({"image_name": "a.jpg", "object_annotations": [{"caption": 5}]}, "object 0: found no caption"),
        ({"image_name": "a.jpg", "object_annotations": [{"caption": "A cat."}]}, "object 0: found size None"),
        ({"image_name": "a.jpg", "object_annotations": [{"caption": "A cat.", "segmentation": [[1, 1, 2, 2, 3, 1]]}]},
         "object 0: found size None of a list"),
        ({"image_name": "a.jpg", "object_annotations":
          [{"caption": "A cat.", "segmentation": encode_mask(column(0, size_hw))} for size_hw in ((4, 4), (4, 5))]},
         r"found masks of sizes \[\(4, 4\), \(4, 5\)\], expected one size"),
        ({"image_name": "a.jpg", "object_annotations":
          [{"caption": "A cat.", "segmentation": {"size": [4, 4], "counts": [16]}}]}, "object 0: found a .* without"),
    ],
)  # fmt: skip
def test_malformed_sam_records_are_rejected(tmp_path, record, message):
    source = _sam(tmp_path, [_image(["A dog."]), record])
    numbers = [i for i in range(len(source)) if i > 0]
    if not numbers:
        assert record["object_annotations"] == []  # nothing to ask, and nothing to read the name for
        return
    with pytest.raises(DataError, match=rf"sam\.json\[1\](:|,) {message}"):
        get(source, 1)


def test_synthetic_perbench_captions_load_as_training_data(data_root):
    root = data_root / "refshapes"
    file = root / "perbench" / "STBench_Detailed_Caption.json"
    source = sam_captions.load(annotations=file, image_dir=root / "images/train2014")
    records = json.loads(file.read_text())
    assert len(source) == len(records) == 3
    for index, record in enumerate(records):
        sample = get(source, index)
        captions = [item["caption"] for item in record["object_annotations"]]
        answers = [turn.answer.split(": ", 1)[1] for turn in sample.turns if "not in the image" not in turn.answer]
        assert sorted(answers) == sorted(captions)
        load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)


def test_a_real_sam_image_with_its_mask_and_caption_becomes_tokens(tmp_path, processor):
    folder = shared_data("dam_dlc_bench")
    mask = np.asarray(Image.open(folder / "images_1_example_mask.png").convert("L")) > 127
    caption = next(iter(json.loads((folder / "dam_3b_v1.json").read_text()).values()))
    record = {
        "image_name": "images_1.jpg",
        "object_annotations": [{"segmentation": encode_mask(mask), "caption": caption}],
    }
    (tmp_path / "sam.json").write_text(json.dumps([record]))
    kinds = {"mask": 1.0, "box": 1.0, "point": 1.0, "scribble": 1.0}
    source = sam_captions.load(annotations=tmp_path / "sam.json", image_dir=folder, prompt_fractions=kinds)
    areas = set()
    for seed in range(12):
        sample = get(source, seed=seed)
        (prompt,) = sample.prompts
        image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        assert (image.height, image.width) == mask.shape == (1365, 2048)
        example = processor.encode_sample(sample, image, independent_turns=False)
        assert set(example.prompt_ids_T.tolist()) == {-1, prompt.prompt_id}
        assert sample.turns[-1].answer == f"<Prompt{prompt.prompt_id}>: {caption}"
        areas.add(int(prompt.mask.sum()))
    assert 1 in areas and int(mask.sum()) in areas and max(areas) > mask.sum()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("The object highlighted by a yellow edge is a red mug.", "The object is a red mug."),
        ("A dog, outlined with a thin yellow contour, sleeps.", "A dog sleeps."),
        ("A highlighted apple lies there. The highlighted one is red.", "An apple lies there. The one is red."),
        ("The dog is highlighted by a yellow edge and is sitting on a mat.", "The dog is sitting on a mat."),
        ("The dog is highlighted by a yellow edge, showing its fur.", "The dog is showing its fur."),
        ("The dog is highlighted by a yellow edge. It sleeps.", "It sleeps."),
        ("It is highlighted by a yellow line and the text reads STOP. It is red.", "It is red."),
        ("A man, which is highlighted by a yellow contour, wears a hat.", "A man wears a hat."),
        ("A man who is highlighted by a yellow contour and wears a hat smiles.", "A man who wears a hat smiles."),
        ("In the area highlighted by a yellow edge, there is a bus.", "In the area, there is a bus."),
        ("The object within the yellow contour is a dog.", "The object is a dog."),
        ("The woman outlined in yellow is smiling.", "The woman is smiling."),
        ("The yellow-outlined object is a pen.", "The object is a pen."),
        ("A shirt is worn, highlighted by yellow edges.", "A shirt is worn."),
        ("The yellow contour surrounds a cat. The cat is black.", "The cat is black."),
        ("The dog has been outlined by a yellow contour.", ""),
        ("Yellow outline.", ""),
        ("The lamp highlights the yellow edge of the book.", ""),
        # What is in the image stays, word for word.
        ("The building is highlighted by the sunlight.", "The building is highlighted by the sunlight."),
        ("Lights highlight its shape , and highlights shine.", "Lights highlight its shape , and highlights shine."),
        ("A yellow bus with a yellow line on its side.", "A yellow bus with a yellow line on its side."),
        (" A plain caption. ", "A plain caption."),
    ],
)
def test_the_marker_leaves_captions_and_sentences_stay_whole(caption, expected):
    assert remove_marker(caption) == expected


WORDS = ("the dog", "is", "and", "it sleeps", "highlighted", "highlighted by a yellow edge", "outlined in yellow", ".",
         "within the yellow contour", "a", "yellow outline", "which", ",", "yellow", "bus", "highlights")  # fmt: skip


@given(words=st.lists(st.sampled_from(WORDS), max_size=12))
@settings(deadline=None)
def test_no_marker_survives_and_no_gap_is_left(words):
    cleaned = remove_marker(" ".join(words))
    assert not re.search(r"\byellow (edge|contour|outline)\b|highlighted by a", cleaned)
    assert remove_marker(cleaned) == cleaned
    if cleaned != " ".join(words):
        assert cleaned == cleaned.strip()


def test_the_captions_of_a_real_benchmark_stay_as_they_are():
    captions = json.loads((shared_data("dam_dlc_bench") / "dam_3b_v1.json").read_text())
    unmarked = [text for text in captions.values() if "yellow" in text or "highlight" in text]
    assert len(captions) == 101 and len(unmarked) > 5
    assert [remove_marker(text) for text in captions.values()] == [text.strip() for text in captions.values()]

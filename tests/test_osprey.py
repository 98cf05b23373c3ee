"""Osprey's files are read as questions about marked regions, and every region keeps its name."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from region_samples import SIZE, column, get, marked_regions
from shared_data import shared_data

from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_rle, decode_segmentation
from pixel_sail.data.sources import osprey
from pixel_sail.data.templates.region import DETAILED_QUESTIONS, NAME_QUESTIONS, SINGLE_WORD_SUFFIX
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def _record(num_regions, *texts, **changes):
    regions = [{"bbox": [i, 0, 1, 4], "segmentation": encode_mask(column(i))} for i in range(num_regions)]
    record = {"file_name": "000000000009.jpg", "height": 4, "width": 40, "annotation": regions}
    return record | {"conversations": _talk(*texts)} | changes


def _described(*texts, **changes):
    return _record(len(texts)) | {"description": list(texts)} | changes


def _source(tmp_path, records, **settings):
    (tmp_path / "osprey.json").write_text(json.dumps(records))
    settings = {"name": "toy", "image_dirs": [tmp_path / "images"], "absent_fraction": 0.0} | settings
    return osprey.load(annotations=tmp_path / "osprey.json", **settings)


def _with_regions(text, sample):
    """Replace every prompt token by the region it marks, counted from 1."""
    return _named(text, {prompt_id: region + 1 for prompt_id, region in marked_regions(sample).items()})


def _named(text, regions):
    """Replace every prompt token by the name of its region."""
    return re.sub(r"<Prompt(\d+)>", lambda match: f"<region{regions[int(match[1])]}>", text)


def _texts(sample):
    return [tuple(_with_regions(text, sample) for text in (turn.question, turn.answer)) for turn in sample.turns]


def test_a_conversation_keeps_its_turns_and_shows_all_regions(tmp_path):
    source = _source(
        tmp_path, [_record(3, "What is <region1>?", "A hat.", "And <Region2>, regon1?", "<regin2>: a dog")]
    )
    for seed in range(20):
        sample = get(source, seed=seed)
        assert _texts(sample) == [("What is <region1>?", "A hat."), ("And <region2>, <region1>?", "<region2>: a dog")]
        assert sorted(marked_regions(sample).values()) == [0, 1, 2]
        assert all(turn.masks == () for turn in sample.turns)
    assert (sample.sample_id, sample.source, sample.image_hw) == ("toy/record=0", "toy", SIZE)


def test_region_ten_and_above_keep_their_names(tmp_path):
    texts = [text for k in range(1, 16) for text in (f"What is <region{k}>?", f"Thing {k} beside region{16 - k}.")]
    sample = get(_source(tmp_path, [_record(15, *texts)]))
    assert _texts(sample) == [(f"What is <region{k}>?", f"Thing {k} beside <region{16 - k}>.") for k in range(1, 16)]
    assert not re.search(r"<<|>\d", " ".join(turn.question + turn.answer for turn in sample.turns))


def test_more_regions_than_tokens_leave_turns_that_fit_and_reach_all_of_them(tmp_path, caplog):
    turns = [(f"Is <region{k}> by <region{k + 1}>?", f"Answer {k}.") for k in range(1, 20)]
    source = _source(tmp_path, [_record(20, *(text for turn in turns for text in turn)), _record(1, "a", "b")])
    assert "1 records have more than 15 regions" in caplog.text
    seen = Counter()
    for seed in range(100):
        sample = get(source, seed=seed)
        found = _texts(sample)
        assert found == [turn for turn in turns if turn in found]  # the order of the file, nothing altered
        named = {int(k) - 1 for turn in found for k in re.findall(r"<region(\d+)>", turn[0])}
        assert set(marked_regions(sample).values()) == named and 10 <= len(named) <= 15
        seen.update(found)
    assert set(seen) == set(turns) and min(seen.values()) > 15


def test_a_turn_about_more_regions_than_tokens_is_rejected(tmp_path):
    text = " ".join(f"<region{k}>" for k in range(1, 17))
    with pytest.raises(DataError, match=r"osprey\.json\[0\]: found no turn about at most 15 regions"):
        get(_source(tmp_path, [_record(16, text, "yes")]))


def test_records_without_regions_or_turns_are_skipped_and_counted(tmp_path, caplog):
    records = [_record(0, "a", "b"), _record(1), _record(1, "a", "b"), _record(1, "a", "b", annotation=None),
               _record(1, "only asked"), _record(2, "c", "d")]  # fmt: skip
    source = _source(tmp_path, records)
    assert "skipped 4 of 6 records" in caplog.text
    assert [get(source, i).sample_id for i in range(len(source))] == ["toy/record=2", "toy/record=5"]


def test_short_form_asks_for_a_single_word(tmp_path):
    source = _source(tmp_path, [_record(1, "What colour is <region1>?", "red")], single_word_answers=True)
    assert _texts(get(source)) == [("What colour is <region1>?" + SINGLE_WORD_SUFFIX, "red")]
    assert SINGLE_WORD_SUFFIX == " Answer the question using a single word or phrase."


def test_an_absent_region_is_asked_for_in_words_that_fit(tmp_path):
    records = [_record(1, "a <region1>", "b")]
    for changes, questions in (({}, None), ({"single_word_answers": True}, NAME_QUESTIONS)):
        sample = get(_source(tmp_path, records, absent_fraction=1.0, **changes))
        absent, asked = sample.turns
        assert re.fullmatch(r"<Prompt\d+> is not in the image\.", absent.answer)
        assert asked.answer == "b"
        token = absent.answer.split()[0]
        assert int(token[7:-1]) not in marked_regions(sample) and token in absent.question
        assert questions is None or absent.question.replace(token, "{region}") in questions


def test_the_release_asks_for_a_long_description_of_an_absent_region_in_every_file(tmp_path):
    records = [_record(1, "a <region1>", "b")]
    for single_word in (False, True):
        source = _source(
            tmp_path, records, absent_fraction=1.0, single_word_answers=single_word, absent_questions="released"
        )
        for seed in range(10):
            absent = get(source, seed=seed).turns[0]
            assert absent.question.replace(absent.answer.split()[0], "{region}") in DETAILED_QUESTIONS


def test_descriptions_are_sampled_and_lose_only_their_label(tmp_path):
    texts = ["<region1>: A sign: stop, left of <region3>.", "Region2: b", "<region3>: c", "  ", "<region5>:", "f"]
    source = _source(tmp_path, [_described(*texts)], content="description", regions_per_sample=3)
    bare = {1: "A sign: stop, left of <region3>.", 2: "b", 3: "c", 6: "f"}
    numbers, seen = Counter(), Counter()
    for seed in range(200):
        sample = get(source, seed=seed)
        for question, answer in _texts(sample):
            label, text = re.fullmatch(r"<region(\d+)>: (.*)", answer).groups()
            assert text == bare[int(label)]
            assert question.replace(f"<region{label}>", "{region}") in DETAILED_QUESTIONS
            seen[int(label)] += 1
            if label == "1":
                assert 2 in marked_regions(sample).values()  # its description names region 3
        numbers[len(sample.turns)] += 1
    assert set(numbers) == {1, 2, 3} and set(seen) == set(bare) and min(seen.values()) > 50


def test_wrong_descriptions_are_rejected(tmp_path):
    records = [_described("<region2>: a", "b"), _described("a", "b", annotation=_record(3)["annotation"]),
               _described("a", 5), _described("a", description="b")]  # fmt: skip
    source = _source(tmp_path, records, content="description", regions_per_sample=5)
    messages = ["found the label of region 2, expected region 1", "found 2 descriptions, expected one for each of 3",
                "description 2: found 5, expected text", "found description = 'b'"]  # fmt: skip
    for index, message in enumerate(messages):
        with pytest.raises(DataError, match=rf"osprey\.json\[{index}\].*{message}"):
            get(source, index)


def test_records_without_any_description_are_skipped(tmp_path, caplog):
    records = [_described("<region1>: ", ""), _described("<region1>: a")]
    assert len(_source(tmp_path, records, content="description")) == 1
    assert "skipped 1 of 2 records" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": ""}, "found file_name = ''"),
        ({"height": "4"}, "found height = '4'"),
        ({"width": -1}, "found width = -1"),
        ({"height": 10**30, "annotation": [{"segmentation": [[1, 1, 2, 2, 3, 1]]}]}, "found height = 1000"),
        ({"annotation": "x"}, "found annotation = 'x'"),
        ({"annotation": [{}]}, "region 1: found a segmentation of type NoneType"),
        ({"annotation": [{"segmentation": [[1, 2, 3]]}]}, "region 1: polygon 0: found 3 numbers"),
        ({"annotation": [{"segmentation": {"size": [4, 40], "counts": [160]}}]}, "region 1: found a .* without pixels"),
        ({"height": 5}, r"region 1: found RLE size \[4, 40\], expected \[5, 40\]"),
        ({"conversations": "x"}, "found conversations = 'x'"),
        ({"conversations": _talk("about <region2>", "b")}, "found '<region2>' in a text, expected one of 1 regions"),
        ({"conversations": [{"from": "cat", "value": "miau"}]}, "message 0: found .*cat"),
    ],
)
def test_malformed_records_are_rejected_by_file_and_record(tmp_path, changes, message):
    source = _source(tmp_path, [_record(1, "a", "b"), _record(1, "a", "b", **changes)])
    assert len(source) == 2
    with pytest.raises(DataError, match=rf"osprey\.json\[1\](:|,) {message}"):
        get(source, 1)
    get(source, 0)


def test_a_record_that_is_no_object_is_rejected(tmp_path):
    source = _source(tmp_path, [5])
    with pytest.raises(DataError, match=r"osprey\.json\[0\]: found int, expected an object"):
        source.image_path(0)


def test_all_segmentation_formats_are_read(tmp_path):
    square = [3, 1, 6, 1, 6, 3, 3, 3]
    formats = [[square], {"size": [4, 40], "counts": [13, 2, 2, 2, 2, 2, 137]}, encode_mask(column(7))]
    record = _record(3, "a", "b", annotation=[{"segmentation": segmentation} for segmentation in formats])
    found = {prompt.mask.tobytes() for prompt in get(_source(tmp_path, [record])).prompts}
    assert found == {decode_segmentation(segmentation, SIZE, "x").tobytes() for segmentation in formats}


def test_the_image_is_looked_for_in_all_folders(tmp_path):
    folders = [tmp_path / "train", tmp_path / "val"]
    source = _source(tmp_path, [_record(1, "a", "b", file_name="COCO_train2014_000000000009.jpg")], image_dirs=folders)
    assert source.image_path(0) == folders[0] / "COCO_train2014_000000000009.jpg"
    folders[1].mkdir()
    (folders[1] / "000000000009.jpg").touch()
    assert source.image_path(0) == get(source).image_path == folders[1] / "000000000009.jpg"


def test_wrong_settings_are_rejected(tmp_path):
    for wrong in ({"content": "captions"}, {"regions_per_sample": 16}, {"image_dirs": []}, {"absent_fraction": 2.0}):
        with pytest.raises(ValueError, match="correct the config"):
            _source(tmp_path, [], **wrong)


@pytest.mark.parametrize("name", ["conversation", "short_form", "detail_description"])
def test_synthetic_osprey_files_load(data_root, name):
    """RefShapes knows the label of every region, so each prompt's answer can be checked against its mask."""
    root = data_root / "refshapes"
    file = root / "osprey" / f"osprey_{name}.json"
    content = "description" if name.startswith("detail") else "conversations"
    source = osprey.load(
        annotations=file, image_dirs=[root / "images/train2014"], name="x", content=content, absent_fraction=0.0
    )
    records = json.loads(file.read_text())
    assert len(source) == len(records) == 10
    for index, record in enumerate(records):
        sample = get(source, index)
        masks = [decode_rle(region["segmentation"]) for region in record["annotation"]]
        marked = {p.prompt_id: [(p.mask == mask).all() for mask in masks].index(True) + 1 for p in sample.prompts}
        back = [(_named(turn.question, marked), _named(turn.answer, marked)) for turn in sample.turns]
        if content == "description":
            assert {answer for _, answer in back} <= set(record["description"])
        else:
            assert [text for pair in back for text in pair] == [m["value"] for m in record["conversations"]]
        image = load_image(source.image_path(index), where=sample.sample_id, expected_hw=sample.image_hw)
        assert all(prompt.mask.shape == (image.height, image.width) for prompt in sample.prompts)


def _box_overlap(mask, bbox):
    """Return the IoU of the box around a mask and [x, y, width, height]."""
    rows, columns = np.nonzero(mask)
    x, y, width, height = bbox
    inner_w = min(columns.max() + 1, x + width) - max(columns.min(), x)
    inner_h = min(rows.max() + 1, y + height) - max(rows.min(), y)
    area = (columns.max() + 1 - columns.min()) * (rows.max() + 1 - rows.min())
    return inner_w * inner_h / (area + width * height - inner_w * inner_h)


def test_shared_osprey_questions_and_answers_load(tmp_path):
    """The real evaluation questions in the training format, with their reference answers."""
    folder = shared_data("osprey_eval") / "description"
    prompts = json.loads((folder / "prompt.json").read_text())
    questions = {q["question_id"]: q for q in json.loads((folder / "questions.json").read_text())}
    answers = {a["question_id"]: a["text"] for a in json.loads((folder / "answers.json").read_text())}
    records = []
    for number, question in questions.items():
        base = {"file_name": question["image"], "height": 640, "width": 640}
        talk = _talk(question["text"], answers[number])
        records.append(base | {"annotation": [question["annotation"]], "conversations": talk})
    several = [p["annotation"] for p in prompts]
    source = _source(tmp_path, records)
    assert len(source) == 80
    for index, record in enumerate(records):
        sample = get(source, index)
        (turn,), (prompt,) = sample.turns, sample.prompts
        assert turn.question == record["conversations"][0]["value"].replace("<region>", f"<Prompt{prompt.prompt_id}>")
        assert turn.answer == record["conversations"][1]["value"].strip()
        assert _box_overlap(prompt.mask, record["annotation"][0]["bbox"]) > 0.9
    records = [base | {"annotation": regions, "conversations": _talk("Hi", "<region1>")} for regions in several]
    source = _source(tmp_path, records)
    assert [len(get(source, i).prompts) for i in range(len(source))] == [len(regions) for regions in several]
    assert max(map(len, several)) > 1


def test_shared_boxes_of_crowded_images_load(tmp_path):
    """Real numbers and places of objects: every box a region with a turn, some more than prompt tokens."""
    lines = (shared_data("vipllava_caps_boxes") / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    records, names = [], []
    for image in map(json.loads, lines):
        boxes = [[200 * x for x in item["bbox"]] for item in image["instances"]]
        regions = [{"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]} for x0, y0, x1, y1 in boxes]
        names.append([item["category"] for item in image["instances"]])
        talk = _talk(*(text for k, name in enumerate(names[-1], 1) for text in (f"What is <region{k}>?", name)))
        base = {"file_name": image["image"], "height": 200, "width": 200}
        records.append(base | {"annotation": regions, "conversations": talk})
    source = _source(tmp_path, records)
    assert (len(source), len(lines)) == (77, 80)  # three have no object
    counts = Counter()
    used = [pair for pair in zip(records, names, strict=True) if pair[1]]
    for index, (record, categories) in enumerate(used):
        sample = get(source, index)
        masks = {prompt.prompt_id: prompt.mask for prompt in sample.prompts}
        assert len(masks) == min(len(categories), 15)
        for turn in sample.turns:
            mask = masks[int(re.search(r"<Prompt(\d+)>", turn.question)[1])]
            same = [(mask == decode_segmentation(region["segmentation"], (200, 200), "x")).all()
                    for region in record["annotation"]]  # fmt: skip
            assert turn.answer in [name for name, is_same in zip(categories, same, strict=True) if is_same]
        counts[len(categories) > 15] += 1
    assert counts == {True: 4, False: 73}

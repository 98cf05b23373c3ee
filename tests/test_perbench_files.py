"""PerBench's three files and the RefCOCOg region-caption file are read as evaluation items."""

import json

import numpy as np
import pytest
from shared_data import shared_data

from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.refer_annotations import load_refer
from pixel_sail.data.sources.perbench import load_captions, load_choices, load_visual_referring
from pixel_sail.data.sources.refer import expressions
from pixel_sail.data.sources.region_caption import load_region_captions
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError

SIZE = (3, 12)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _column(index, size_hw=SIZE):
    mask = np.zeros(size_hw, dtype=bool)
    mask[:, index] = True
    return encode_mask(mask)


def _place(rle):
    """Return the column that an RLE marks."""
    return int(np.argwhere(decode_rle(rle))[0, 1])


def _write(tmp_path, content):
    (tmp_path / "file.json").write_text(json.dumps(content))
    return tmp_path / "file.json"


def _vres(tmp_path, **changes):
    record = {"image_name": "a.jpg", "question": "Segment <obj1>.", "answer": "It is <obj0>.",
              "segmentations": {f"<obj{i}>": _column(i) for i in range(2)}}  # fmt: skip
    return load_visual_referring(_write(tmp_path, [record | changes]), image_dir=tmp_path)


def test_synthetic_captions_load(data_root):
    folder = data_root / "refshapes"
    file = folder / "perbench" / "STBench_Detailed_Caption.json"
    items = load_captions(file, image_dir=folder / "images/train2014")
    objects = [(r["image_name"], o) for r in json.loads(file.read_text()) for o in r["object_annotations"]]
    assert len(items) == len(objects) == 9
    for item, (name, entry) in zip(items, objects, strict=True):
        assert item.references == (entry["caption"],)
        assert item.region == entry["segmentation"]
        assert item.image_path.name == name
        load_image(item.image_path, where=item.item_id, expected_hw=item.image_hw)
    assert len({item.item_id for item in items}) == len(items)


def test_synthetic_choices_load(data_root):
    folder = data_root / "refshapes"
    file = folder / "perbench" / "STBench_MCQ.json"
    items = load_choices(file, image_dir=folder / "images/train2014")
    mcqs = [mcq for record in json.loads(file.read_text()) for mcq in record["mcqs"]]
    assert [(i.region, i.question, i.answer) for i in items] == [
        (m["object"], m["question"], m["answer"]) for m in mcqs
    ]
    assert len({item.item_id for item in items}) == len(items) == 9
    assert all(item.answer in item.question.splitlines() for item in items)
    for item in items:
        load_image(item.image_path, where=item.item_id, expected_hw=item.image_hw)


def test_synthetic_visual_referring_loads(data_root):
    folder = data_root / "refshapes"
    file = folder / "perbench" / "STBench_VRES.json"
    items = load_visual_referring(file, image_dir=folder / "images/train2014")
    records = json.loads(file.read_text())
    assert len(items) == len(records) > 0
    for item, record in zip(items, records, strict=True):
        assert item.question == record["question"].replace("<obj0>", "<Prompt0>")
        assert (item.regions, item.prompt_ids) == ((record["segmentations"]["<obj0>"],), (0,))
        assert (item.answer, item.targets) == ("It is <obj1>.", (record["segmentations"]["<obj1>"],))
        load_image(item.image_path, where=item.item_id, expected_hw=item.image_hw)


def test_tags_are_matched_completely_and_numbered_among_all_tags(tmp_path, caplog):
    tags = {f"<obj{i}>": _column(i) for i in (3, 10, 1, 0, 11)}
    question = "Between <obj10> and <obj1>, like <obj10>?"
    (item,) = _vres(tmp_path, question=question, answer="<obj11>, then <obj3>", segmentations=tags)
    assert item.question == "Between <Prompt1> and <Prompt2>, like <Prompt1>?"
    assert item.prompt_ids == (1, 2)
    assert [_place(rle) for rle in item.regions] == [10, 1]
    assert [_place(rle) for rle in item.targets] == [3, 11]  # the order of the tags
    assert "1 of 5 masks are named in no question or answer" in caplog.text


def test_tags_without_brackets_are_not_found_inside_other_names(tmp_path):
    tags = {f"obj{i}": _column(i) for i in range(2)}
    (item,) = _vres(tmp_path, question="obj10, subobj1, obj1?", answer="obj0.", segmentations=tags)
    assert (item.question, item.prompt_ids) == ("obj10, subobj1, <Prompt1>?", (1,))


def test_a_tag_in_question_and_answer_is_a_region_and_no_target(tmp_path, caplog):
    (item,) = _vres(tmp_path, question="Is it <obj0>?", answer="<obj0> and <obj1>")
    assert ([_place(rle) for rle in item.regions], [_place(rle) for rle in item.targets]) == ([0], [1])
    assert "1 of 1 records name a tag in question and answer" in caplog.text
    assert "0 of them have no other target" in caplog.text


def test_records_without_a_tag_in_both_texts_are_not_counted(tmp_path, caplog):
    _vres(tmp_path)
    assert caplog.text == ""


def test_a_record_whose_answer_names_given_regions_only_is_skipped(tmp_path, caplog):
    tags = {f"<obj{i}>": _column(i) for i in range(2)}
    shared = {"image_name": "a.jpg", "question": "Is <obj0> or <obj1> larger?", "segmentations": tags}
    asked = {"image_name": "b.jpg", "question": "What is beside <obj0>?", "segmentations": tags, "answer": "<obj1>."}
    file = _write(tmp_path, [shared | {"answer": "<obj1> is."}, asked])
    (item,) = load_visual_referring(file, image_dir=tmp_path)
    assert item.item_id == "b.jpg/1"
    assert "1 of 2 records name a tag" in caplog.text and "1 of them have no other target" in caplog.text
    with pytest.raises(DataError, match=r"file\.json: found 1 records, none with a tag that its answer names"):
        load_visual_referring(_write(tmp_path, [shared | {"answer": "<obj1> is."}]), image_dir=tmp_path)


def test_uncompressed_masks_are_read(tmp_path):
    runs = {"size": [3, 12], "counts": [0, 3, 33]}
    (item,) = _vres(tmp_path, segmentations={"<obj1>": runs, "<obj0>": _column(4)})
    assert (_place(item.regions[0]), item.image_hw) == (0, SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_name": ""}, "found image_name = ''"),
        ({"question": None}, "found question = None"),
        ({"answer": "nothing"}, "found answer 'nothing', which names none of"),
        ({"segmentations": {}}, r"found segmentations = \{\}"),
        ({"segmentations": {"<obj0>": _column(0), "<obj1>": _column(0, (3, 13))}}, r"found masks of sizes \[\(3, 12\)"),
        ({"segmentations": {"<obj0>": {"counts": "x"}}}, "'<obj0>': found size None of a dict"),
        ({"segmentations": {"<obj0>": {"size": [3, 12], "counts": "0x"}}}, "'<obj0>': found RLE"),
        ({"segmentations": {"<obj0>": [[1, 1, 2, 2, 3, 1]]}}, "'<obj0>': found size None of a list"),
        ({"segmentations": {"": _column(0)}}, "found a mask without a name"),
    ],
)
def test_malformed_visual_referring_is_rejected(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"file\.json\[0\](:|,) {message}"):
        _vres(tmp_path, **changes)


@pytest.mark.parametrize(
    ("loader", "record", "message"),
    [
        (load_captions, {"image_name": "a.jpg"}, "found object_annotations = None"),
        (load_captions, {"image_name": "a.jpg", "object_annotations": [{"segmentation": _column(0)}]},
         "object 0: found caption = None"),
        (load_captions, {"image_name": "a.jpg", "object_annotations": [{"caption": "x"}]},
         "object 0: found segmentation = None"),
        (load_choices, {"image_name": "a.jpg", "mcqs": [{"object": _column(0), "question": "x", "answer": ""}]},
         "question 0: found answer = ''"),
        (load_choices, 5, "found image_name = None"),
    ],
)  # fmt: skip
def test_malformed_captions_and_choices_are_rejected(tmp_path, loader, record, message):
    with pytest.raises(DataError, match=rf"file\.json\[0\](:|,) {message}"):
        loader(_write(tmp_path, [record]), image_dir=tmp_path)


# The RefCOCOg region-caption file.


def _region_file(tmp_path, images=(), annotations=(), **changes):
    image = {"file_name": "a.jpg", "height": 3, "width": 12, "caption": "a cat"} | changes
    content = {
        "images": [image | entry for entry in images or ({"id": 4},)],
        "annotations": list(annotations or ({"id": 4, "image_id": 4, "segmentation": _column(5)},)),
    }
    return _write(tmp_path, content)


def test_the_annotation_that_names_the_image_is_used(tmp_path):
    file = _region_file(
        tmp_path,
        images=({"id": 7, "caption": "the B"}, {"id": 3, "caption": "the A"}),
        annotations=(
            {"id": 7, "image_id": 3, "segmentation": _column(1)},
            {"id": 3, "image_id": 7, "segmentation": [_column(2), _column(3)]},
        ),
    )
    first, second = load_region_captions(file, image_dir=tmp_path)
    assert (first.item_id, first.references, _place(first.region)) == ("7", ("the B",), 2)
    assert decode_rle(first.region).sum() == 6  # a list of masks is merged
    assert (second.item_id, second.references, _place(second.region)) == ("3", ("the A",), 1)
    assert (second.image_path, second.image_hw) == (tmp_path / "a.jpg", SIZE)


def test_references_come_from_a_caption_file_where_one_is_given(tmp_path):
    captions = tmp_path / "captions.json"
    rows = [{"image_id": "4", "caption": "one"}, {"image_id": 5, "caption": "x"}, {"image_id": 4, "caption": "two"}]
    captions.write_text(json.dumps({"images": [], "annotations": rows}))
    (item,) = load_region_captions(_region_file(tmp_path), image_dir=tmp_path, captions=captions)
    assert item.references == ("one", "two")
    captions.write_text(json.dumps({"annotations": rows[1:2]}))
    with pytest.raises(
        DataError, match=r"file\.json: images\[0\], id 4: found no caption with image_id 4 in .*captions"
    ):
        load_region_captions(_region_file(tmp_path), image_dir=tmp_path, captions=captions)
    captions.write_text(json.dumps({"annotations": [{"image_id": "x", "caption": "y"}]}))
    with pytest.raises(DataError, match=r"annotations\[0\]: found image_id = 'x', expected a number"):
        load_region_captions(_region_file(tmp_path), image_dir=tmp_path, captions=captions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption": " "}, r"images\[0\], id 4: found caption = ' '"),
        ({"height": 0}, r"images\[0\], id 4: found height = 0"),
        ({"file_name": None}, r"images\[0\], id 4: found file_name = None"),
        ({"images": ({"id": 5},)}, "found 0 records with 5, expected exactly one"),
        ({"annotations": ({"id": 4, "image_id": 4},)}, r"annotations\[0\]: found a segmentation of type NoneType"),
        (
            {"annotations": ({"id": 4, "image_id": 4, "segmentation": _column(0, (4, 4))},)},
            r"annotations\[0\]: found RLE",
        ),
        ({"annotations": ({"id": 4, "image_id": 4, "segmentation": []},)}, r"annotations\[0\]: found an empty polygon"),
    ],
)
def test_malformed_region_captions_are_rejected(tmp_path, settings, message):
    with pytest.raises(DataError, match=rf"file\.json.*{message}"):
        load_region_captions(_region_file(tmp_path, **settings), image_dir=tmp_path)


def test_shared_refcocog_sample_in_the_format_of_the_file_loads(tmp_path):
    """Real images, polygons and expressions, one "image" for each expression."""
    root = shared_data("derived_refer_mini")
    annotations = load_refer(root, "refcocog", "val")
    images, regions, expected = [], [], {}
    for refs in annotations.refs_by_image.values():
        for ref in refs:
            for sentence in ref.sentences:
                image, number = annotations.images[ref.image_id], len(images)
                images.append({"id": number, "file_name": image.path.name, "height": image.size_hw[0],
                               "width": image.size_hw[1], "caption": sentence.raw})  # fmt: skip
                segmentation = annotations.segmentations[ref.ann_ids[0]]
                regions.append({"id": number, "image_id": number, "segmentation": segmentation})
                expected[sentence.sent_id] = number
    file = _write(tmp_path, {"images": images, "annotations": regions})
    items = load_region_captions(file, image_dir=next(iter(annotations.images.values())).path.parent)
    assert len(items) == 4
    for expression in expressions(annotations, text_field="raw"):
        item = items[expected[expression.sent_id]]
        assert (item.region, item.references, item.image_path) == (
            *(expression.target, (expression.text,), expression.image_path),
        )
        load_image(item.image_path, where=item.item_id, expected_hw=item.image_hw)

"""REFER and gRefCOCO files give the right expressions and reproducible training samples."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from shared_data import shared_data

from pixel_sail.data.masks import decode_rle
from pixel_sail.data.sources.refer import ReferSource, expressions, load, load_refer
from pixel_sail.data.templates.referring import NO_TARGET_ANSWER, REFER_ANSWERS
from pixel_sail.types import DataError


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "index_cache"))


BOX_A, BOX_B = [0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]


def _sentences(*pairs):
    return [{"sent_id": i, "sent": raw.lower().strip(". "), "raw": raw, "tokens": raw.split()} for i, raw in pairs]


def _ref(ref_id, image_id, ann_id, split, *sentences):
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "ann_id": ann_id,
        "split": split,
        "sentences": _sentences(*sentences),
    }


INSTANCES = {
    "images": [
        {"id": 1, "file_name": "one.jpg", "height": 4, "width": 4},
        {"id": 2, "file_name": "two.jpg", "height": 3, "width": 5},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "segmentation": [BOX_A]},
        {"id": 11, "image_id": 1, "segmentation": [BOX_B]},
        {"id": 20, "image_id": 2, "segmentation": {"size": [3, 5], "counts": [0, 3, 12]}},
    ],
}
REFS = [
    _ref(5, 2, 20, "train", (50, "The left column.")),
    _ref(1, 1, 10, "train", (14, "Top left box."), (12, "upper box"), (13, "the A box ..")),
    _ref(2, 1, 11, "train", (22, "lower box"), (21, "The B box")),
    _ref(3, 1, 11, "testA", (31, "the second")),
    _ref(4, 1, 10, "testB", (41, "the first")),
]
GREFS = [
    _ref(1, 1, [10, 11], "val", (1, "both boxes")),
    _ref(2, 1, [-1], "val", (2, "the purple cow")),
    _ref(3, 2, [20], "val"),
    _ref(4, 1, [11], "val", (4, "the lower box")),
]


def _write(root, dataset="toy", refs=REFS, instances=INSTANCES, name="refs(unc).p"):
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(refs).encode() if name.endswith(".json") else pickle.dumps(refs, protocol=2)
    (folder / name).write_bytes(data)
    (folder / "instances.json").write_text(json.dumps(instances))
    return root


def _source(root, **settings):
    return load(root=root, dataset="toy", **settings)


def _turn_keys(sample):
    return [(turn.question, turn.answer, turn.masks[0].tobytes()) for turn in sample.turns]


def test_every_sentence_of_the_split_is_one_expression_in_stable_order(tmp_path):
    result = expressions(load_refer(_write(tmp_path), "toy", "train"))
    keys = [(e.image_id, e.ref_id, e.sent_id) for e in result]
    assert keys == [(1, 1, 12), (1, 1, 13), (1, 1, 14), (1, 2, 21), (1, 2, 22), (2, 5, 50)]
    assert [e.text for e in result][-1] == "the left column"
    assert (result[-1].image_hw, decode_rle(result[-1].target).sum(axis=0).tolist()) == ((3, 5), [3, 0, 0, 0, 0])


def test_text_field_selects_raw_or_sent(tmp_path):
    annotations = load_refer(_write(tmp_path), "toy", "train")
    assert [e.text for e in expressions(annotations, text_field="raw")][-1] == "The left column."
    with pytest.raises(ValueError, match="expected one of"):
        expressions(annotations, text_field="tokens")


def test_split_names_match_exactly(tmp_path):
    root = _write(tmp_path)
    assert [e.ref_id for e in expressions(load_refer(root, "toy", "testA"))] == [3]
    assert [e.ref_id for e in expressions(load_refer(root, "toy", "testB"))] == [4]
    with pytest.raises(DataError, match=r"testA \(1 refs\), testB \(1 refs\), train \(3 refs\), expected 'test'"):
        load_refer(root, "toy", "test")


def test_one_annotation_file_is_found_and_several_need_split_by(tmp_path):
    root = _write(tmp_path)
    assert load_refer(root, "toy", "train").refs_file.name == "refs(unc).p"
    _write(tmp_path, refs=REFS[:1], name="refs(google).p")
    with pytest.raises(DataError, match=r"refs\(google\)\.p', 'refs\(unc\)\.p'.*pass split_by"):
        load_refer(root, "toy", "train")
    assert len(expressions(load_refer(root, "toy", "train", split_by="google"))) == 1
    with pytest.raises(DataError, match="split_by='umd'"):
        load_refer(root, "toy", "train", split_by="umd")


def test_absent_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_refer(tmp_path, "toy", "train")
    (tmp_path / "toy").mkdir()
    with pytest.raises(DataError, match=r"found \[\]"):
        load_refer(tmp_path, "toy", "train")
    (tmp_path / "toy" / "refs(unc).p").write_bytes(pickle.dumps(REFS))
    with pytest.raises(DataError, match=r"instances\.json: found no such file"):
        load_refer(tmp_path, "toy", "train")


def test_the_release_samples_five_objects_with_replacement_and_asks_for_each_with_one_sentence(tmp_path):
    source = _source(_write(tmp_path), expression_sampling="released", question_style="short")
    sentences = {"top left box", "upper box", "the a box .", "lower box", "the b box"}
    same, seen = set(), Counter()
    for seed in range(60):
        sample = source.get(source._image_ids.index(1), np.random.default_rng(seed))
        assert len(sample.turns) == 5
        masks = {turn.masks[0].tobytes(): [] for turn in sample.turns}
        for turn in sample.turns:
            masks[turn.masks[0].tobytes()].append(turn.question)
        assert all(len(set(texts)) == 1 for texts in masks.values())
        same.add(len(masks))
        seen.update(turn.question for turn in sample.turns)
    assert same == {1, 2}
    assert set(seen) == sentences
    alone = source.get(source._image_ids.index(2), np.random.default_rng(0))
    assert [turn.question for turn in alone.turns] == ["the left column"] * 5


def test_of_several_refs_of_an_object_the_release_keeps_the_last_but_those_of_grefcoco(tmp_path):
    refs = [_ref(1, 1, 10, "train", (1, "first")), _ref(2, 1, 10, "train", (2, "second"))]
    root = _write(tmp_path, refs=refs)
    for option, expected in (("ours", {"first", "second"}), ("released", {"second"})):
        source = _source(root, expression_sampling=option, question_style="short")
        turns = [turn for seed in range(20) for turn in source.get(0, np.random.default_rng(seed)).turns]
        assert {turn.question for turn in turns} == expected
    refs = [_ref(1, 1, [10], "train", (1, "first")), _ref(2, 1, [10], "train", (2, "second"))]
    refs += [_ref(3, 1, [-1], "train", (3, "nothing"))]
    _write(tmp_path, dataset="grefs", refs=refs, name="grefs(unc).json")
    source = load(root=root, dataset="grefs", expression_sampling="released", question_style="short")
    turns = [turn for seed in range(20) for turn in source.get(0, np.random.default_rng(seed)).turns]
    assert {turn.question for turn in turns} == {"first", "second", "nothing"}
    assert {turn.answer for turn in turns if turn.question == "nothing"} == {NO_TARGET_ANSWER}


def test_the_first_folder_name_that_exists_is_read(tmp_path):
    names = ["grefcoco", "grefs"]
    root = _write(tmp_path, dataset="grefs", refs=GREFS, name="grefs(unc).json")
    annotations = load_refer(root, names, "val")
    assert (annotations.dataset, annotations.refs_file) == ("grefcoco", root / "grefs" / "grefs(unc).json")
    assert load(root=root, dataset=names, split="val").name == "grefcoco"
    _write(tmp_path, dataset="grefcoco", refs=GREFS[:1], name="grefs(unc).json")
    assert load_refer(root, names, "val").refs_file.parent.name == "grefcoco"
    with pytest.raises(DataError, match=r"/a: found no such folder"):
        load_refer(root, ["a", "b"], "val")


@pytest.mark.parametrize("split_by", ["umd", "google"])
def test_refcocog_has_two_ways_to_split(tmp_path, split_by):
    _write(tmp_path, refs=REFS[:4], name="refs(umd).p")
    root = _write(tmp_path, refs=[{**ref, "split": "val"} for ref in REFS[1:3]], name="refs(google).p")
    found = load_refer(root, "toy", "train" if split_by == "umd" else "val", split_by=split_by)
    assert {ref.ref_id for group in found.refs_by_image.values() for ref in group} == (
        {5, 1, 2} if split_by == "umd" else {1, 2}
    )


def test_grefs_are_read_as_json_before_pickle(tmp_path):
    _write(tmp_path, refs=GREFS[:1], name="grefs(unc).p")
    root = _write(tmp_path, refs=GREFS, name="grefs(unc).json")
    for split_by in (None, "unc"):
        assert load_refer(root, "toy", "val", split_by=split_by).refs_file.suffix == ".json"


def test_repeated_ref_ids_are_reported_and_kept_apart(tmp_path, caplog):
    refs = [_ref(7, 1, 10, "train", (1, "first")), _ref(7, 1, 11, "train", (2, "second"))]
    root = _write(tmp_path, refs=refs)
    corners = {e.text: bool(decode_rle(e.target)[0, 0]) for e in expressions(load_refer(root, "toy", "train"))}
    assert corners == {"first": True, "second": False}
    assert "found 1 ref_ids more than once (the first is 7)" in caplog.text
    source = _source(root, question_style="fixed")
    for seed in range(6):
        masks = {turn.question: turn.masks[0] for turn in source.get(0, np.random.default_rng(seed)).turns}
        assert masks["Please segment first in this image."][0, 0]
        assert not masks["Please segment second in this image."][0, 0]


def test_segmentations_are_read_on_request(tmp_path):
    annotations = load_refer(_write(tmp_path), "toy", "train")
    assert dict(annotations.segmentations) == {row["id"]: row["segmentation"] for row in INSTANCES["annotations"]}
    assert (len(annotations.segmentations), 12 in annotations.segmentations) == (3, False)
    assert len(load_refer(tmp_path, "toy", "testA").segmentations) == 1
    with pytest.raises(KeyError):
        annotations.segmentations[2**70]
    copy = pickle.loads(pickle.dumps(annotations))
    assert expressions(copy) == expressions(annotations)
    (tmp_path / "toy" / "instances.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances\.json: annotations: .*changed under a running process"):
        annotations.segmentations[10]


def test_a_source_gives_the_same_samples_in_a_spawned_worker(tmp_path):
    source = _source(_write(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    for index in range(len(source)):
        first, second = (s.get(index, np.random.default_rng(3)) for s in (source, copy))
        assert _turn_keys(first) == _turn_keys(second)


def test_images_that_cannot_be_swapped_are_counted(tmp_path, caplog):
    blind_paths = [_source(_write(tmp_path), blind_baseline="image").image_path(i).name for i in range(2)]
    assert blind_paths == ["one.jpg", "two.jpg"]
    assert "2 of 2 images have no other of their size" in caplog.text


@pytest.mark.parametrize("folder", ["images/train2014", "images/mscoco/images/train2014", "coco2014/train2014"])
def test_image_folder_is_looked_for(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    assert expressions(load_refer(_write(tmp_path), "toy", "train"))[0].image_path == tmp_path / folder / "one.jpg"


def test_image_folder_may_be_in_the_dataset_folder(tmp_path):
    root = _write(tmp_path)
    (root / "toy/coco2014/train2014").mkdir(parents=True)
    path = root / "toy/coco2014/train2014/one.jpg"
    assert expressions(load_refer(root, "toy", "train"))[0].image_path == path


def test_image_folder_may_be_absent_or_given(tmp_path):
    root = _write(tmp_path)
    assert expressions(load_refer(root, "toy", "train"))[0].image_path == root / "images/train2014/one.jpg"
    given = load_refer(root, "toy", "train", image_dir="elsewhere")
    assert str(expressions(given)[0].image_path) == "elsewhere/one.jpg"


@pytest.mark.parametrize("name", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco_targets_are_unions_or_none_and_empty_refs_are_counted(tmp_path, caplog, name):
    annotations = load_refer(_write(tmp_path, refs=GREFS, name=name), "toy", "val")
    both, nothing, one = expressions(annotations)
    assert decode_rle(both.target).sum() == 7
    assert decode_rle(one.target).sum() == 4
    assert nothing.target is None
    assert annotations.num_skipped == 1
    assert "skipped 1 of 4 refs" in caplog.text
    assert list(annotations.images) == [1]


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        (_ref(9, 1, 99, "train", (1, "x")), "ref_id 9: found ann_id 99"),
        (_ref(9, 3, 10, "train", (1, "x")), "ref_id 9: found image_id 3"),
        (_ref(9, 2, 10, "train", (1, "x")), "ref_id 9: found ann_id 10 of image 1, expected image 2"),
        (_ref(9, 1, [10, -1], "train", (1, "x")), "ref_id 9: found ann_id -1"),
        (_ref(9, 1, [], "train", (1, "x")), r"ref_id 9: found ann_id \[\]"),
        (_ref(9, 1, "10", "train", (1, "x")), "ref_id 9: found ann_id = '10', expected int or list"),
        (_ref(1, 1, 10, "train", (12, "x")), r"\(ref_id, sent_id\) \(1, 12\) 2 times"),
        (_ref(9, 1, 10, "train", ("1", "x")), "ref_id 9: found sent_id = '1', expected int"),
    ],
)
def test_wrong_refs_are_rejected_with_file_and_id(tmp_path, ref, reason):
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: .*" + reason):
        load_refer(_write(tmp_path, refs=[*REFS, ref]), "toy", "train")


def test_wrong_segmentation_is_rejected_when_it_is_used(tmp_path):
    wrong = {**INSTANCES, "annotations": [{"id": 10, "image_id": 1, "segmentation": [[1, 2, 3]]}]}
    annotations = load_refer(_write(tmp_path, refs=REFS[1:2], instances=wrong), "toy", "train")
    with pytest.raises(DataError, match=r"ref_id 1, ann_id.*3 numbers"):
        expressions(annotations)
    with pytest.raises(DataError, match=r"ref_id 1, ann_id.*3 numbers"):
        _source(tmp_path).get(0, np.random.default_rng(0))


def test_repeated_ids_in_instances_are_rejected(tmp_path):
    repeated = {**INSTANCES, "images": INSTANCES["images"] * 2}
    with pytest.raises(DataError, match=r"instances\.json: images: found 2 repeated ids"):
        load_refer(_write(tmp_path, instances=repeated), "toy", "train")


def test_sample_is_a_function_of_index_and_rng(tmp_path):
    source = _source(_write(tmp_path), expressions_per_image=3)
    samples = [source.get(0, np.random.default_rng(seed)) for seed in (1, 1, *range(2, 12))]
    assert _turn_keys(samples[0]) == _turn_keys(samples[1])
    assert len({tuple(_turn_keys(sample)) for sample in samples}) > 5


def test_sample_carries_name_path_size_and_masks(tmp_path):
    source = _source(_write(tmp_path), name="mine", question_style="fixed", text_field="raw")
    assert (len(source), source.name) == (2, "mine")
    sample = source.get(1, np.random.default_rng(0))
    assert (sample.sample_id, sample.source, sample.image_hw) == ("mine/train/image=2", "mine", (3, 5))
    assert sample.image_path == tmp_path / "images/train2014/two.jpg"
    (turn,) = sample.turns
    assert (turn.question, turn.answer) == ("Please segment the left column in this image.", "It is [SEG].")
    np.testing.assert_array_equal(turn.masks[0], np.arange(5)[None].repeat(3, 0) == 0)


def test_only_one_closing_full_stop_is_removed(tmp_path):
    source = _source(_write(tmp_path), question_style="fixed")
    questions = {turn.question for turn in source.get(0, np.random.default_rng(0)).turns}
    assert "Please segment the a box . in this image." in questions
    assert "Please segment top left box in this image." in questions


def test_no_sentence_repeats_and_every_ref_comes_before_any_second_sentence(tmp_path):
    source = _source(_write(tmp_path), expressions_per_image=4, question_style="fixed")
    for seed in range(40):
        turns = source.get(0, np.random.default_rng(seed)).turns
        assert len({turn.question for turn in turns}) == len(turns) == 4
        assert len({turn.masks[0].tobytes() for turn in turns[:2]}) == 2
        assert Counter(turn.masks[0].tobytes() for turn in turns).most_common(1)[0][1] == 2


def test_fewer_sentences_than_wanted_give_each_once(tmp_path):
    turns = _source(_write(tmp_path), expressions_per_image=9).get(0, np.random.default_rng(0)).turns
    assert len(turns) == 5


def test_same_text_is_asked_once_per_sample(tmp_path):
    refs = [_ref(1, 1, 10, "train", (1, "A box."), (2, "a box"), (3, "other")), _ref(2, 1, 11, "train", (4, "a BOX"))]
    source = _source(_write(tmp_path, refs=refs), question_style="fixed")
    for seed in range(10):
        questions = [turn.question for turn in source.get(0, np.random.default_rng(seed)).turns]
        assert sorted(questions) == [
            "Please segment a box in this image.",
            "Please segment other in this image.",
        ]


def test_refs_with_equal_texts_are_both_evaluated(tmp_path):
    texts = "a box", "the box"
    refs = [_ref(i, 1, ann_id, "train", *enumerate(texts, start=10 * i)) for i, ann_id in ((1, 10), (2, 11))]
    source = _source(_write(tmp_path, refs=refs), expressions_per_image=2)
    for seed in range(40):
        first, second = source.get(0, np.random.default_rng(seed)).turns
        assert first.masks[0].tobytes() != second.masks[0].tobytes()


def test_every_sentence_is_reached_over_epochs(tmp_path):
    source = _source(_write(tmp_path), expressions_per_image=1, question_style="fixed")
    seen = Counter(source.get(0, np.random.default_rng(epoch)).turns[0].question for epoch in range(300))
    assert len(seen) == 5
    assert min(seen.values()) > 20


def test_empty_sentences_are_skipped_of_training_and_logged(tmp_path, caplog):
    refs = [_ref(1, 1, 10, "train", (1, " . "), (2, "box")), _ref(2, 2, 20, "train", (3, "."))]
    source = _source(_write(tmp_path, refs=refs), question_style="fixed")
    assert len(source) == 1
    assert [turn.question for turn in source.get(0, np.random.default_rng(0)).turns] == [
        "Please segment box in this image."
    ]
    assert "skipped 2 sentences" in caplog.text


def test_no_target_turn_is_answered_as_released_with_an_empty_mask(tmp_path):
    _write(tmp_path, refs=GREFS, name="grefs(unc).json")
    turns = _source(tmp_path, split="val").get(0, np.random.default_rng(0)).turns
    by_area = {int(turn.masks[0].sum()): turn.answer for turn in turns}
    assert by_area[0] == NO_TARGET_ANSWER == "No target [SEG]."
    assert set(by_area) == {0, 4, 7}
    assert by_area[7] in REFER_ANSWERS


def test_wrong_settings_are_rejected_when_the_source_is_made(tmp_path):
    root = _write(tmp_path)
    for settings in ({"expressions_per_image": 0}, {"text_field": "tokens"}, {"question_style": "wild"}):
        with pytest.raises(ValueError, match="expected"):
            _source(root, **settings)


def test_shared_refcocog_sample_loads():
    root = shared_data("derived_refer_mini")
    annotations = load_refer(root, "refcocog", "val")
    result = expressions(annotations)
    assert {e.sent_id: e.text for e in result} == {
        26935: "the airplane with number n447mb",
        11653: "smaller green plane",
        28512: "a half scale replica of a white jet",
        60654: "the yellow plane with a pink stripe",
    }
    assert all(e.image_path.is_file() for e in result)
    areas = {
        row["id"]: row["area"] for row in json.loads((root / "refcocog/instances.json").read_text())["annotations"]
    }
    refs = {ref.ref_id: ref for group in annotations.refs_by_image.values() for ref in group}
    for expression in result:
        area = areas[refs[expression.ref_id].ann_ids[0]]
        assert decode_rle(expression.target).sum() == pytest.approx(area, rel=0.02)


def test_shared_refcocog_sample_without_images_loads():
    root = shared_data("derived_refer_mini_nophotos")
    train, val = (expressions(load_refer(root, "refcocog", split)) for split in ("train", "val"))
    assert (len(train), len({e.ref_id for e in train})) == (16, 8)
    assert (len(val), len({e.ref_id for e in val})) == (8, 4)
    assert len({(e.ref_id, e.sent_id) for e in train + val}) == 24
    assert len({e.image_id for e in train + val}) == 6
    source = load(root=root, dataset="refcocog", question_style="fixed")
    questions = {t.question for i in range(len(source)) for t in source.get(i, np.random.default_rng(i)).turns}
    assert "Please segment a tv with a woman being interviewed on it in this image." in questions


def test_shared_grefcoco_sample_loads():
    annotations = load_refer(shared_data("derived_gref_mini"), "grefcoco", "val")
    result = expressions(annotations)
    assert (len(result), len({e.image_id for e in result}), annotations.num_skipped) == (27, 25, 0)
    no_target = {e.text for e in result if e.target is None}
    assert len(no_target) == 5
    assert "person outside the middle window" in no_target
    source = ReferSource(annotations, name="grefcoco")
    turns = [t for i in range(len(source)) for t in source.get(i, np.random.default_rng(i)).turns]
    assert len(turns) == 27
    assert {t.answer for t in turns if not t.masks[0].any()} == {NO_TARGET_ANSWER}
    assert sum(not t.masks[0].any() for t in turns) == 5


@pytest.mark.parametrize("height", [10**9, 10**400])
def test_an_image_size_that_no_image_has_is_rejected(tmp_path, height):
    images = [{**image, "height": height} for image in INSTANCES["images"]]
    _write(tmp_path, instances={**INSTANCES, "images": images})
    with pytest.raises(DataError, match=r"image id \d+: found .*expected (at most|a number of 64 bits)"):
        load_refer(tmp_path, "toy", "train")

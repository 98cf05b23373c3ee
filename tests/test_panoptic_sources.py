"""COCO panoptic and Pix2Cap sources: correct turns, masks and marked regions for every sampling."""

import copy
import inspect
import json
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import yaml
from hydra.utils import get_method
from PIL import Image
from shared_data import shared_data
from synthetic_panoptic import (
    DATA,
    DOG,
    GRASS,
    PIXELS,
    SEGMENTS,
    changed,
    json_file,
    mask_areas,
    pixels_of,
    sampled_turns,
    segment_entry,
    write,
)

from pixel_sail.config import CONFIG_FOLDER
from pixel_sail.data.sources import coco_panoptic, coco_semantic, coco_vp, pix2cap_seg, pix2cap_vp
from pixel_sail.data.templates import region_class, segmentation
from pixel_sail.data.templates.referring import REFER_ANSWERS
from pixel_sail.types import DataError, MissingDataError


@pytest.fixture(autouse=True)
def _index_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _all_sources(root):
    options = {"root": root, "split": "train2017"}
    return [
        coco_panoptic.load(**options),
        coco_semantic.load(**options),
        coco_vp.load(**options),
        pix2cap_seg.load(file=json_file(root), **options),
        pix2cap_vp.load(file=json_file(root), **options),
    ]


def test_images_without_content_are_skipped_and_counted(tmp_path, caplog):
    data = copy.deepcopy(DATA)
    data["annotations"][0]["segments_info"] = [segment_entry(3, DOG, iscrowd=1)]
    lengths = [len(source) for source in _all_sources(write(tmp_path, data))]
    assert lengths == [1, 2, 1, 1, 1], "only the semantic source asks for a crowd"
    assert "source coco_panoptic: skipped 1 of 2 images without a segment that is not a crowd" in caplog.text
    assert "source pix2cap_vp: skipped 1 of 2 images without a description" in caplog.text


def test_sources_are_functions_of_index_and_rng_and_survive_pickling(tmp_path):
    for source in _all_sources(write(tmp_path)):
        copied = pickle.loads(pickle.dumps(source))
        sampled = [s.get(0, np.random.default_rng(seed)) for seed in range(12) for s in (source, copied)]
        texts = [
            [(turn.question, turn.answer, mask_areas(turn)) for turn in sample.turns]
            + [(prompt.prompt_id, prompt.mask.tobytes()) for prompt in sample.prompts]
            for sample in sampled
        ]
        assert texts[::2] == texts[1::2]
        assert len({str(text) for text in texts}) > 8
        sample = sampled[0]
        assert (sample.sample_id, sample.image_hw) == (f"{source.name}/train2017/image=5", (4, 6))
        assert sample.image_path == source.image_path(0) == tmp_path / "Images/train2017/000000000005.jpg"


def test_samples_become_tokens(tmp_path, processor):
    data = copy.deepcopy(DATA)
    for row in data["images"]:
        row.update(height=32, width=48)
    root = write(tmp_path, data, PIXELS.repeat(8, axis=0).repeat(8, axis=1))
    image = Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8))
    for source in _all_sources(root):
        sample = source.get(0, np.random.default_rng(1))
        example = processor.encode_sample(sample, image, independent_turns=False)
        assert len(example.masks) == sum(len(turn.masks) for turn in sample.turns)


def test_wrong_settings_are_rejected_when_the_source_is_made(tmp_path):
    root = write(tmp_path)
    for make, settings in (
        (coco_panoptic.load, {"classes_per_sample": 0}),
        (coco_panoptic.load, {"instances_per_class": -1}),
        (coco_panoptic.load, {"class_names": "mine"}),
        (coco_panoptic.load, {"many_instances": "all"}),
        (coco_semantic.load, {"crowds": "all"}),
        (coco_vp.load, {"candidates": "11"}),
        (coco_semantic.load, {"classes_per_sample": 0}),
        (coco_vp.load, {"regions_per_sample": 16}),
        (coco_vp.load, {"num_candidates": 0}),
        (coco_vp.load, {"others_fraction": 1.5}),
        (coco_vp.load, {"prompt_fractions": {"circle": 1.0}}),
        (pix2cap_seg.load, {"descriptions_per_sample": 0, "file": json_file(root)}),
        (pix2cap_vp.load, {"regions_per_sample": 0, "file": json_file(root)}),
        (pix2cap_vp.load, {"absent_fraction": 2.0, "file": json_file(root)}),
    ):
        with pytest.raises(DataError, match="expected") as error:
            make(root=root, **settings)
        # An evaluation may skip missing data, but not a wrong setting.
        assert not isinstance(error.value, MissingDataError)


@pytest.mark.parametrize("name", ["coco_panoptic", "coco_semantic", "coco_vp", "pix2cap_seg", "pix2cap_vp"])
def test_config_names_a_loader_and_arguments_it_takes(name):
    node = yaml.safe_load((CONFIG_FOLDER / "source" / f"{name}.yaml").read_text())[name]
    loader = get_method(node.pop("_target_"))
    assert inspect.signature(loader).bind(**node).arguments.keys() == node.keys()
    assert inspect.signature(loader).parameters["name"].default == name


# Panoptic and semantic turns


def test_things_are_numbered_from_left_to_right_and_crowds_are_ignored(tmp_path):
    turns = [turn for turn in sampled_turns(coco_panoptic.load(root=write(tmp_path))) if "dog" in turn.answer]
    for turn in turns:
        assert turn.answer == "dog-1 [SEG] dog-2 [SEG]."
        assert turn.question.endswith(" Segmentation in the instance mode.")
        for mask, number in zip((*turn.masks, turn.ignored), (2, 1, 3), strict=True):
            np.testing.assert_array_equal(mask, pixels_of(number))
    assert len({turn.question for turn in turns}) > 5


def test_stuff_is_one_mask_of_all_its_segments(tmp_path):
    turns = [turn for turn in sampled_turns(coco_panoptic.load(root=write(tmp_path))) if "grass" in turn.answer]
    for turn in turns:
        assert (turn.answer, turn.ignored) == ("grass [SEG].", None)
        assert turn.question.endswith(" Segmentation in the semantic mode.")
        np.testing.assert_array_equal(turn.masks[0], (PIXELS == 8) | (PIXELS == 9))
    assert turns


def test_class_with_only_a_crowd_is_no_question_of_the_instance_source(tmp_path):
    segments = [segment for segment in SEGMENTS if segment["id"] not in (1, 2)]
    root = write(tmp_path, changed(segments_info=segments), np.where(PIXELS < 3, 0, PIXELS))
    assert {turn.answer for turn in sampled_turns(coco_panoptic.load(root=root))} == {"grass [SEG].", "wall [SEG]."}
    semantic = {turn.question for turn in sampled_turns(coco_semantic.load(root=root))}
    assert any("dog" in question for question in semantic)


def test_class_with_too_many_things_is_one_mask(tmp_path):
    root = write(tmp_path)
    for limit, areas in ((0, [3, 3]), (2, [3, 3]), (1, [10])):
        source = coco_panoptic.load(root=root, instances_per_class=limit)
        turns = [turn for turn in sampled_turns(source) if "dog" in turn.question]
        assert {tuple(mask_areas(turn)) for turn in turns} == {tuple(areas)}
        assert all("semantic mode" in turn.question for turn in turns) == (limit == 1)


def test_classes_of_a_sample_differ_and_all_are_reached(tmp_path):
    for module in (coco_panoptic, coco_semantic):
        source = module.load(root=write(tmp_path), classes_per_sample=2)
        seen = Counter()
        for seed in range(60):
            masks = [turn.masks[0].tobytes() for turn in source.get(0, np.random.default_rng(seed)).turns]
            assert len(set(masks)) == 2
            seen.update(masks)
        assert len(seen) == 3
        assert min(seen.values()) > 20


def test_semantic_turns_unite_all_segments_of_a_class(tmp_path):
    areas = {"dog": 10, "grass": 8, "wall": 3}
    turns = sampled_turns(coco_semantic.load(root=write(tmp_path)))
    for turn in turns:
        name = next(name for name in areas if f"all the {name}" in turn.question)
        assert mask_areas(turn) == [areas[name]]
        assert turn.question.endswith(" Segmentation in the semantic mode.")
        assert turn.ignored is None
    assert {turn.answer for turn in turns} == set(REFER_ANSWERS)


def test_spoken_names_have_no_hyphen_and_differ(tmp_path):
    assert segmentation.spoken_name("wall-other-merged") == "wall"
    assert segmentation.spoken_name("wall-brick") == "brick wall"
    assert segmentation.spoken_name("door-stuff") == "door"
    assert segmentation.spoken_name("t-shirt") == "t shirt"
    assert segmentation.spoken_name("hot dog") == "hot dog"
    with pytest.raises(DataError, match=r"'wall' for category 2 \('wall-other'\), as for category 1 \('wall-merged'\)"):
        segmentation.spoken_names({1: "wall-merged", 2: "wall-other"}, "here")


def test_names_may_come_from_a_class_file(tmp_path):
    root, names = write(tmp_path), tmp_path / "names.txt"
    names.write_text("0:invalid_class_id\n18:puppy,hound\n193:lawn\n199:brick-work,wall\n250:spare\n")
    answers = {turn.answer for turn in sampled_turns(coco_panoptic.load(root=root, class_file=names))}
    assert answers == {"puppy-1 [SEG] puppy-2 [SEG].", "lawn [SEG].", "brick work [SEG]."}
    for text, message in (
        ("18:a\n193:b\n", r"no name for the categories \[199\]"),
        ("18:a\n193:b\n199:invalid_class_id\n", r"no name for the categories \[199\]"),
        ("18:a\n193:b\n199:a\n", "'a' for category 199"),
        ("18:a\nb\n", "line 2: found 'b'"),
        ("18:a\n18:b\n", "line 2: found '18:b'"),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            coco_panoptic.load(root=root, class_file=names)
    with pytest.raises(DataError, match="no such file"):
        coco_panoptic.load(root=root, class_file=tmp_path / "absent.txt")


COCO_NAMES = {
    "orange": "orange fruit",
    "remote": "tv remote",
    "scissors": "scissor",
    "floor-wood": "wood floor",
    "light": "lamp",
    "net": "tennis net",
    "wall-tile": "tile wall",
    "wall-wood": "wood wall",
}


def test_the_released_class_names_are_those_of_its_class_list(tmp_path):
    names = [*COCO_NAMES, "floor-other-merged", "wall-brick", "dog"]
    data = copy.deepcopy(DATA)
    data["categories"] = [{"id": i, "name": name, "isthing": 0} for i, name in enumerate(names)]
    data["annotations"][1]["segments_info"] = [segment_entry(1, 0)]
    root = write(tmp_path, data)
    for module in (coco_panoptic, coco_semantic, coco_vp):
        found = {option: module.load(root=root, class_names=option)._classes.names for option in ("ours", "released")}
        assert module.load(root=root)._classes.names == found["ours"]
        changed_names = {i for i, name in found["ours"].items() if found["released"][i] != name}
        assert changed_names == set(range(len(COCO_NAMES)))
        assert list(found["released"].values()) == [*COCO_NAMES.values(), "floor", "brick wall", "dog"]


def test_the_released_names_are_eight_others_of_coco(tmp_path):
    file = shared_data("panopticapi_sample") / "panoptic_coco_categories.json"
    names = {row["id"]: row["name"] for row in json.loads(file.read_text())}
    assert len(names) == 133 and set(COCO_NAMES) <= set(names.values())
    spoken = segmentation.spoken_names({i: COCO_NAMES.get(name, name) for i, name in names.items()}, "here")
    before = segmentation.spoken_names(names, "here")
    assert sum(spoken[i] != before[i] for i in names) == 8
    assert segmentation.RELEASED_NAMES == COCO_NAMES


def test_a_class_file_goes_before_the_released_names(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("18:puppy\n193:lawn\n199:brick-work\n")
    source = coco_panoptic.load(root=write(tmp_path), class_file=names, class_names="released")
    assert "puppy" in source._classes.names.values()


def test_crowds_are_background_in_the_release(tmp_path):
    root = write(tmp_path)
    for turn in sampled_turns(coco_panoptic.load(root=root, crowds="released")):
        assert turn.ignored is None
        assert mask_areas(turn) in ([3, 3], [8], [3])
    assert any(turn.ignored is not None for turn in sampled_turns(coco_panoptic.load(root=root, crowds="ours")))
    for option, area in (("ours", 10), ("released", 6)):
        turns = sampled_turns(coco_semantic.load(root=root, crowds=option))
        assert {tuple(mask_areas(turn)) for turn in turns if "dog" in turn.question} == {(area,)}


def test_images_with_nothing_but_crowds_are_skipped_where_crowds_are_background(tmp_path):
    data = copy.deepcopy(DATA)
    data["annotations"][0]["segments_info"] = [segment_entry(3, DOG, iscrowd=1)]
    root = write(tmp_path, data)
    assert [len(coco_semantic.load(root=root, crowds=option)) for option in ("ours", "released")] == [2, 1]
    stuff = [segment_entry(9, GRASS, iscrowd=1)]
    root = write(tmp_path / "stuff", changed(segments_info=stuff), np.where(PIXELS == 9, 9, 0))
    assert [len(coco_panoptic.load(root=root, crowds=option)) for option in ("ours", "released")] == [1, 0]


def test_the_release_spells_out_any_number_of_things(tmp_path):
    root = write(tmp_path)
    for option, answers in (("ours", set(REFER_ANSWERS)), ("released", {"dog-1 [SEG] dog-2 [SEG]."})):
        source = coco_panoptic.load(root=root, instances_per_class=1, many_instances=option)
        assert {turn.answer for turn in sampled_turns(source) if "dog" in turn.question} <= answers


# Pix2Cap


def test_each_described_segment_has_one_question(tmp_path):
    source = pix2cap_seg.load(file=json_file(write(tmp_path)), root=tmp_path)
    expected = {"the dog on the right": 3, "the dog in the middle": 3, "wet grass": 8}
    turns = sampled_turns(source)
    assert len(turns) == 40 * 3
    for turn in turns:
        text = next(text for text in expected if text in turn.question)
        assert mask_areas(turn) == [expected[text]]
        assert turn.answer in REFER_ANSWERS
    assert (
        len(sampled_turns(pix2cap_seg.load(file=json_file(tmp_path), root=tmp_path, descriptions_per_sample=2)))
        == 40 * 2
    )
    long_only = pix2cap_seg.load(file=json_file(tmp_path), root=tmp_path, min_description_chars=10)
    assert len(sampled_turns(long_only)) == 40 * 2


def test_pix2cap_need_not_list_every_segment_of_the_png(tmp_path):
    file = tmp_path / "some.json"
    write(tmp_path)
    file.write_text(json.dumps(changed(segments_info=SEGMENTS[:1])))
    assert [mask_areas(turn) for turn in sampled_turns(pix2cap_seg.load(file=file, root=tmp_path), range(3))] == [
        [3]
    ] * 3


def test_marked_segments_are_described(tmp_path):
    texts = {"the dog on the right": (1,), "the dog in the middle": (2,), "wet grass": (9, 8)}
    source = pix2cap_vp.load(file=json_file(write(tmp_path)), root=tmp_path, absent_fraction=0.3)
    lengths, absent = Counter(), 0
    for seed in range(80):
        sample = source.get(0, np.random.default_rng(seed))
        masks = {prompt.prompt_id: prompt.mask for prompt in sample.prompts}
        lengths[len(masks)] += 1
        described = []
        for turn in sample.turns:
            number, text = re.fullmatch(r"<Prompt(\d+)>:? (.*)", turn.answer).groups()
            assert f"<Prompt{number}>" in turn.question
            if int(number) in masks:
                described.append(int(number))
                assert any(np.array_equal(masks[int(number)], pixels_of(k)) for k in texts[text])
            else:
                absent += 1
                assert text == "is not in the image."
        assert sorted(described) == sorted(masks)
    assert set(lengths) == {1, 2, 3, 4}, "four segments have a text"
    assert absent > 10


# Classes of marked regions


def test_region_is_classified_among_candidates(tmp_path):
    names = {1: "dog", 2: "dog", 8: "grass", 9: "grass", 70000: "wall"}
    source = coco_vp.load(root=write(tmp_path), num_candidates=2, others_fraction=0.25, absent_fraction=0.0)
    right = Counter()
    for seed in range(80):
        sample = source.get(0, np.random.default_rng(seed))
        assert len(sample.prompts) == len(sample.turns) == 5
        for turn, prompt in zip(sample.turns, sample.prompts, strict=True):
            question, listed = re.fullmatch(r"(.*) The candidate categories: (.*)\.", turn.question).groups()
            assert f"<Prompt{prompt.prompt_id}>" in question
            *candidates, last = listed.split(", ")
            assert (len(set(candidates)), last) == (2, "others")
            number = next(k for k in names if np.array_equal(prompt.mask, pixels_of(k)))
            is_listed = names[number] in candidates
            right[is_listed] += 1
            answer = names[number] if is_listed else "others."
            assert turn.answer == f"<Prompt{prompt.prompt_id}>: {answer}"
    assert 60 < right[False] < 140, "a quarter of 400"


def test_the_release_lists_one_candidate_more_where_the_right_one_was_not_sampled(tmp_path):
    """Three names, of which two are sampled: the right one is among them in two of three cases."""
    root = write(tmp_path)
    for fraction, numbers in ((0.0, (2, 3)), (1.0, (1, 2))):
        source = coco_vp.load(
            root=root, num_candidates=2, others_fraction=fraction, absent_fraction=0.0, candidates="released"
        )
        counts, places = Counter(), Counter()
        for turn in sampled_turns(source, range(120)):
            *candidates, last = turn.question.rsplit(": ", 1)[1].removesuffix(".").split(", ")
            assert last == "others" and len(set(candidates)) == len(candidates)
            counts[len(candidates)] += 1
            name = turn.answer.split(": ")[1]
            assert (name in candidates) == (fraction == 0.0) and (name == "others.") == (fraction == 1.0)
            if name in candidates:
                places[len(candidates), candidates.index(name)] += 1
        assert set(counts) == set(numbers), fraction
        assert 0.58 < counts[numbers[0]] / counts.total() < 0.75, "two of three"
        assert len(places) == (5 if fraction == 0.0 else 0), "the right one is at any position"


def test_question_for_an_absent_region_has_no_candidates(tmp_path):
    source = coco_vp.load(root=write(tmp_path), absent_fraction=1.0)
    for seed in range(10):
        first = source.get(0, np.random.default_rng(seed)).turns[0]
        assert first.answer.endswith("is not in the image.")
        assert "candidate" not in first.question


def test_sample_may_use_up_all_prompts(tmp_path):
    source = coco_vp.load(root=write(tmp_path), num_prompts=5, absent_fraction=1.0)
    sample = source.get(0, np.random.default_rng(0))
    assert sorted(prompt.prompt_id for prompt in sample.prompts) == [0, 1, 2, 3, 4]
    assert not any("not in the image" in turn.answer for turn in sample.turns)


def test_regions_are_marked_by_the_configured_kinds(tmp_path):
    root = write(tmp_path)
    for fractions in ({"point": 1.0}, {"box": 0.5, "point": 0.5}):
        source = coco_vp.load(root=root, prompt_fractions=fractions)
        sizes = Counter(
            int(prompt.mask.sum())
            for seed in range(20)
            for prompt in source.get(0, np.random.default_rng(seed)).prompts
        )
        assert (set(sizes) == {1}) == ("box" not in fractions)
        assert sizes[1] > 20


# Templates


def test_every_template_contains_its_placeholder_once():
    for templates in (segmentation.INSTANCE_QUESTIONS, segmentation.STUFF_QUESTIONS):
        assert all(template.count("{name}") == 1 for template in templates)
    assert all(template.count("all the {name}") == 1 for template in segmentation.SEMANTIC_QUESTIONS)
    assert all(template.count("{description}") == 1 for template in segmentation.DESCRIPTION_QUESTIONS)
    for templates in (region_class.CLASS_QUESTIONS, region_class.DETAIL_QUESTIONS):
        assert all(template.count("{region}") == 1 for template in templates)
        assert len(set(templates)) == len(templates)


def test_braces_in_names_and_descriptions_are_kept():
    mask = np.ones((2, 2), dtype=bool)
    turn = segmentation.description_turn("a {odd} sign {name}", mask, np.random.default_rng(0))
    assert "a {odd} sign {name}" in turn.question

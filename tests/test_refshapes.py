"""RefShapes: exact masks, unambiguous expressions, the original file formats, the same bytes for the same seed.

Checks `pixel_sail/refshapes` and `tools/make_refshapes.py`. Each test renders its own few images.
"""

import itertools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pixel_sail.refshapes import RefShapesSpec, formats, write_refshapes
from pixel_sail.refshapes.baselines import GUESSES, ReferredObject, blind_choices, blind_scores
from pixel_sail.refshapes.expressions import Describer
from pixel_sail.refshapes.focus import FOCI, FOCUS_FRACTIONS, SceneRules, pick_focus
from pixel_sail.refshapes.kinds import COLOURS, HELD_OUT_PAIRS, SHAPES, TEXTURES, VALUES
from pixel_sail.refshapes.queries import Query, SceneExpression, decides, denote, is_put_to_the_test, names_held_out
from pixel_sail.refshapes.scene import ACROSS_PX, IMAGE_SIZES, Scene, SceneObject, paint_scene
from pixel_sail.types import DataError

ATTRIBUTE_KINDS = ("colour", "shape", "size_texture")
SPEC = RefShapesSpec(seed=3, num_train=12, num_eval=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refshapes") / "data"
    assert write_refshapes(out, SPEC, num_workers=1)
    return out


def scene_of(split: str, index: int) -> Scene:
    return formats.sample_described_scene(3, split, index)[1]


def sentences_of(split: str, num_images: int) -> list[tuple[Scene, SceneExpression]]:
    found: list[tuple[Scene, SceneExpression]] = []
    for index in range(num_images):
        _, scene, singles = formats.sample_described_scene(3, split, index)
        describer = Describer(scene, np.random.default_rng(index), may_name_held_out=split == "testB")
        several = [describer.plural() for _ in range(6)] + [describer.no_target() for _ in range(12)]
        found += [(scene, sentence) for sentence in [*singles, *filter(None, several)]]
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def object_at(x: float, y: float, index: int, **values: str) -> SceneObject:
    box = (int(x) - 5, int(y) - 5, int(x) + 5, int(y) + 5)
    kind = {"colour": "red", "shape": "star", "texture": "plain", "size": "small", **values}
    mask = np.zeros((100, 100), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return SceneObject(**kind, index=index, centre_xy=(x, y), box_xyxy=box, area=100, visible_fraction=1.0, mask=mask)


def scene_with(*objects: SceneObject) -> Scene:
    return Scene(image_hw=(100, 100), focus="place", objects=objects)


def test_masks_are_disjoint_and_keep_their_visible_fraction() -> None:
    for index in range(20):
        scene = scene_of("testA", index)
        stacked = np.stack([item.mask for item in scene.objects])
        assert stacked.sum(0).max() == 1
        assert [int(mask.sum()) for mask in stacked] == [item.area for item in scene.objects]
        assert min(item.visible_fraction for item in scene.objects) >= 0.6


def test_masks_cover_the_pixels_that_carry_the_paint() -> None:
    mean = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
    scenes = [scene_of("train", index) for index in range(30)]
    images = {id(scene): paint_scene(np.random.default_rng(0), scene).astype(float) for scene in scenes}
    found = [(scene, item) for scene in scenes for item in scene.objects if item.colour in mean]
    for scene, item in found:
        redness = images[id(scene)] @ np.array(mean[item.colour])
        outside = ~np.any([other.mask for other in scene.objects], axis=0)
        assert redness[item.mask].mean() > redness[outside].mean() + 30
    assert len(found) > 20


def test_size_classes_are_clearly_apart() -> None:
    assert ACROSS_PX["small"][1] + 8 <= ACROSS_PX["large"][0]


@pytest.mark.parametrize("split", formats.SPLITS)
def test_object_counts_image_sizes_and_focus_follow_the_rules(split: str) -> None:
    scenes = [scene_of(split, index) for index in range(12)]
    assert all(2 <= len(scene.objects) <= 6 and scene.image_hw in IMAGE_SIZES for scene in scenes)
    assert {scene.focus for scene in scenes} <= (
        {formats.SCENE_RULES[split].focus} if split in formats.KIND_SPLITS else set(FOCI)
    )
    if split == "testA":
        assert all(len({item.shape for item in scene.objects}) == 1 for scene in scenes)
    scene = scenes[0]
    assert paint_scene(np.random.default_rng(0), scene).shape == (*scene.image_hw, 3)


@pytest.mark.parametrize("split", formats.SPLITS)
def test_every_expression_denotes_exactly_its_targets(split: str) -> None:
    found = sentences_of(split, 12)
    assert all(denote(scene, sentence.query) == set(sentence.targets) for scene, sentence in found)
    assert {"plural", "none"} <= {sentence.kind for _, sentence in found}
    assert all(decides(scene, item.query) == item.kind for scene, item in found if len(item.targets) == 1)


@pytest.mark.parametrize("split", formats.KIND_SPLITS)
def test_an_expression_of_one_kind_is_decided_by_that_kind_only(dataset: Path, split: str) -> None:
    """Sample the scenes of the files again, and check the written sentences against the meaning they were sampled
    for."""
    instances = read(dataset / "refshapes" / "instances.json")
    refs = [ref for ref in pickle.loads((dataset / "refshapes" / "refs(unc).p").read_bytes()) if ref["split"] == split]
    images = sorted({ref["image_id"] for ref in refs})
    assert len(images) == SPEC.num_eval
    for index, image_id in enumerate(images):
        _, scene, sentences = formats.sample_described_scene(SPEC.seed, split, index)
        ann_ids = [item["id"] for item in instances["annotations"] if item["image_id"] == image_id]
        written = {s["sent"]: r["ann_id"] for r in refs if r["image_id"] == image_id for s in r["sentences"]}
        assert written == {sentence.text: ann_ids[sentence.targets[0]] for sentence in sentences}
        assert 2 <= len(sentences) <= 3
        for sentence in sentences:
            (target,) = sentence.targets
            assert decides(scene, sentence.query) == sentence.kind == formats.KIND_SPLITS[split]
            assert denote(scene, sentence.query) == {target}
            alike = {name: alike_in(scene, target, name) for name in ("colour", "shape")}
            assert alike["shape" if sentence.kind == "colour" else "colour"] != {target}
            if sentence.kind == "colour":
                assert alike["colour"] == {target}


def alike_in(scene: Scene, target: int, name: str) -> set[int]:
    return {item.index for item in scene.objects if getattr(item, name) == getattr(scene.objects[target], name)}


def test_the_deciding_attribute_is_the_first_sufficient_of_color_shape_and_rest() -> None:
    red, blue = object_at(10, 10, 0, size="large"), object_at(90, 90, 1, colour="blue")
    ring, dotted = object_at(50, 50, 2, shape="ring"), object_at(30, 80, 3, texture="dotted")
    expected = {
        (("colour", "blue"),): "colour",
        (("size", "small"), ("colour", "blue"), ("shape", "star")): "colour",
        (("colour", "red"), ("shape", "ring")): "shape",
        (("shape", "ring"),): "shape",
        (("texture", "dotted"), ("colour", "red"), ("shape", "star")): "size_texture",
        (("size", "large"),): "size_texture",
    }
    scene = scene_with(red, blue, ring, dotted)
    assert {named: decides(scene, Query(attributes=named)) for named in expected} == expected
    assert decides(scene, Query(attributes=(("shape", "star"),), place="left")) == "place"
    assert decides(scene, Query(attributes=(("shape", "star"),), ordinal=(2, "left"))) == "negation_ordinal"
    assert decides(scene, Query(negated=("colour", "red"))) == "negation_ordinal"


def test_sufficient_words_without_color_or_shape_do_not_test_it() -> None:
    scene = scene_with(
        object_at(10, 10, 0, texture="dotted"), object_at(90, 90, 1, shape="ring"), object_at(50, 9, 2, colour="blue")
    )

    def is_asked(*named: tuple[str, str], target: int) -> bool:
        query = Query(attributes=named)
        sentence = SceneExpression(text="", query=query, targets=(target,), kind=decides(scene, query))
        return is_put_to_the_test(scene, sentence)

    assert is_asked(("colour", "red"), ("shape", "ring"), target=1) is True
    assert is_asked(("colour", "red"), ("shape", "star"), target=0) is True
    assert is_asked(("texture", "dotted"), ("colour", "red"), ("shape", "star"), target=0) is False
    assert is_asked(("colour", "blue"), ("shape", "star"), target=2) is True
    assert is_asked(("colour", "blue"), target=2) is True


def test_scenes_have_the_fractions_of_their_focus_and_colour_seldom_decides() -> None:
    rng = np.random.default_rng(0)
    sampled = [pick_focus(rng, SceneRules()) for _ in range(4000)]
    assert all(abs(sampled.count(focus) / 4000 - share) < 0.03 for focus, share in FOCUS_FRACTIONS.items())
    assert sum(FOCUS_FRACTIONS.values()) == pytest.approx(1)
    kinds = [sentence.kind for index in range(60) for sentence in formats.sample_described_scene(3, "train", index)[2]]
    assert 0.12 < kinds.count("colour") / len(kinds) < 0.35
    assert all(kinds.count(focus) / len(kinds) > 0.03 for focus in FOCI)


def test_blind_scores_equal_those_of_their_masks() -> None:
    asked = [
        ReferredObject(areas=(100, 300, 50), colours=("red", "red", "blue"), target=0),
        ReferredObject(areas=(40, 60), colours=("red", "blue"), target=1),
    ]
    scores = blind_scores(asked)
    assert scores["every object"] == {"ciou": 160 / 550, "giou": pytest.approx((100 / 450 + 60 / 100) / 2)}
    assert scores["largest object"] == {"ciou": 60 / 460, "giou": 0.5}
    assert scores["target's colour"] == {"ciou": 160 / 460, "giou": pytest.approx((100 / 400 + 1) / 2)}
    expected = (100 / 3 + 30) / ((100 + 400 + 150) / 3 + (60 + 100) / 2)
    assert scores["random object"] == {"ciou": pytest.approx(expected), "giou": pytest.approx((1 / 3 + 1 / 2) / 2)}
    assert blind_scores([]) == {}


def test_blind_choices_know_the_letters_and_the_usual_answers() -> None:
    sizes = ["A. large", "B. small", "B. small"]
    asked = [{"question": "What is the size?\nA. large\nB. small\n", "answer": answer} for answer in sizes]
    asked.append({"question": "What is the shape?\nA. ring\nB. star\n", "answer": "A. ring"})
    assert blind_choices(asked) == {"same letter": 0.5, "usual value": 0.75}


def test_attribute_sentences_agree_with_a_reading_of_their_text() -> None:
    """Parse the words, without the query, and compare with the objects that carry those attributes."""
    canonical = {"box": "square", "disc": "circle", "big": "large", "little": "small", "spotted": "dotted",
                 "checked": "checkered", "solid": "plain", "stripes": "striped", "dots": "dotted",
                 "checks": "checkered"}  # fmt: skip
    for scene, sentence in [pair for pair in sentences_of("train", 25) if pair[1].kind in ATTRIBUTE_KINDS]:
        words = {canonical.get(word, word) for word in sentence.text.replace("plus sign", "cross").split()}
        asked = {name: words & set(values) for name, values in VALUES.items()}
        assert words <= {"the", "with", "thing", "object", "shape"}.union(*asked.values()), sentence.text
        fits = {
            item.index
            for item in scene.objects
            if all(not wanted or getattr(item, name) in wanted for name, wanted in asked.items())
        }
        assert fits == set(sentence.targets), sentence.text


def test_single_sentences_use_no_more_than_one_spare_attribute() -> None:
    for scene, sentence in [pair for pair in sentences_of("train", 15) if pair[1].kind in ATTRIBUTE_KINDS]:
        named = sentence.query.attributes
        smaller = [Query(attributes=part) for k in range(len(named) - 1) for part in itertools.combinations(named, k)]
        too_short = [query for query in smaller if denote(scene, query) == set(sentence.targets)]
        assert len(named) <= 2 or not any(len(query.attributes) < len(named) - 2 for query in too_short)


def test_no_target_sentences_name_only_values_that_occur() -> None:
    for scene, sentence in [pair for pair in sentences_of("val", 20) if pair[1].kind == "none"]:
        present = {name: {getattr(item, name) for item in scene.objects} for name in VALUES}
        assert all(value in present[name] for name, value in sentence.query.attributes)
        assert denote(scene, sentence.query) == frozenset()


def test_plural_sentences_have_several_targets_but_not_all() -> None:
    found = [(scene, sentence) for scene, sentence in sentences_of("train", 20) if sentence.kind == "plural"]
    assert all(2 <= len(sentence.targets) < len(scene.objects) for scene, sentence in found)


def test_leftmost_needs_ten_pixels_between_centres() -> None:
    query = Query(place="left")
    assert denote(scene_with(object_at(20, 50, 0), object_at(29, 50, 1)), query) is None
    assert denote(scene_with(object_at(20, 50, 0), object_at(31, 50, 1)), query) == {0}


def test_second_from_the_left_counts_by_centre() -> None:
    scene = scene_with(object_at(60, 50, 0), object_at(20, 10, 1), object_at(40, 90, 2))
    assert denote(scene, Query(ordinal=(2, "left"))) == {2}
    assert denote(scene, Query(ordinal=(2, "right"))) == {2}
    assert denote(scene, Query(ordinal=(3, "left"))) == {0}


def test_below_is_rejected_when_an_object_is_only_half_below() -> None:
    ring = object_at(50, 30, 0, shape="ring")
    query = Query(attributes=(("shape", "star"),), relation=("below", Query(attributes=(("shape", "ring"),))))
    assert denote(scene_with(ring, object_at(50, 70, 1), object_at(50, 10, 2)), query) == {1}
    assert denote(scene_with(ring, object_at(50, 70, 1), object_at(90, 40, 2)), query) is None


def test_relation_to_an_anchor_that_is_not_unique_is_rejected() -> None:
    scene = scene_with(object_at(50, 30, 0, shape="ring"), object_at(10, 30, 1, shape="ring"), object_at(50, 70, 2))
    query = Query(attributes=(("shape", "star"),), relation=("below", Query(attributes=(("shape", "ring"),))))
    assert denote(scene, query) is None


def test_negation_denotes_what_fits_and_lacks_the_value() -> None:
    scene = scene_with(object_at(10, 10, 0), object_at(50, 50, 1, colour="blue"), object_at(80, 80, 2, shape="ring"))
    assert denote(scene, Query(attributes=(("shape", "star"),), negated=("colour", "red"))) == {1}


def test_held_out_pairs_are_a_tenth_of_all_pairs() -> None:
    assert 0.08 <= len(HELD_OUT_PAIRS) / (len(COLOURS) * len(SHAPES)) <= 0.12
    assert (
        len({colour for colour, _ in HELD_OUT_PAIRS})
        == len({shape for _, shape in HELD_OUT_PAIRS})
        == len(HELD_OUT_PAIRS)
    )


def test_held_out_pairs_are_shown_in_test_b_only() -> None:
    for split in formats.SPLITS[:-1]:
        assert not any(item.is_held_out for index in range(25) for item in scene_of(split, index).objects)
    assert all(any(item.is_held_out for item in scene_of("testB", index).objects) for index in range(25))


def test_held_out_pairs_are_named_in_test_b_only(dataset: Path) -> None:
    pairs = "|".join(rf"\b{colour}( ({'|'.join(TEXTURES)}))? {shape}" for colour, shape in sorted(HELD_OUT_PAIRS))
    texts = [sentence.text for split in formats.SPLITS[:-1] for _, sentence in sentences_of(split, 12)]
    for path in [*(dataset / "osprey").iterdir(), *(dataset / "llava").iterdir(), *(dataset / "perbench").iterdir()]:
        texts.append(path.read_text())
    assert not any(re.search(pairs, text) for text in texts)
    assert any(re.search(pairs, sentence.text) for _, sentence in sentences_of("testB", 12))


def test_denying_the_colour_of_a_shape_names_the_pair_too() -> None:
    colour, shape = sorted(HELD_OUT_PAIRS)[0]
    assert names_held_out(Query(attributes=(("shape", shape),), negated=("colour", colour)))
    assert not names_held_out(Query(attributes=(("shape", shape),), also=Query(attributes=(("colour", colour),))))


def test_same_seed_writes_the_same_bytes_with_two_workers(dataset: Path, tmp_path: Path) -> None:
    assert write_refshapes(tmp_path / "again", SPEC, num_workers=2)
    first, second = all_bytes(dataset), all_bytes(tmp_path / "again")
    assert [name for name in first if first[name] != second.get(name)] == []
    assert first.keys() == second.keys()


def test_another_seed_renders_another_dataset(dataset: Path, tmp_path: Path) -> None:
    write_refshapes(tmp_path / "other", RefShapesSpec(seed=4, num_train=1, num_eval=0), num_workers=1)
    name = "images/train2014/COCO_train2014_000000000001.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (dataset / name).read_bytes()


def test_existing_dataset_is_reused_or_rejected(dataset: Path, tmp_path: Path) -> None:
    before = all_bytes(dataset)
    assert not write_refshapes(dataset, SPEC, num_workers=1)
    with pytest.raises(DataError, match="seed is 3, expected 9"):
        write_refshapes(dataset, RefShapesSpec(seed=9, num_train=12, num_eval=4), num_workers=1)
    older = tmp_path / "older"
    older.mkdir()
    (older / "meta.json").write_text(json.dumps({**read(dataset / "meta.json"), "generator_version": 4}))
    with pytest.raises(DataError, match=r"found RefShapes of generator version 4, expected version 5.*val_shape.*move"):
        write_refshapes(older, SPEC, num_workers=1)
    with pytest.raises(DataError, match="no meta"):
        write_refshapes(tmp_path, SPEC, num_workers=1)
    assert all_bytes(dataset) == before


def test_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_refshapes(tmp_path / "data", SPEC, num_workers=1, on_image=stop)
    assert list(tmp_path.iterdir()) == []


def test_refs_are_plain_python_with_the_keys_of_refer(dataset: Path) -> None:
    content = (dataset / "refshapes" / "refs(unc).p").read_bytes()
    assert content[:2] == b"\x80\x02"
    assert b"numpy" not in content
    refs = pickle.loads(content)
    keys = {"ref_id", "ann_id", "image_id", "category_id", "file_name", "split", "sent_ids", "sentences"}
    assert all(ref.keys() == keys for ref in refs)
    assert {ref["split"] for ref in refs} == set(formats.SPLITS)
    sentences = [sentence for ref in refs for sentence in ref["sentences"]]
    assert all(sentence.keys() == {"sent_id", "sent", "raw", "tokens"} for sentence in sentences)
    assert [sentence["sent_id"] for sentence in sentences] == list(range(1, len(sentences) + 1))
    assert all(type(ref["ref_id"]) is int and type(ref["file_name"]) is str for ref in refs)


def test_refs_point_at_annotations_of_their_image(dataset: Path) -> None:
    instances = read(dataset / "refshapes" / "instances.json")
    annotations = {item["id"]: item for item in instances["annotations"]}
    assert len(annotations) == len(instances["annotations"])
    for ref in pickle.loads((dataset / "refshapes" / "refs(unc).p").read_bytes()):
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])


def test_instances_have_exact_masks_areas_and_boxes(dataset: Path) -> None:
    instances = read(dataset / "grefshapes" / "instances.json")
    assert instances.keys() == {"info", "licenses", "images", "annotations", "categories"}
    images = {image["id"]: image for image in instances["images"]}
    for annotation in instances["annotations"]:
        rle = annotation["segmentation"]
        image = images[annotation["image_id"]]
        assert rle["size"] == [image["height"], image["width"]]
        assert int(coco_mask.area(rle)) == annotation["area"]
        assert coco_mask.toBbox(rle).tolist() == annotation["bbox"]
    scene = scene_of("train", 0)
    decoded = [coco_mask.decode(item["segmentation"]) for item in instances["annotations"][: len(scene.objects)]]
    assert all(np.array_equal(mask, item.mask) for mask, item in zip(decoded, scene.objects, strict=True))


def test_images_on_disk_have_the_size_the_annotations_state(dataset: Path) -> None:
    for image in read(dataset / "refshapes" / "instances.json")["images"]:
        with Image.open(dataset / "images" / "train2014" / image["file_name"]) as opened:
            assert (opened.height, opened.width) == (image["height"], image["width"])
            assert opened.format == "JPEG"


def test_grefs_mark_missing_targets_with_minus_one(dataset: Path) -> None:
    grefs = read(dataset / "grefshapes" / "grefs(unc).json")
    keys = {"ref_id", "image_id", "split", "sentences", "sent_ids", "file_name", "category_id", "ann_id", "no_target"}
    assert all(ref.keys() == keys for ref in grefs)
    assert all((ref["ann_id"] == [-1]) == ref["no_target"] == (ref["category_id"] == [-1]) for ref in grefs)
    assert {min(2, len(ref["ann_id"]) - ref["no_target"]) for ref in grefs} == {0, 1, 2}


def test_perbench_answers_are_among_the_options_and_tags_have_masks(dataset: Path) -> None:
    captions = read(dataset / "perbench" / "STBench_Detailed_Caption.json")
    assert all(item["object_annotations"][0].keys() == {"segmentation", "caption"} for item in captions)
    for item in read(dataset / "perbench" / "STBench_MCQ.json"):
        assert all(f"\n{mcq['answer']}\n" in mcq["question"] for mcq in item["mcqs"])
        assert all(mcq.keys() == {"object", "question", "answer"} for mcq in item["mcqs"])
    for item in read(dataset / "perbench" / "STBench_VRES.json"):
        assert item.keys() == {"image_name", "question", "answer", "segmentations"}
        tags = [set(re.findall(r"<obj\d+>", item[part])) for part in ("question", "answer")]
        assert tags[0] and tags[1] and tags[0] | tags[1] == item["segmentations"].keys()


@pytest.mark.parametrize("name", ["conversation", "short_form", "detail_description"])
def test_osprey_regions_in_the_text_have_annotations(dataset: Path, name: str) -> None:
    items = read(dataset / "osprey" / f"osprey_{name}.json")
    assert len(items) == SPEC.num_train
    for item in items:
        assert {"file_name", "height", "width", "annotation", "conversations"} <= item.keys()
        text = " ".join(turn["value"] for turn in item["conversations"])
        numbers = {int(number) for number in re.findall(r"<region(\d+)>", text)}
        assert numbers == set(range(1, len(item["annotation"]) + 1))
        assert len(item.get("description", item["annotation"])) == len(item["annotation"])
        assert [turn["from"] for turn in item["conversations"][:2]] == ["human", "gpt"]


def test_llava_items_with_an_image_start_with_its_placeholder(dataset: Path) -> None:
    items = read(dataset / "llava" / "llava_v1_5_mix665k.json")
    assert all(("image" in item) == item["conversations"][0]["value"].startswith("<image>\n") for item in items)
    assert all((dataset / "images" / item["image"]).is_file() for item in items if "image" in item)


def test_meta_counts_the_contents_of_the_files(dataset: Path) -> None:
    meta = read(dataset / "meta.json")
    refs = pickle.loads((dataset / "refshapes" / "refs(unc).p").read_bytes())
    assert (meta["seed"], meta["generator_version"]) == (3, formats.GENERATOR_VERSION)
    assert meta["num_images"] == {split: 12 if split == "train" else 4 for split in formats.SPLITS}
    assert meta["focus_shares"] == FOCUS_FRACTIONS
    assert sum(meta["num_refs"].values()) == len(refs)
    for split in formats.SPLITS:
        written = sum(len(ref["sentences"]) for ref in refs if ref["split"] == split)
        assert written == meta["num_sentences"][split] == sum(meta["kinds"][split].values())
        assert sum(meta["scenes"][split].values()) == meta["num_images"][split]
        assert split == "train" or set(meta["blind_scores"][split]) == set(GUESSES)


def test_the_other_object_of_the_same_kind_is_the_only_one(dataset: Path) -> None:
    """Find the regions of the questions in the scenes of val, and compare the attribute that they name."""
    images = {image["file_name"]: image["id"] for image in read(dataset / "refshapes" / "instances.json")["images"]}
    asked = read(dataset / "perbench" / "STBench_VRES.json")
    assert len(asked) >= SPEC.num_eval
    for item in asked:
        scene = scene_of("val", images[item["image_name"]] - SPEC.num_train - 1)
        masks = [coco_mask.decode(item["segmentations"][tag]).astype(bool) for tag in ("<obj0>", "<obj1>")]
        found = [next(o.index for o in scene.objects if np.array_equal(o.mask, mask)) for mask in masks]
        (name,) = re.findall(r"same (\w+) as", item["question"])
        assert alike_in(scene, found[0], name) == set(found) and found[0] != found[1]

"""ReasonSeg: ignored pixels stay ignored, small shapes win, texts do not repeat, sizes are those of upright images."""

import json
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageOps
from shared_data import shared_data

from pixel_sail.data.image_sizes import upright_hw
from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.sources.reasonseg import expressions, load, paint_shapes, read_item
from pixel_sail.data.templates.reasoning import (
    PHRASE_QUESTIONS,
    SENTENCE_QUESTIONS,
    evaluation_question,
    reasoning_turn,
)
from pixel_sail.data.templates.referring import REFER_ANSWERS
from pixel_sail.metrics.released_iou import released_target
from pixel_sail.refshapes.focus import SceneRules
from pixel_sail.refshapes.grounded_format import grounded_record, write_grounded
from pixel_sail.refshapes.scene import encode_jpeg, paint_scene, sample_scene
from pixel_sail.types import DataError

TARGET = [[1, 1], [6, 1], [6, 5], [1, 5]]
INNER = [[3, 2], [4, 2], [4, 3], [3, 3]]


def rng(seed=0):
    return np.random.default_rng(seed)


def shape(label, points):
    return {"label": label, "shape_type": "polygon", "points": points}


def write(root, name="a", split="train", *, size_hw=(8, 10), exif=None, image=True, encoding="utf-8", **changes):
    content = {"text": ["the box"], "is_sentence": False, "shapes": [shape("target", TARGET)], **changes}
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    if image:
        extra = {}
        if exif is not None:
            extra["exif"] = Image.Exif()
            extra["exif"][0x0112] = exif
        Image.new("RGB", (size_hw[1], size_hw[0])).save(folder / f"{name}.jpg", **extra)
    return root


def painted(tmp_path, *shapes):
    write(tmp_path, shapes=list(shapes))
    return paint_shapes(read_item(tmp_path / "train" / "a.json").shapes, (8, 10))


def filled(rows, columns):
    mask = np.zeros((8, 10), dtype=bool)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = True
    return mask


OUTER_MASK, INNER_MASK = filled((1, 6), (1, 7)), filled((2, 4), (3, 5))


def test_polygons_are_painted_with_their_outline(tmp_path):
    target, ignored = painted(tmp_path, shape("target", TARGET))
    np.testing.assert_array_equal(target, OUTER_MASK)
    assert ignored is None


@pytest.mark.parametrize("turn", [1, -1])
def test_an_ignored_shape_inside_the_target_is_neither_whatever_the_order_in_the_file(tmp_path, turn):
    target, ignored = painted(tmp_path, *[shape("target", TARGET), shape("Ignore this", INNER)][::turn])
    np.testing.assert_array_equal(target, OUTER_MASK & ~INNER_MASK)
    np.testing.assert_array_equal(ignored, INNER_MASK)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_small_target_inside_an_ignored_shape_wins(tmp_path, turn):
    target, ignored = painted(tmp_path, *[shape("ignore", TARGET), shape("target", INNER)][::turn])
    np.testing.assert_array_equal(target, INNER_MASK)
    np.testing.assert_array_equal(ignored, OUTER_MASK & ~INNER_MASK)


def test_flag_shapes_mean_nothing(tmp_path):
    target, ignored = painted(tmp_path, shape("target", TARGET), shape("FLAG", INNER))
    np.testing.assert_array_equal(target, OUTER_MASK)
    assert ignored is None


def test_points_lines_and_shapes_beyond_the_image_are_painted_where_they_show(tmp_path):
    target, _ = painted(
        tmp_path, shape("target", [[2.9, 7]]), shape("target", [[0, 0], [3, 0]]), shape("target", [[8, 4], [99, 4]])
    )
    assert sorted(map(tuple, np.argwhere(target).tolist())) == [(0, 0), (0, 1), (0, 2), (0, 3), (4, 8), (4, 9), (7, 2)]


def test_a_sample_asks_for_different_texts_with_the_mask_and_what_is_ignored(tmp_path):
    texts = ["one?", "two?", " two? ", "three?", "four?", ""]
    write(tmp_path, text=texts, is_sentence=True, shapes=[shape("target", TARGET), shape("ignore", INNER)])
    source = load(root=tmp_path)
    seen = set()
    for seed in range(60):
        sample = source.get(0, rng(seed))
        asked = [turn.question.split("?")[0] for turn in sample.turns]
        assert len(set(asked)) == len(asked) == 3
        seen |= set(asked)
        for turn in sample.turns:
            assert turn.question.split("?", 1)[1] in {form.removeprefix("{sent}") for form in SENTENCE_QUESTIONS}
            assert turn.answer in REFER_ANSWERS
            np.testing.assert_array_equal(turn.masks[0], OUTER_MASK & ~INNER_MASK)
            np.testing.assert_array_equal(turn.ignored, INNER_MASK)
    assert seen == {"one", "two", "three", "four"}
    assert (sample.sample_id, sample.source, sample.image_hw) == ("reasonseg/train/a", "reasonseg", None)
    assert sample.image_path == source.image_path(0) == tmp_path / "train" / "a.jpg"


def test_a_sample_is_a_function_of_index_and_rng_and_survives_pickling(tmp_path):
    source = load(root=write(tmp_path, text=["x", "y", "z"]), sentences_per_image=2)
    copy = pickle.loads(pickle.dumps(source))
    assert [[t.question for t in source.get(0, rng(s)).turns] for s in range(9)] == [
        [t.question for t in copy.get(0, rng(s)).turns] for s in range(9)
    ]
    assert all(turn.ignored is None for turn in source.get(0, rng()).turns)


def test_files_without_text_or_target_are_skipped_and_counted(tmp_path, caplog):
    write(tmp_path, "a", text=["", " "])
    write(tmp_path, "b", shapes=[shape("flag", TARGET), shape("ignore", INNER)])
    write(tmp_path, "c")
    source = load(root=tmp_path)
    assert [source.image_path(i).name for i in range(len(source))] == ["c.jpg"]
    assert "skipped 2 of 3 files" in caplog.text


def test_metadata_files_of_operating_systems_are_no_items(tmp_path):
    write(tmp_path, "a")
    for name in ("._a.json", "._a.jpg", ".DS_Store", "Thumbs.db", ".hidden.json"):
        (tmp_path / "train" / name).write_bytes(b"\0\5\x16\7")
    assert len(load(root=tmp_path)) == len(expressions(root=tmp_path, split="train")) == 1


def test_image_and_file_may_have_two_unicode_forms_of_one_name(tmp_path):
    write(tmp_path, unicodedata.normalize("NFD", "caf\u00e9"))
    folder = tmp_path / "train"
    (folder / unicodedata.normalize("NFD", "caf\u00e9.jpg")).rename(folder / "caf\u00e9.jpg")
    (item,) = expressions(root=tmp_path, split="train")
    assert item.image_path == folder / "caf\u00e9.jpg"
    assert len(load(root=tmp_path)) == 1
    np.testing.assert_array_equal(load(root=tmp_path).get(0, rng()).turns[0].masks[0], OUTER_MASK)


def test_files_in_windows_letters_and_with_a_byte_order_mark_are_read(tmp_path):
    write(tmp_path, "a", text=["the caf\u00e9 \u2013 closed"], encoding="cp1252")
    write(tmp_path, "b", text=["the caf\u00e9 \u2013 closed"], encoding="utf-8-sig")
    assert [read_item(tmp_path / "train" / f"{name}.json").texts for name in "ab"] == [
        ("the caf\u00e9 \u2013 closed",)
    ] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "the box"}, r"a\.json: found text = 'the box', expected list"),
        ({"is_sentence": 1}, r"a\.json: found is_sentence = 1, expected bool"),
        ({"shapes": [{"points": TARGET}]}, "shape 0: found label = None"),
        ({"shapes": [shape("target", [[1, 2], [3]])]}, r"shape 0: found point \[3\]"),
        ({"shapes": [shape("target", [[1, float("nan")]])]}, "found point"),
        ({"shapes": [shape("target", [[1, 1e9]])]}, "within 100000 px"),
        ({"shapes": [shape("target", [])]}, "found no points"),
        ({"image": False}, r"a\.jpg: no such image file"),
    ],
)
def test_a_malformed_file_is_named_when_read(tmp_path, changes, reason):
    write(tmp_path, "a", **changes)
    source = load(root=tmp_path)
    assert len(source) == 1
    with pytest.raises(DataError, match=reason):
        source.get(0, rng())


@pytest.mark.parametrize(
    ("data", "reason"), [(b'{"text": ', "no readable JSON"), (b"\x81\xff", "no readable JSON"), (None, "no such file")]
)
def test_an_unreadable_or_missing_file_is_named(tmp_path, data, reason):
    write(tmp_path, "a")
    (tmp_path / "train" / "a.json").unlink()
    if data is not None:
        (tmp_path / "train" / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.json: found " + reason):
        load(root=tmp_path).get(0, rng())


def test_an_absent_or_empty_folder_is_rejected(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load(root=tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"found no \.jpg and no \.json"):
        load(root=tmp_path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_masks_fit_the_image_as_it_is_opened(tmp_path, orientation):
    write(tmp_path, exif=orientation, size_hw=(8, 12))
    sample = load(root=tmp_path).get(0, rng())
    image = load_image(sample.image_path, where="x", expected_hw=sample.image_hw)
    assert sample.turns[0].masks[0].shape == (image.height, image.width)
    assert expressions(root=tmp_path, split="train")[0].image_hw == (image.height, image.width)


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("ignored", [[], [shape("ignore", INNER)]])
def test_a_turned_image_has_the_target_that_the_released_script_paints_on_the_stored_one(
    tmp_path, orientation, ignored
):
    write(tmp_path, exif=orientation, size_hw=(9, 12), split="val", shapes=[shape("target", TARGET), *ignored])
    (upright,) = expressions(root=tmp_path, split="val")
    (stored,) = expressions(root=tmp_path, split="val", upright=False)
    path = tmp_path / "val" / "a.jpg"
    assert stored.image_hw == (9, 12)
    as_released = decode_rle(released_target(stored.target, stored.ignored))
    turned = ImageOps.exif_transpose(_with_orientation(as_released, tmp_path / "m.png", orientation))
    assert (decode_rle(upright.released_target) == np.asarray(turned)).all()
    assert upright.released_target["size"] == upright.target["size"] == list(upright_hw(path, "x"))
    assert upright.released_target != upright.target and stored.released_target is None
    # The points are those of the upright image; on the stored one they are elsewhere.
    assert (decode_rle(stored.target) == paint_shapes(read_item(path.with_suffix(".json")).shapes, (9, 12))[0]).all()


def _with_orientation(mask, path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(mask).save(path, exif=exif)
    return Image.open(path)


@pytest.mark.parametrize("orientation", [None, 1])
def test_an_image_without_a_turn_has_one_target(tmp_path, orientation):
    write(tmp_path, exif=orientation, split="val")
    (upright,) = expressions(root=tmp_path, split="val")
    assert upright.released_target is None
    assert expressions(root=tmp_path, split="val", upright=False) == [upright]


def test_wrong_settings_are_rejected(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="sentences_per_image 0"):
        load(root=tmp_path, sentences_per_image=0)
    with pytest.raises(ValueError, match="query: found 'tall'"):
        expressions(root=tmp_path, split="train", query="tall")
    with pytest.raises(ValueError, match="sentences: found 'last'"):
        expressions(root=tmp_path, split="train", sentences="last")


def test_expressions_ask_the_released_questions_about_the_first_text(tmp_path):
    write(tmp_path, "b", "val", text=["What is hot?", "What burns?"], is_sentence=True)
    write(tmp_path, "a", "val", text=["the box", "the crate"], shapes=[shape("ignore", INNER), shape("target", TARGET)])
    write(tmp_path, "c", "val", shapes=[shape("ignore", INNER)])
    short, long, none = expressions(root=tmp_path, split="val")
    assert short.text == "What is the box in this image? Please output segmentation mask."
    assert long.text == "What is hot? Please output segmentation mask."
    np.testing.assert_array_equal(decode_rle(short.target), OUTER_MASK & ~INNER_MASK)
    np.testing.assert_array_equal(decode_rle(short.ignored), INNER_MASK)
    assert (long.ignored, none.target) == (None, None)
    assert (short.image_path, short.image_hw) == (tmp_path / "val" / "a.jpg", (8, 10))


def test_expressions_are_chosen_by_length_and_keep_their_ids(tmp_path):
    write(tmp_path, "a", "val", text=["x", "y"])
    write(tmp_path, "b", "val", text=["x", "y", "z"], is_sentence=True)

    def ids(**settings):
        return [(e.image_id, e.ref_id, e.sent_id) for e in expressions(root=tmp_path, split="val", **settings)]

    assert ids() == [(1, 1, 1), (2, 2, 1)]
    assert (ids(query="short"), ids(query="long")) == ([(1, 1, 1)], [(2, 2, 1)])
    assert ids(query="long", sentences="all") == [(2, 2, 1), (2, 2, 2), (2, 2, 3)]


def test_every_template_is_used_and_contains_its_text_once():
    mask = np.ones((1, 1), dtype=bool)
    for templates, is_sentence in ((SENTENCE_QUESTIONS, True), (PHRASE_QUESTIONS, False)):
        asked = {reasoning_turn("a {b}", mask, rng(s), is_sentence=is_sentence).question for s in range(200)}
        assert asked == {template.replace("{sent}", "a {b}") for template in templates}
        assert evaluation_question("a {b}", is_sentence=is_sentence) in asked
    phrases = {reasoning_turn("the box.", mask, rng(s), is_sentence=False).question for s in range(50)}
    assert "Find the box in this image and return its segmentation." in phrases


def test_the_released_training_asks_what_the_evaluation_asks(tmp_path):
    write(tmp_path, "phrase", text=["the box.", "what holds things"])
    write(tmp_path, "whole", text=["Where is the box?"], is_sentence=True)
    for option in ("ours", "released"):
        source = load(root=tmp_path, templates=option)
        turns = [turn for seed in range(40) for index in range(2) for turn in source.get(index, rng(seed)).turns]
        asked, answered = ({getattr(turn, side) for turn in turns} for side in ("question", "answer"))
        released = {evaluation_question(text, is_sentence=False) for text in ("the box.", "what holds things")}
        released |= {evaluation_question("Where is the box?", is_sentence=True)}
        if option == "released":
            assert (asked, answered) == (released, {"It is [SEG]."})
        else:
            assert len(asked) == 3 * 4 and answered == set(REFER_ANSWERS)


def test_ignored_pixels_are_background_in_the_release(tmp_path):
    write(tmp_path, shapes=[shape("target", TARGET), shape("ignore", INNER)])
    for option, ignored in (("ours", INNER_MASK), ("released", None)):
        (turn,) = load(root=tmp_path, ignored_pixels=option).get(0, rng()).turns
        np.testing.assert_array_equal(turn.masks[0], OUTER_MASK & ~INNER_MASK)
        np.testing.assert_array_equal(turn.ignored, ignored)


def test_real_files_load(tmp_path):
    shared = shared_data("reasonseg_sample")
    (tmp_path / "test").mkdir()
    short, long = "10126247704_3bf0c7e05c_o.json", "11134109635_ab0674b42b_o.HEADER_ONLY.json"
    for name, size in ((short, (3456, 5184)), (long, (4000, 1500))):
        shutil.copyfile(shared / name, tmp_path / "test" / name)
        Image.new("L", size).save((tmp_path / "test" / name).with_suffix(".jpg"))
    phrase, sentence = expressions(root=tmp_path, split="test")
    assert phrase.text == (
        "What is the equipment that can assist disabled individuals in mobility in this image? "
        "Please output segmentation mask."
    )
    assert sentence.text.startswith("In the winter, when the temperature drops")
    # The shoelace area of the polygon, which runs over some points twice; its outline adds half a pixel all around.
    (shape_,) = json.loads((shared / short).read_text())["shapes"]
    x, y = np.array(shape_["points"]).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert decode_rle(phrase.target).sum() == pytest.approx(area, rel=0.01)
    assert len(expressions(root=tmp_path, split="test", query="long", sentences="all")) == 3
    source = load(root=tmp_path, split="test")
    assert [len(source.get(i, rng()).turns) for i in range(2)] == [1, 3]


def test_shapes_load_with_exact_masks(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    records, scenes = [], []
    for number in range(10):
        scene = sample_scene(rng(number), SceneRules())
        image = {"id": number, "file_name": f"{number}.jpg", "height": scene.image_hw[0], "width": scene.image_hw[1]}
        (images / image["file_name"]).write_bytes(encode_jpeg(paint_scene(rng(number), scene)))
        grounded = grounded_record(rng(number), scene, image)
        records.append({"split": "train", "image": image, "grounded": grounded})
        scenes.append(scene)
    write_grounded(tmp_path, records, images)
    source = load(root=tmp_path / "reason_seg")
    assert len(source) == 10
    num_ignored = 0
    for index, scene in enumerate(scenes):
        for turn in source.get(index, rng(index)).turns:
            named = [o.mask for o in scene.objects if f"{o.colour} and has the form of a {o.shape}" in turn.question]
            np.testing.assert_array_equal(turn.masks[0], np.any(named, axis=0))
            if turn.ignored is not None:
                assert any(np.array_equal(turn.ignored, item.mask) for item in scene.objects)
                assert not (turn.ignored & turn.masks[0]).any()
                num_ignored += 1
    assert num_ignored > 0

"""Grounded captions and their benchmark: every layout loads, masks are merged, and every skipped record is reported."""

import inspect
import json
import logging
import pickle

import numpy as np
import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf
from PIL import Image
from shared_data import shared_data

from pixel_sail.config import CONFIG_FOLDER
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.data.sources import flickr_gcg, gcg_benchmark, grandf, refcocog_gcg
from pixel_sail.data.templates.grounded_caption import CAPTION_QUESTIONS, PAPER_CAPTION_PROMPT, STANDARD_CAPTION_PROMPT
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError

HW = (6, 8)


def rng(seed=0):
    return np.random.default_rng(seed)


def box(rows, columns):
    mask = np.zeros(HW, dtype=bool)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = True
    return mask


LEFT, RIGHT, OVER = box((0, 3), (0, 3)), box((0, 3), (5, 8)), box((1, 4), (2, 6))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# --- GranD-f and OpenPSG ---


def grandf_record(caption="A dog and two cups.", **changes):
    groundings = {
        "two cups": {"token_positives": [10, 18], "rle_masks": [encode_mask(LEFT), encode_mask(OVER)]},
        "A dog": {"token_positives": [0, 5], "rle_masks": [encode_mask(RIGHT)]},
        "evening": None,
    }
    record = {"file_name": "x.jpg", "height": 6, "width": 8, "image_id": "x"}
    return {**record, "caption": caption, "groundings": groundings, **changes}


def grandf_source(tmp_path, *records, **settings):
    return grandf.load(annotations=write(tmp_path / "grandf.json", list(records)), image_dir=tmp_path, **settings)


def test_grandf_masks_are_merged_in_reading_order(tmp_path):
    source = grandf_source(tmp_path, grandf_record(), name="mine")
    sample = source.get(0, rng())
    (turn,) = sample.turns
    assert (len(source), source.name, sample.source, sample.image_hw) == (1, "mine", "mine", HW)
    assert sample.image_path == source.image_path(0) == tmp_path / "x.jpg"
    assert turn.answer == "<p> A dog </p> [SEG] and <p> two cups </p> [SEG]."
    assert turn.question in CAPTION_QUESTIONS
    np.testing.assert_array_equal(turn.masks[0], RIGHT)
    np.testing.assert_array_equal(turn.masks[1], LEFT | OVER)


def test_grandf_size_is_that_of_the_masks_where_none_is_stated(tmp_path):
    assert grandf_source(tmp_path, grandf_record(height=None, width=None)).get(0, rng()).image_hw == HW


def test_grandf_leaves_out_captions_without_phrase_and_counts_what_is_not_used(tmp_path, caplog):
    rle = [encode_mask(LEFT)]
    some = {
        "dog": {"token_positives": [0, 3], "rle_masks": rle},
        "A dog": {"token_positives": [0, 5], "rle_masks": rle},
        "a tree": {"token_positives": [70, 75], "rle_masks": rle},
        "two cups": {"token_positives": [10, 18], "rle_masks": []},
        "evening": None,
    }
    records = [
        grandf_record(groundings={"a": None}),
        grandf_record(groundings=some),
        grandf_record(groundings={}),
        grandf_record(groundings=None),
    ]
    with caplog.at_level(logging.WARNING):
        source = grandf_source(tmp_path, *records)
    assert len(source) == 1
    assert source.get(0, rng()).turns[0].answer == "<p> A dog </p> [SEG] and two cups."
    assert "skipped 3 of 4 captions" in caplog.text
    assert "of 6 phrases, 3 have no mask, 1 are not in their caption and 1 overlap a longer one" in caplog.text


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (grandf_record(caption=None), r"grandf\.json\[1\]: found caption = None, expected str"),
        (grandf_record(file_name=3), r"grandf\.json\[1\]: found file_name = 3"),
        (grandf_record(width=None), r"grandf\.json\[1\]: found width = None, expected int"),
        (grandf_record(width=0), r"grandf\.json\[1\]: found height 6 and width 0"),
        (grandf_record(width=10**25), "no more than 268435456 pixels"),
        ([1], r"grandf\.json\[1\]: found \[1\], expected an object"),
        (grandf_record(groundings=[1]), r"grandf\.json\[1\]: found groundings = \[1\], expected dict"),
        (grandf_record(groundings={"A dog": {"token_positives": [1], "rle_masks": []}}), "found token_positives"),
        (grandf_record(groundings={"A dog": {"token_positives": [0, 5]}}), "'A dog': found rle_masks = None"),
        (grandf_record(groundings={"A dog": 5}), "'A dog': found 5, expected an object"),
        (grandf_record(width=9), r"'A dog': found RLE size \[6, 8\], expected \[6, 9\]"),
        (grandf_record(caption="A dog <p> and two cups"), "found '<p>' in the caption"),
    ],
)
def test_a_malformed_grandf_record_is_named_when_read(tmp_path, record, reason):
    source = grandf_source(tmp_path, grandf_record(), record)
    assert len(source) == 2
    assert len(source.get(0, rng()).turns[0].masks) == 2
    with pytest.raises(DataError, match=reason):
        source.get(1, rng())


def test_sample_is_a_function_of_index_and_rng_and_survives_pickling(tmp_path):
    source = grandf_source(tmp_path, grandf_record())
    copy = pickle.loads(pickle.dumps(source))
    questions = [source.get(0, rng(seed)).turns[0].question for seed in range(60)]
    assert questions == [copy.get(0, rng(seed)).turns[0].question for seed in range(60)]
    assert set(questions) == set(CAPTION_QUESTIONS)


def test_spans_of_other_words_are_remarked_and_train_nothing(tmp_path, caplog):
    groundings = {
        "the brother": {"token_positives": [0, 5], "rle_masks": [encode_mask(LEFT)]},
        "puppy": {"token_positives": [0, 5], "rle_masks": [encode_mask(RIGHT)]},
        "ball": {"token_positives": [15, 19], "rle_masks": [encode_mask(OVER)]},
    }
    record = grandf_record("A boy throws a ball.", groundings=groundings)
    with collect_remarks() as heard:
        source = grandf_source(tmp_path, record)
    assert "2 are not in their caption" in caplog.text
    assert [remark.message for remark in heard] == [
        "the span [0, 5] holds 'A boy', the phrase is 'the brother'; skipped",
        "the span [0, 5] holds 'A boy', the phrase is 'puppy'; skipped",
    ]
    (turn,) = source.get(0, rng()).turns
    assert turn.answer == "A boy throws a <p> ball </p> [SEG]."
    np.testing.assert_array_equal(turn.masks, [OVER])


# --- RefCOCOg ---


BAD_REF = {"sentence": "x", "segmentation": [[1]]}


def refcocog_source(tmp_path, *records, **settings):
    Image.new("RGB", (8, 6)).save(tmp_path / "y.jpg")
    annotations = write(tmp_path / "refcocog.json", list(records))
    return refcocog_gcg.load(annotations=annotations, image_dir=[tmp_path], **settings)


def test_refcocog_polygons_are_united_and_the_size_is_that_of_the_image(tmp_path):
    refs = [
        {"sentence": "the LEFT box", "bbox": [], "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3], [2, 1, 6, 1, 6, 4, 2, 4]]},
        {"sentence": "Right box.", "bbox": [], "segmentation": [[5, 0, 8, 0, 8, 3, 5, 3]]},
        {"sentence": "right box", "bbox": [], "segmentation": [[0, 4, 2, 4, 2, 6, 0, 6]]},
        {"sentence": "by", "bbox": [], "segmentation": []},
    ]
    record = {"17": {"img_file_name": "y.jpg", "caption": ' "The left box by the right box" ', "refs": refs}}
    sample = refcocog_source(tmp_path, record).get(0, rng())
    assert sample.image_hw == HW
    assert sample.turns[0].answer == "<p> The left box </p> [SEG] by the <p> right box </p> [SEG]"
    np.testing.assert_array_equal(sample.turns[0].masks[0], LEFT | OVER)
    np.testing.assert_array_equal(sample.turns[0].masks[1], RIGHT | box((4, 6), (0, 2)))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"a": {}, "b": {}}, r"refcocog\.json\[0\]: found dict, expected an object of one key"),
        ({"a": {"img_file_name": "y.jpg", "caption": "x"}}, r"refcocog\.json\[0\] \(a\): found refs = None"),
        ({"a": {"img_file_name": "no.jpg", "caption": "x", "refs": [BAD_REF]}}, "no such"),
        ({"a": {"img_file_name": "y.jpg", "caption": "x", "refs": [BAD_REF]}}, "1 numbers"),
    ],
)  # fmt: skip
def test_a_malformed_refcocog_record_is_named_when_read(tmp_path, record, reason):
    with pytest.raises(DataError, match=reason):
        refcocog_source(tmp_path, record).get(0, rng())


@pytest.mark.parametrize(("split", "num_masks"), [("val", 4), ("train", 8)])
def test_real_expressions_and_polygons_make_a_refcocog_caption(tmp_path, split, num_masks):
    content = json.loads((shared_data("google_refexp_tfds") / f"{split}_trimmed.json").read_text())
    records, areas = [], {}
    for image in content["images"].values():
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
        mine = [a for a in content["annotations"].values() if a["image_id"] == image["image_id"]]
        sentences = [content["refexps"][str(a["refexp_ids"][0])]["raw"] for a in mine]
        refs = [{"sentence": s, "segmentation": a["segmentation"]} for s, a in zip(sentences, mine, strict=True)]
        caption = " beside ".join(sentences).upper()
        records.append({"x": {"img_file_name": image["file_name"], "caption": caption, "refs": refs}})
        areas[image["file_name"]] = [a["area"] for a in mine]
    source = refcocog_gcg.load(annotations=write(tmp_path / "real.json", records), image_dir=tmp_path)
    samples = [source.get(index, rng()) for index in range(len(source))]
    assert (len(samples), sum(len(sample.turns[0].masks) for sample in samples)) == (3, num_masks)
    for sample in samples:
        found = [int(mask.sum()) for mask in sample.turns[0].masks]
        assert found == pytest.approx(areas[sample.image_path.name], rel=0.03)


# --- Flickr30k ---


def flickr_annotation(number, *spans, mask=LEFT, **changes):
    base = {"id": number, "image_id": 7, "bbox": [0, 0, 3, 3], "area": 9.0, "sam_mask": encode_mask(mask)}
    return {**base, "tokens_positive": [list(span) for span in spans], **changes}


def flickr_source(tmp_path, *annotations, caption="Two guys and a big cat, a cat", hw=(40, 50), **settings):
    images = [
        {"id": 7, "file_name": "7.jpg", "height": hw[0], "width": hw[1], "caption": caption},
        {"id": 8, "file_name": "8.jpg", "height": hw[0], "width": hw[1], "caption": "Nobody is here"},
    ]
    content = {"images": images, "annotations": list(annotations), "categories": []}
    return flickr_gcg.load(annotations=write(tmp_path / "flickr.json", content), image_dir=tmp_path, **settings)


def large(mask):
    return np.pad(mask, ((0, 40 - HW[0]), (0, 50 - HW[1])))


def test_flickr_annotations_on_one_span_are_one_phrase_and_every_span_is_marked(tmp_path, caplog):
    source = flickr_source(
        tmp_path,
        flickr_annotation(1, (13, 22), (24, 29), mask=large(OVER)),
        flickr_annotation(2, (0, 8), mask=large(LEFT)),
        flickr_annotation(3, (0, 8), mask=large(RIGHT)),
        flickr_annotation(4, (15, 22), mask=large(OVER)),
    )
    (turn,) = source.get(0, rng()).turns
    assert turn.answer == ("<p> Two guys </p> [SEG] and <p> a big cat </p> [SEG], <p> a cat </p> [SEG]")
    for mask, expected in zip(turn.masks, [LEFT | RIGHT, OVER, OVER], strict=True):
        np.testing.assert_array_equal(mask, large(expected))
    assert "skipped 1 of 2 captions" in caplog.text
    assert "of 5 phrases, 0 have no mask, 0 are not in their caption and 1 overlap" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore": 1},
        {"area": 0},
        {"bbox": [0, 0, 0.5, 9]},
        {"bbox": [50, 0, 5, 5]},
        {"bbox": [0, -9, 5, 9]},
        {"bbox": [0, 0, 9, 0.9]},
    ],
)
def test_flickr_annotations_that_the_recipe_leaves_out_are_counted(tmp_path, caplog, changes):
    mask = large(LEFT)
    source = flickr_source(tmp_path, flickr_annotation(1, (0, 8), mask=mask), flickr_annotation(2, (9, 12), **changes))
    assert source.get(0, rng()).turns[0].answer.startswith("<p> Two guys </p> [SEG] and a")
    assert "of 2 phrases, 1 have no mask" in caplog.text


def test_flickr_short_captions_and_small_images_are_skipped(tmp_path):
    mask = encode_mask(np.ones((31, 50), dtype=bool))
    assert len(flickr_source(tmp_path / "a", flickr_annotation(1, (0, 3)), caption="two guys")) == 0
    assert len(flickr_source(tmp_path / "b", flickr_annotation(1, (0, 3), sam_mask=mask), hw=(31, 50))) == 0
    assert len(flickr_source(tmp_path / "c", flickr_annotation(1, (0, 3), mask=large(LEFT)), hw=(40, 50))) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sam_mask": None}, r"annotations\[0\] of image 7: found sam_mask = None"),
        ({"bbox": [1, 2]}, r"annotations\[0\] of image 7: found bbox \[1, 2\]"),
        ({"area": None}, "area None"),
        ({"tokens_positive": [3, 4]}, r"found tokens_positive \[3, 4\], expected \[\[start, end\], ...\]"),
        ({"sam_mask": {"size": [6, 8], "counts": "0"}}, r"found RLE size \[6, 8\], expected \[40, 50\]"),
    ],
)
def test_a_malformed_flickr_annotation_is_named_when_read(tmp_path, changes, reason):
    with pytest.raises(DataError, match=reason):
        flickr_source(tmp_path, {**flickr_annotation(1, (0, 8)), **changes}).get(0, rng())


# --- the benchmark ---


def benchmark(tmp_path, captions, masks, images=({"id": "sa_1"},), mask_images=None):
    mask_images = mask_images if mask_images is not None else [{"id": "sa_1", "height": 6, "width": 8}]
    caption_rows = [{"id": i, **row} for i, row in enumerate(captions)]
    mask_rows = [{"id": i, "category_id": 1, **row} for i, row in enumerate(masks)]
    write(tmp_path / "val_gcg_coco_caption_gt.json", {"images": list(images), "annotations": caption_rows})
    write(tmp_path / "val_gcg_coco_mask_gt.json", {"images": mask_images, "annotations": mask_rows})
    return {"root": tmp_path, "split": "val", "image_dir": tmp_path}


CAPTION = {"image_id": "sa_1", "caption": "A dog by a cup", "labels": ["A dog", "a cup"]}
MASKS = [{"image_id": "sa_1", "segmentation": encode_mask(mask)} for mask in (LEFT, RIGHT)]


def test_the_benchmark_pairs_phrases_with_masks(tmp_path):
    (item,) = gcg_benchmark.load(**benchmark(tmp_path, [CAPTION], MASKS))
    assert (item.image_id, item.image_path, item.image_hw) == ("sa_1", tmp_path / "sa_1.jpg", HW)
    assert (item.captions, item.phrases) == (("A dog by a cup",), ("A dog", "a cup"))
    np.testing.assert_array_equal([decode_rle(mask) for mask in item.masks], [LEFT, RIGHT])


def test_the_benchmark_takes_the_size_of_masks_or_image_where_none_is_stated(tmp_path):
    files = benchmark(tmp_path, [CAPTION], MASKS, mask_images=[{"id": "sa_1"}])
    assert gcg_benchmark.load(**files)[0].image_hw == HW
    Image.new("RGB", (9, 7)).save(tmp_path / "sa_1.jpg")
    files = benchmark(tmp_path, [{**CAPTION, "labels": []}], [], mask_images=[])
    assert gcg_benchmark.load(**files)[0].image_hw == (7, 9)


def test_a_benchmark_image_that_is_no_object_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"mask_gt\.json: images\[0\]: found 5, expected an object"):
        gcg_benchmark.load(**benchmark(tmp_path, [CAPTION], MASKS, mask_images=[5]))


def test_a_benchmark_with_unpaired_masks_is_rejected_unless_allowed(tmp_path, caplog):
    files = benchmark(tmp_path, [CAPTION], MASKS[:1])
    with pytest.raises(DataError, match=r"1 of 1 images whose numbers.*first sa_1 \(2 phrases, 1 masks\)"):
        gcg_benchmark.load(**files)
    (item,) = gcg_benchmark.load(**files, refuse_unpaired=False)
    assert (len(item.phrases), len(item.masks)) == (2, 1)
    assert "kept 1 of 1 images" in caplog.text


@pytest.mark.parametrize(
    ("captions", "masks", "reason"),
    [
        ([], MASKS, "image sa_1: found no caption"),
        ([CAPTION, {**CAPTION, "image_id": "sa_2"}], MASKS, "annotations of 1 images, such as sa_2"),
        ([CAPTION], [*MASKS, {**MASKS[0], "image_id": 5}], "mask_gt.json: found annotations of 1 images, such as 5"),
        ([{**CAPTION, "labels": [1, 2]}], MASKS, "image sa_1: found 1 among labels"),
        ([CAPTION], [{"image_id": None}], r"annotations\[0\]: found image_id = None"),
        ([CAPTION], [MASKS[0], {"image_id": "sa_1", "segmentation": None}], "image sa_1, mask 1: found a segmentation"),
    ],
)
def test_a_wrong_benchmark_file_is_rejected(tmp_path, captions, masks, reason):
    with pytest.raises(DataError, match=reason):
        gcg_benchmark.load(**benchmark(tmp_path, captions, masks))


CAPITALS = {
    "img_file_name": "y.jpg",
    "caption": "The Man by A Tree.",
    "refs": [{"sentence": "A Tree", "bbox": [0, 0, 3, 3], "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]]}],
}


@pytest.mark.parametrize("layout", ["grandf", "refcocog", "flickr"])
def test_the_question_of_the_evaluation_is_asked_unless_the_templates_are_the_released(tmp_path, layout):
    for option, expected in (("ours", {*CAPTION_QUESTIONS}), ("released", {*CAPTION_QUESTIONS[1:]})):
        if layout == "grandf":
            source = grandf_source(tmp_path, grandf_record(), templates=option)
        elif layout == "refcocog":
            source = refcocog_source(tmp_path, {"7": CAPITALS}, templates=option)
        else:
            source = flickr_source(tmp_path, flickr_annotation(1, (0, 8), mask=large(LEFT)), templates=option)
        assert {source.get(0, rng(seed)).turns[0].question for seed in range(80)} == expected
    assert CAPTION_QUESTIONS[0] == STANDARD_CAPTION_PROMPT


def test_refcocog_captions_are_in_lower_case_in_the_release(tmp_path):
    answers = {
        option: refcocog_source(tmp_path, {"7": CAPITALS}, letters=option).get(0, rng()).turns[0].answer
        for option in ("ours", "released")
    }
    assert answers == {"ours": "The Man by <p> A Tree </p> [SEG].", "released": "the man by <p> a tree </p> [SEG]."}


def test_the_released_prompt_keeps_its_five_blanks():
    assert "interleaved     segmentation" in PAPER_CAPTION_PROMPT
    assert " ".join(PAPER_CAPTION_PROMPT.split()) == STANDARD_CAPTION_PROMPT


@pytest.mark.parametrize("name", ["grandf", "openpsg_gcg", "refcocog_gcg", "flickr30k_gcg", "muse", "reasonseg"])
def test_configs_name_loaders_that_take_their_arguments(name):
    config = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / "source" / f"{name}.yaml"), resolve=False)
    ((key, node),) = config.items()
    bound = inspect.signature(get_method(node.pop("_target_"))).bind(**node)
    bound.apply_defaults()
    assert key == bound.arguments["name"] == name

"""Marks of regions stay inside them, and region names are kept whole in the text."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from pixel_sail.data.prompts import (
    POINT_MARGIN_PX,
    PROMPT_KINDS,
    box_prompt,
    check_fractions,
    point_prompt,
    sample_prompt,
    scribble_prompt,
)
from pixel_sail.data.region_names import name_regions, named_regions, renumber, split_label
from pixel_sail.data.regions import RegionSettings, RegionTurn, region_sample
from pixel_sail.data.templates import region as templates
from pixel_sail.data.templates import region_class
from pixel_sail.types import DataError

MASKS = hypothesis_numpy.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))).filter(np.any)
SEEDS = st.integers(0, 2**32)


@given(mask=MASKS, seed=SEEDS, kind=st.sampled_from(PROMPT_KINDS))
@settings(max_examples=150, deadline=None)
def test_a_mark_has_pixels_and_only_a_box_leaves_the_region(mask, seed, kind):
    before = mask.copy()
    mark = sample_prompt(mask, {kind: 0.3}, np.random.default_rng(seed))
    assert mark.shape == mask.shape and mark.dtype == bool and mark.any()
    assert kind == "box" or not mark[~mask].any()
    np.testing.assert_array_equal(mask, before)
    np.testing.assert_array_equal(mark, sample_prompt(mask, {kind: 7}, np.random.default_rng(seed)))


@given(mask=MASKS)
@settings(max_examples=60, deadline=None)
def test_a_box_is_the_smallest_rectangle_around_the_region(mask):
    rows, columns = np.nonzero(mask)
    expected = np.zeros_like(mask)
    expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    np.testing.assert_array_equal(box_prompt(mask), expected)


def _distance_to_outside(mask, pixel):
    """Measure from a pixel to the nearest pixel that is not in the mask or not in the image."""
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded) - 1
    return np.sqrt(((outside - np.array(pixel)) ** 2).sum(axis=1)).min()


@given(mask=MASKS, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_point_in_a_narrow_region_is_one_pixel_as_far_inside_as_any(mask, seed):
    (pixel,) = np.argwhere(point_prompt(mask, np.random.default_rng(seed)))
    best = max(_distance_to_outside(mask, other) for other in np.argwhere(mask))
    found = _distance_to_outside(mask, pixel)
    assert found > POINT_MARGIN_PX or found == pytest.approx(best)


def test_a_point_in_a_wide_region_is_anywhere_away_from_its_outline():
    mask = np.zeros((80, 120), dtype=bool)
    mask[10:70, 5:115] = True
    points = [tuple(np.argwhere(point_prompt(mask, np.random.default_rng(seed)))[0]) for seed in range(60)]
    assert all(_distance_to_outside(mask, point) > POINT_MARGIN_PX for point in points)
    assert len(set(points)) > 50


def test_a_scribble_in_a_wide_region_is_a_line_and_varies():
    mask = np.ones((60, 60), dtype=bool)
    scribbles = [scribble_prompt(mask, np.random.default_rng(seed)) for seed in range(20)]
    assert len({scribble.tobytes() for scribble in scribbles}) == 20
    assert 10 < np.median([scribble.sum() for scribble in scribbles]) < 0.5 * mask.size


def test_kinds_are_sampled_by_their_fractions():
    mask = np.zeros((40, 40), dtype=bool)
    mask[np.arange(40), np.arange(40)] = True
    fractions = {"mask": 2, "box": 1, "point": 1, "scribble": 0}
    rng = np.random.default_rng(0)
    sizes = [int(sample_prompt(mask, fractions, rng).sum()) for _ in range(1000)]
    assert set(sizes) == {40, 1600, 1}
    assert [sizes.count(size) / 1000 for size in (40, 1600, 1)] == pytest.approx([0.5, 0.25, 0.25], abs=0.05)


@pytest.mark.parametrize(
    "fractions",
    [{}, {"mask": 0.0}, {"mask": -1.0, "box": 2.0}, {"circle": 1.0}, {"mask": float("nan")}, {"mask": float("inf")}],
)
def test_wrong_fractions_are_rejected(fractions):
    with pytest.raises(ValueError, match=r"^source x: found prompt fractions .* correct the config"):
        check_fractions(fractions, "source x")


def test_a_region_without_pixels_is_rejected():
    with pytest.raises(DataError, match="region without pixels"):
        sample_prompt(np.zeros((2, 2), dtype=bool), {"box": 1.0}, np.random.default_rng(0))


def _sample(
    turns, num_regions, seed=0, absent_fraction=0.0, num_prompts=15, absent="Is {region} there?", fractions=None
):
    masks = [np.arange(40).reshape(1, 40) == index for index in range(num_regions)]
    return region_sample(
        turns,
        masks,
        np.random.default_rng(seed),
        RegionSettings(num_prompts=num_prompts, absent_fraction=absent_fraction, fractions=fractions or {"mask": 1.0}),
        sample_id="toy/4",
        source="toy",
        image_path=Path("a.jpg"),
        image_hw=(1, 40),
        absent_question=None if absent is None else lambda rng: absent,
    )


def _id_of(sample, region):
    """Return the prompt id painted on the one pixel of a region."""
    (found,) = [prompt.prompt_id for prompt in sample.prompts if prompt.mask[0, region]]
    return found


@given(
    pieces=st.lists(st.one_of(st.integers(0, 14), st.text(alphabet="ab <>1Promptregion \n", max_size=12)), max_size=8),
    num_regions=st.integers(1, 15),
    seed=SEEDS,
)
@settings(max_examples=150, deadline=None)
def test_every_placeholder_becomes_the_token_of_its_region_and_nothing_else_changes(pieces, num_regions, seed):
    pieces = [piece % num_regions if isinstance(piece, int) else piece for piece in pieces]
    template = "".join(f"{{region{piece}}}" if isinstance(piece, int) else piece for piece in pieces)
    sample = _sample([RegionTurn(question=template, answer="{region}: " + template, region=0)], num_regions, seed)
    ids = [_id_of(sample, region) for region in range(num_regions)]
    assert len(set(ids)) == num_regions and set(ids) <= set(range(15))
    expected = "".join(f"<Prompt{ids[piece]}>" if isinstance(piece, int) else piece for piece in pieces)
    assert (sample.turns[0].question, sample.turns[0].answer) == (expected, f"<Prompt{ids[0]}>: {expected}")


def test_ids_are_sampled_from_all_prompt_tokens():
    seen = {_id_of(_sample([RegionTurn(question="{region0}", answer="x")], 1, seed), 0) for seed in range(200)}
    assert seen == set(range(15))


@given(num_regions=st.integers(1, 15), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_an_absent_region_has_one_question_with_an_unpainted_token(num_regions, seed):
    turns = [RegionTurn(question="What is {region}?", answer="{region}: x", region=i) for i in range(num_regions)]
    sample = _sample(turns, num_regions, seed, absent_fraction=1.0)
    absent = [turn for turn in sample.turns if turn.question.startswith("Is ")]
    assert len(sample.turns) == num_regions + len(absent)
    if num_regions == 15:
        assert not absent
        return
    (turn,) = absent
    number = int(re.search(r"\d+", turn.question)[0])
    assert number not in {prompt.prompt_id for prompt in sample.prompts}
    assert turn.answer == f"<Prompt{number}> is not in the image."
    assert sample.turns[0] == turn


def test_absent_regions_are_as_frequent_as_asked_and_come_anywhere():
    turns = [RegionTurn(question="What?", answer="x")] * 4
    places = []
    for seed in range(600):
        sample = _sample(turns, 2, seed, absent_fraction=0.05)
        places += [i for i, turn in enumerate(sample.turns) if turn.question.startswith("Is ")]
    assert len(places) / 600 == pytest.approx(1 - 0.95**4, abs=0.06)
    assert set(places) == {0, 1, 2, 3}
    assert len(_sample(turns, 2, absent_fraction=1.0, absent=None).turns) == 4


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (RegionTurn(question="{region2}?", answer="x"), r"names \{region2\}, found regions \['0', '1'\]"),
        (RegionTurn(question="{region}?", answer="x"), r"names \{region\}"),
        (RegionTurn(question="{region}?", answer="x", region=2), r"found a turn about region 2, expected 0 \.\. 1"),
        (RegionTurn(question="{region}?", answer="x", region=-1), r"found a turn about region -1,"),
    ],
)
def test_a_turn_about_a_region_that_is_not_there_is_rejected(turn, message):
    with pytest.raises(DataError, match=r"^toy/4: .*" + message):
        _sample([turn], 2)


def test_too_many_regions_and_empty_ones_are_rejected():
    with pytest.raises(DataError, match=r"^toy/4: found 16 regions, expected at most 15"):
        _sample([], 16)
    with pytest.raises(DataError, match=r"^toy/4: found regions \[40\] without pixels"):
        _sample([], 41, num_prompts=50)


def test_wrong_settings_are_rejected():
    with pytest.raises(ValueError, match="absent_fraction"):
        RegionSettings(absent_fraction=1.5)
    with pytest.raises(ValueError, match="prompt_fractions"):
        RegionSettings(fractions={"mask": 0.0})
    for count in (0, 16):
        with pytest.raises(ValueError, match=rf"regions_per_sample {count}, expected 1 \.\. num_prompts = 15"):
            RegionSettings().check_count("x", count)


SPELLINGS = ("<region{}>", "<Region{}>", "<regon{}>", "<Regon{}>", "<regin{}>", "region{}", "Region{}", "regon{}",
             "<region{}", "region{}>", "< region {} >")  # fmt: skip
FILLING = st.text(alphabet="ab ,.?:'{}-\n", max_size=6)


@given(names=st.lists(st.tuples(st.integers(1, 15), st.sampled_from(SPELLINGS), FILLING), max_size=6), first=FILLING)
@settings(max_examples=200, deadline=None)
def test_every_spelling_of_a_region_is_replaced_as_a_whole(names, first):
    text, expected = first + " ", first + " "
    for number, spelling, filling in names:
        text += spelling.format(number) + " " + filling + " "
        expected += f"{{region{number - 1}}} {filling} "
    assert name_regions(text, 15, "here") == expected
    assert named_regions(expected) == {number - 1 for number, _, _ in names}


def test_the_release_would_have_broken_region_ten():
    text = "Is <region1> above <region10>, region11 or <Region12>?"
    assert name_regions(text, 12, "here") == "Is {region0} above {region9}, {region10} or {region11}?"


@pytest.mark.parametrize("text", ["subregion1", "region1a", "regions", "region", "the region 1", "<regional>"])
def test_other_words_are_left_alone(text):
    assert name_regions(text, 3, "here") == text


def test_a_name_without_number_means_the_only_region():
    assert name_regions("the region shown as <region>", 1, "here") == "the region shown as {region0}"
    with pytest.raises(DataError, match=r"^here: found '<region>' in a text, expected one of 2 regions"):
        name_regions("<region>", 2, "here")


@pytest.mark.parametrize("text", ["<region0>", "<region3>", "region3", "<region123456789>"])
def test_a_number_that_no_region_has_is_rejected(text):
    with pytest.raises(DataError, match=rf"^here: found '{text}' in a text, expected one of 2 regions"):
        name_regions(f"see {text}", 2, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<region2>: a sign: stop", (1, "a sign: stop")),
        (" Region1 :x", (0, "x")),
        ("a sign: stop", (None, "a sign: stop")),
        ("<region2>:", (1, "")),
        ("left of <region2>: x", (None, "left of <region2>: x")),
    ],
)
def test_labels_are_split_off_and_other_colons_stay(text, expected):
    assert split_label(text) == expected


def test_renumbering_changes_all_numbers_at_once():
    assert renumber("{region0} {region1} {region10}", {0: 1, 1: 0, 10: 2}) == "{region1} {region0} {region2}"


@pytest.mark.parametrize(
    ("questions", "ask"),
    [
        (templates.DESCRIBE_QUESTIONS, templates.describe_question),
        (templates.DETAILED_QUESTIONS, templates.detailed_question),
        (templates.SHORT_QUESTIONS, templates.short_question),
        (templates.NAME_QUESTIONS, templates.name_question),
    ],
)
def test_every_template_is_synthetic_and_names_the_region_once(questions, ask):
    rng = np.random.default_rng(0)
    assert {ask(rng) for _ in range(400)} == set(questions)
    assert all(question.count("{region}") == 1 and question.count("{") == 1 for question in questions)
    assert len(set(questions)) == len(questions) >= 5


def test_the_prompts_of_region_captions_are_questions_of_training():
    asked = templates.REGION_CAPTION_PROMPT.replace("<Prompt0>", "{region}")
    assert "{region}" in asked
    assert asked in templates.DETAILED_QUESTIONS and asked in region_class.DETAIL_QUESTIONS
    # Questions for SAM's captions have the same suffix as PerBench's.
    assert templates.PERBENCH_CAPTION_PROMPT == templates.REGION_CAPTION_PROMPT + templates.DETAILED_SUFFIX


def test_evaluation_prompts_are_those_of_the_protocol():
    assert templates.PERBENCH_CAPTION_PROMPT == (
        "Can you provide me with a detailed description of the region in the picture marked by <Prompt0>? Please "
        "provide as detailed as possible."
    )
    asked = templates.PERBENCH_CHOICE_PROMPT.format(question="Which?\nA. one\n")
    assert asked == "Please answer the question according to the <Prompt0>. Which?\nA. one\nSelect a correct choice."

"""Question and answer templates of referring segmentation are varied, complete and consistent with the masks."""

import numpy as np
import pytest

from pixel_sail.data.templates.referring import NO_TARGET_ANSWER, REFER_ANSWERS, REFER_QUESTIONS, referring_turn


def test_every_template_contains_its_placeholder_once():
    assert all(question.count("{expression}") == 1 for question in REFER_QUESTIONS)
    assert all(answer.count("[SEG]") == 1 for answer in (*REFER_ANSWERS, NO_TARGET_ANSWER))
    assert len(set(REFER_QUESTIONS)) >= 12


def test_varied_style_uses_every_template_and_braces_in_text_are_kept():
    rng = np.random.default_rng(0)
    mask = np.ones((2, 2), dtype=bool)
    turns = [referring_turn("a {odd} sign", mask, rng, style="varied") for _ in range(400)]
    assert {turn.question for turn in turns} == {q.replace("{expression}", "a {odd} sign") for q in REFER_QUESTIONS}
    assert {turn.answer for turn in turns} == set(REFER_ANSWERS)


def test_no_target_turn_with_mask_pixels_is_rejected():
    with pytest.raises(ValueError, match="4 mask pixels"):
        referring_turn("x", np.ones((2, 2), dtype=bool), np.random.default_rng(0), style="fixed", has_target=False)

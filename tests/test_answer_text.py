"""Extraction of the scored text from a generated answer."""

import pytest

from pixel_sail.metrics.answer_text import (
    GroundedText,
    grounded_text,
    grounded_text_as_released,
    object_caption_as_released,
    plain_description,
    region_caption_as_released,
)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("<Prompt3>: a red hat.<|endoftext|>", "a red hat."),
        ("a hat of <Prompt3>:  red\nand  blue", "a hat of : red and blue"),
        ("<p> A man </p> [SEG] runs", "A man runs"),
        ("a <b> c", "a <b> c"),
        ("<|im_end|>", ""),
    ],
)
def test_plain_description_keeps_words(answer, plain):
    assert plain_description(answer) == plain


@pytest.mark.parametrize(
    ("answer", "caption", "phrases"),
    [
        ("<p> A man </p> [SEG] with <p> a hat </p> [SEG].<|im_end|>", "A man with a hat.", ("A man", "a hat")),
        ("<p> A man </p> runs to <p> a bus </p> [SEG].", "A man runs to a bus.", ("a bus",)),
        ("A man [SEG] and <p> a bus </p> [SEG]", "A man and a bus", ("", "a bus")),
        ("<p> A man </p> [SEG] [SEG]", "A man", ("A man", "")),
        ("Nothing is here", "Nothing is here", ()),
    ],
)
def test_each_seg_has_the_phrase_before_it(answer, caption, phrases):
    assert grounded_text(answer) == GroundedText(caption=caption, phrases=phrases)


def test_released_grounded_text_lists_all_phrases():
    answer = "<s>USER x ASSISTANT: <p> A man </p> runs to\n <p> a bus </p> [SEG].<|endoftext|>"
    expected = GroundedText(caption="A man runs to a bus .", phrases=("A man", "a bus"))
    assert grounded_text_as_released(answer) == expected


@pytest.mark.parametrize(
    ("answer", "caption", "phrases"),
    [
        ("A dog\nand <p> a\ncat </p> [SEG].", "A dogand acat .", ("acat",)),
        ("'A dog runs.'", "A dog runs.", ()),
        ("'<p> A dog's tail </p> [SEG]'<|endoftext|>", "A dog's tail", ("A dog's tail",)),
        ("<p> a   big  cat </p> [SEG]", "a big cat", ("a  big cat",)),
    ],
)
def test_released_grounded_text_joins_lines_and_loses_outer_apostrophes(answer, caption, phrases):
    assert grounded_text_as_released(answer) == GroundedText(caption=caption, phrases=phrases)


def test_released_object_caption_keeps_its_colon():
    assert object_caption_as_released(" <Prompt0>: A hat.<|endoftext|>") == ": A hat."


def test_released_region_caption_loses_stops_and_colons():
    assert region_caption_as_released("<Prompt0>: 'a <i>U.S.</i> hat'.<|endoftext|> [SEG]\n") == "a US hat"

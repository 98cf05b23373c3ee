"""Phrases of a caption: each keeps its position and characters, or is counted as not found or overlapping."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared_data

from pixel_sail.data.phrases import Phrase, mark_caption, place_phrases
from pixel_sail.types import DataError

MARKED = re.compile(r"<p> (.*?) </p> \[SEG\]")


def marked(caption, *phrases):
    placement = place_phrases(caption, phrases)
    return mark_caption(caption, placement, "here"), placement


def text_phrases(*texts):
    return [Phrase(text=text) for text in texts]


def without_marks(answer):
    return MARKED.sub(r"\1", answer)


def test_phrases_are_found_whatever_their_case_and_the_caption_keeps_its_own():
    answer, _ = marked("A Dog near the TV.", *text_phrases("a dog", "The tv"))
    assert answer == "<p> A Dog </p> [SEG] near <p> the TV </p> [SEG]."


def test_a_phrase_is_not_found_inside_a_word():
    answer, placement = marked("A woman and a man", *text_phrases("man"))
    assert answer == "A woman and a <p> man </p> [SEG]"
    assert marked("A woman", *text_phrases("man"))[1].not_found == (0,)
    assert placement.not_found == ()


def test_blanks_quotes_and_a_full_stop_around_a_phrase_do_not_hide_it():
    answer, _ = marked("a  red\nhat on a box", *text_phrases(' "A red hat." '))
    assert answer == "<p> a  red\nhat </p> [SEG] on a box"


def test_a_nested_phrase_is_dropped_and_the_longer_keeps_its_place():
    answer, placement = marked("A man in a red hat.", *text_phrases("a red hat", "a man in a red hat"))
    assert answer == "<p> A man in a red hat </p> [SEG]."
    assert [marked.phrases for marked in placement.spans] == [(1,)]
    assert placement.overlapped == (0,)


def test_phrases_that_overlap_in_part_are_not_cut():
    answer, placement = marked("big red old car", Phrase(span=(0, 7)), Phrase(span=(4, 15)))
    assert answer == "big <p> red old car </p> [SEG]"
    assert placement.overlapped == (0,)


def test_of_two_equally_long_overlapping_phrases_the_first_stays():
    assert marked("aa bb cc", Phrase(span=(3, 8)), Phrase(span=(0, 5)))[1].overlapped == (0,)


def test_a_shorter_phrase_moves_to_another_occurrence_that_is_free():
    answer, placement = marked("a man in red beside a man", *text_phrases("a man", "a man in red"))
    assert answer == "<p> a man in red </p> [SEG] beside <p> a man </p> [SEG]"
    assert placement.overlapped == ()


def test_phrases_on_the_same_characters_share_a_position():
    _, placement = marked("two guys", Phrase(span=(0, 8)), *text_phrases("Two guys"))
    assert [marked.phrases for marked in placement.spans] == [(0, 1)]


def test_a_stated_span_chooses_between_occurrences():
    assert marked("a cup, a cup", Phrase(text="a cup", span=(7, 12)))[0] == "a cup, <p> a cup </p> [SEG]"
    assert marked("a cup, a cup", Phrase(text="a cup", span=(6, 11)))[0] == "a cup, <p> a cup </p> [SEG]"


def test_a_span_counted_without_the_quote_is_put_right():
    assert marked('"A cup on a mat."', Phrase(text="A cup", span=(0, 5)))[0] == "<p> A cup </p> [SEG] on a mat."


def test_a_span_with_other_words_is_believed_only_if_it_ends_between_words():
    assert marked("two young men", Phrase(text="two men", span=(0, 13)))[0] == "<p> two young men </p> [SEG]"
    assert marked("two young men", Phrase(text="two men", span=(0, 6)))[1].not_found == (0,)


@pytest.mark.parametrize(
    ("caption", "phrase", "span"),
    [
        ("A boy throws a ball.", "the brother", (0, 5)),
        ("A boy throws a ball.", "puppy", (0, 5)),
        ("A red cup.", "a red ball", (0, 9)),
        ("Two men.", "two dogs", (0, 7)),
    ],
)
def test_a_span_of_other_words_is_not_believed(caption, phrase, span):
    placement = place_phrases(caption, [Phrase(text=phrase, span=span)])
    assert (placement.spans, placement.not_found, placement.misplaced) == ((), (0,), (0,))


@pytest.mark.parametrize(
    ("caption", "phrase", "span"),
    [
        ("A man sits.", "the man", (0, 5)),
        ("A dog, wet, runs.", "A dog wet", (0, 10)),
        ("The old man with a hat.", "an old man", (0, 22)),
        ("a boy", "young boy", (0, 5)),
    ],
)
def test_a_span_with_another_text_of_the_phrase_is_accepted(caption, phrase, span):
    placement = place_phrases(caption, [Phrase(text=phrase, span=span)])
    assert [marked.span for marked in placement.spans] == [span]
    assert placement.misplaced == ()


def test_two_phrasings_are_not_merged_on_a_span_without_either():
    phrases = [Phrase(text=text, span=(0, 5)) for text in ("young boy", "old boy")]
    placement = place_phrases("A boy throws a ball.", phrases)
    assert [marked.phrases for marked in placement.spans] == [(0,)]
    assert placement.overlapped == (1,)
    placement = place_phrases("A boy throws a ball.", [*phrases, Phrase(text="a boy", span=(0, 5))])
    assert [marked.phrases for marked in placement.spans] == [(2,)]
    assert placement.overlapped == (0, 1)


def test_a_span_may_count_bytes_or_units_of_utf_16():
    caption = "Caf\u00e9 \U0001f600: a cup, a cup."
    starts = [caption.index("a cup"), caption.rindex("a cup")]
    for start in starts:
        for encoding, size in (("utf-8", 1), ("utf-16-le", 2)):
            at = len(caption[:start].encode(encoding)) // size
            (marked,) = place_phrases(caption, [Phrase(text="a cup", span=(at, at + 5))]).spans
            assert marked.span == (start, start + 5)


def test_phrases_of_the_same_words_keep_their_own_occurrences():
    phrases = [Phrase(text="a cup", span=(7, 12)), Phrase(text="a cup", span=(0, 5))]
    assert [marked.phrases for marked in place_phrases("a cup, a cup", phrases).spans] == [(1,), (0,)]


@pytest.mark.parametrize("span", [(-1, 3), (5, 5), (3, 99), (4, 2), (3, 4)])
def test_a_span_that_is_not_on_text_is_not_found(span):
    assert marked("abc def", Phrase(span=span))[1].not_found == (0,)


def test_an_empty_phrase_is_not_found():
    assert marked("abc", *text_phrases("", " ", ".", '"'))[1].not_found == (0, 1, 2, 3)


def test_a_letter_that_changes_length_in_lower_case_does_not_shift_phrases():
    assert marked("\u0130\u0130 and a cup", *text_phrases("a cup"))[0] == "\u0130\u0130 and <p> a cup </p> [SEG]"


def test_a_pair_of_quotes_around_the_caption_is_removed_and_other_quotes_stay():
    assert marked('"a cup"', *text_phrases("a cup"))[0] == "<p> a cup </p> [SEG]"
    assert marked('a sign that says "GO"', *text_phrases("a sign"))[0] == '<p> a sign </p> [SEG] that says "GO"'
    assert marked('"GO" and "STOP"', *text_phrases("and"))[0] == '"GO" <p> and </p> [SEG] "STOP"'


def test_a_caption_that_contains_a_mark_is_rejected():
    with pytest.raises(DataError, match=r"here: found '\[SEG\]' in the caption"):
        marked("a [SEG]", *text_phrases("a"))


words = st.lists(st.sampled_from(["a", "A", "man", "woman", "red", "hat,", "in", '"hat"']), min_size=1, max_size=12)
spans = st.none() | st.tuples(st.integers(-3, 60), st.integers(-3, 60))


@given(words, st.lists(st.tuples(st.sampled_from(["", "a man", "red hat", "hat", "A", "in a"]), spans), max_size=6))
def test_any_phrases_leave_the_text_as_it_was_and_every_one_is_accounted_for(caption_words, phrases):
    caption = " ".join(caption_words)
    placement = place_phrases(caption, [Phrase(text=text, span=span) for text, span in phrases])
    used = [i for marked in placement.spans for i in marked.phrases]
    assert sorted([*used, *placement.not_found, *placement.overlapped]) == list(range(len(phrases)))
    assert all(first.span[1] <= second.span[0] for first, second in pairwise(placement.spans))
    answer = mark_caption(caption, placement, "x")
    assert without_marks(answer) == mark_caption(caption, place_phrases(caption, []), "x")
    assert answer.count("<p>") == answer.count("[SEG]") == len(placement.spans)


def test_phrases_of_real_expressions_are_found_in_a_text_made_of_them():
    file = shared_data("google_refexp_toolbox") / "refcocog_google_val_one_sentence_per_ref.json"
    by_image = {}
    for row in json.loads(file.read_text()):
        by_image.setdefault(row["image_id"], []).append(row["sent"])
    assert (len(by_image), sum(map(len, by_image.values()))) == (4650, 5000)
    num_spans = num_overlapped = 0
    for sentences in by_image.values():
        caption = ", next to ".join(sentence.capitalize() for sentence in sentences) + "."
        placement = place_phrases(caption, text_phrases(*sentences))
        assert placement.not_found == ()
        assert without_marks(mark_caption(caption, placement, "x")) == mark_caption(
            caption, place_phrases(caption, []), "x"
        )
        num_spans += len(placement.spans)
        num_overlapped += len(placement.overlapped)
    assert num_overlapped == 0
    assert num_spans > 4950


def test_labels_of_real_grand_objects_are_marked_in_their_captions():
    found = set()
    for file in sorted(shared_data("grand_examples").glob("level_3_*.json")):
        (content,) = json.loads(file.read_text()).values()
        labels = sorted({label for item in content["objects"] for label in item["labels"]})
        for caption in content["captions"]:
            answer, placement = marked(caption, *text_phrases(*labels))
            assert without_marks(answer) == caption
            assert len(placement.not_found) + len(placement.overlapped) < len(labels)
            found |= set(MARKED.findall(answer))
    assert {"hot air balloon", "chairs"} & found

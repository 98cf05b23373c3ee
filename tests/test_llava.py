"""Conversations with and without image: markers are removed, roles alternate, no turn is truncated."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared_data import shared_data

from pixel_sail.data.conversations import conversation_turns, may_have_turns
from pixel_sail.data.images import load_image
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing import PackedStream, PackingSettings
from pixel_sail.data.sources.llava import load
from pixel_sail.data.turn_parts import divided
from pixel_sail.types import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


def _messages(*pairs):
    names = {"h": "human", "g": "gpt"}
    return [{"from": names.get(who, who), "value": text} for who, text in pairs]


def _source(tmp_path, records, **settings):
    (tmp_path / "llava.json").write_text(json.dumps(records))
    return load(annotations=tmp_path / "llava.json", image_dir=tmp_path / "images", **settings)


def _turns(source, index=0, seed=0):
    return [(turn.question, turn.answer) for turn in source.get(index, np.random.default_rng(seed)).turns]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("h", "<image>\nWhat?"), ("g", " A dog. ")], [("What?", "A dog.")]),
        ([("h", "What?\n<image>"), ("g", "A dog.")], [("What?", "A dog.")]),
        ([("h", "In <image> this"), ("g", "a <image> b")], [("In this", "a <image> b")]),
        ([("g", "Hello!"), ("g", "Ask."), ("h", "a"), ("g", "b")], [("a", "b")]),
        ([("h", "a"), ("h", " b "), ("g", "c")], [("a\nb", "c")]),
        ([("h", "<image>"), ("h", "b"), ("g", "c")], [("b", "c")]),
        ([("h", "a"), ("g", "b"), ("g", "c"), ("h", "d"), ("g", "e")], [("a", "b\nc"), ("d", "e")]),
        ([("h", "a"), ("g", "b"), ("h", "c")], [("a", "b")]),
        ([("user", "a"), ("assistant", "b")], [("a", "b")]),
        ([("g", "a"), ("h", "b")], []),
        ([], []),
    ],
)
def test_messages_become_questions_with_answers(messages, expected):
    assert conversation_turns(_messages(*messages), "here") == expected
    assert may_have_turns(_messages(*messages)) == bool(expected)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "found conversations = None"),
        ([5], "message 0: found 5, expected"),
        ([{"from": ["human"], "value": "a"}], r"message 0: found \{'from'"),
        (_messages(("h", "a"), ("system", "b")), "message 1: found .*system"),
        (_messages(("h", "a"), ("g", None)), "message 1: found .*None"),
        (_messages(("h", "a"), ("g", " ")), "found question 'a' with answer ''"),
        (_messages(("h", "<image>"), ("g", "b")), "found question '' with answer 'b'"),
        (_messages(("h", "a \ud83d b"), ("g", "b")), "message 0: found half a character"),
    ],
)
def test_invalid_conversations_are_rejected(messages, message):
    with pytest.raises(DataError, match=rf"^here(, |: ){message}"):
        conversation_turns(messages, "here")
    assert may_have_turns(messages)


def _without_blanks(texts):
    return "".join("".join(texts).split())


PIECES = st.lists(st.sampled_from(["x", "y", "<", " ", "\n", "<image>"]), min_size=1, max_size=6).map("".join)


@given(messages=st.lists(st.tuples(st.sampled_from("hg"), PIECES), max_size=8))
@settings(deadline=None)
def test_no_word_is_lost_but_before_the_first_question_and_after_the_last_answer(messages):
    try:
        turns = conversation_turns(_messages(*messages), "here")
    except DataError:
        return
    roles = [who for who, _ in messages]
    first = roles.index("h") if "h" in roles else len(roles)
    end = len(roles) - roles[::-1].index("g") if "g" in roles else 0
    kept = [text.replace("<image>", " ") if who == "h" else text for who, text in messages[first : max(end, first)]]
    assert _without_blanks(text for pair in turns for text in pair) == _without_blanks(kept)
    assert may_have_turns(_messages(*messages)) == bool(turns)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), room=st.integers(-5, 60))
@settings(deadline=None)
def test_parts_have_complete_turns_in_order_and_as_many_as_fit(lengths, room):
    parts = divided(lengths, room)
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    sizes = [[lengths[index] for index in part] for part in parts]
    assert all(sum(part) <= room or len(part) == 1 for part in sizes)
    assert all(sum(part) + following[0] > room for part, following in pairwise(sizes))


TALK = [(who, f"{who}{i} " + "word " * 20) for i in range(10) for who in "hg"]


def _packed_texts(tmp_path, processor, budget, *, image=None, epochs=1, **options):
    """Return the text of the samples of a long conversation, as packed, one per epoch."""
    record = {"id": "a", "conversations": _messages(*TALK)} | ({} if image is None else {"image": image})
    mixture = Mixture({"chat": _source(tmp_path, [record], **options)}, {}, seed=0)
    stream = PackedStream(mixture, processor, PackingSettings(seq_len=budget), index=0, num_streams=1)
    examples = [stream.example(number) for number in range(epochs)]
    assert all(len(example) <= budget for example in examples)
    return [processor.tokenizer.decode(example.input_ids_T.tolist()) for example in examples]


def _numbers(text):
    """Return the turns of a text and assert that they are complete."""
    asked, answered = ([int(n) for n in re.findall(rf"{who}(\d) (?:word ?){{20}}", text)] for who in "hg")
    assert asked == answered
    return asked


def test_of_a_long_conversation_one_part_is_synthetic_and_every_turn_is_reached(tmp_path, processor):
    (whole,) = _packed_texts(tmp_path, processor, 10_000)
    assert _numbers(whole) == list(range(10))
    room = len(processor.text_ids(whole)) * 35 // 100
    seen = [_numbers(text) for text in _packed_texts(tmp_path, processor, room, epochs=40)]
    assert all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in seen)
    assert {tuple(numbers) for numbers in seen} == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)}
    assert seen == [_numbers(text) for text in _packed_texts(tmp_path, processor, room, epochs=40)]


def test_of_a_long_conversation_the_release_keeps_the_beginning(tmp_path, processor):
    (whole,) = _packed_texts(tmp_path, processor, 10_000)
    room = len(processor.text_ids(whole)) * 35 // 100
    texts = _packed_texts(tmp_path, processor, room, epochs=10, long_conversations="released")
    assert [_numbers(text) for text in texts] == [[0, 1, 2]] * 10
    assert _packed_texts(tmp_path, processor, 10_000, long_conversations="released") == [whole]


def test_the_image_of_a_long_conversation_counts_towards_seq_len(tmp_path, processor):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.png")
    num_image = len(processor.image_span(processor.grid_of((48, 64))).token_ids_S)
    (whole,) = _packed_texts(tmp_path, processor, 10_000)
    room = len(processor.text_ids(whole[: whole.index("h3")]))  # of three turns and the beginning of the fourth
    for image, budget in ((None, room), ("a.png", room + num_image)):
        counts = []
        for extra in (0, -8):
            options = {"image": image, "long_conversations": "released"}
            (text,) = _packed_texts(tmp_path, processor, budget + extra, **options)
            counts.append(len(_numbers(text)))
        assert counts == [3, 2]


def test_a_turn_longer_than_a_sequence_is_rejected_by_its_name(tmp_path, processor):
    for option in ("ours", "released"):
        with pytest.raises(DataError, match=r"llava_mix665k/record=0.*at most data\.packing\.seq_len = 20"):
            _packed_texts(tmp_path, processor, 20, long_conversations=option)


def test_records_with_and_without_image(tmp_path):
    talk = _messages(("h", "<image>\na"), ("g", "b"))
    source = _source(tmp_path, [{"image": "coco/1.jpg", "conversations": talk}, {"id": 7, "conversations": talk}])
    first, second = (source.get(i, np.random.default_rng(0)) for i in range(2))
    assert (first.sample_id, first.source) == ("llava_mix665k/record=0", "llava_mix665k")
    assert first.image_path == source.image_path(0) == tmp_path / "images/coco/1.jpg"
    assert second.image_path is source.image_path(1) is None
    assert first.image_hw is second.image_hw is None
    assert first.turns == second.turns and first.prompts == () and first.turns[0].masks == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (5, "found int, expected an object"),
        ({"image": ["a", "b"], "conversations": _messages(("h", "a"), ("g", "b"))}, r"found image = \['a', 'b'\]"),
        ({"image": "", "conversations": _messages(("h", "a"), ("g", "b"))}, "found image = ''"),
        ({"conversations": _messages(("h", "a"))}, "found no question with an answer"),
        ({"image": "a.jpg"}, "found conversations = None"),
    ],
)
def test_malformed_records_are_rejected_by_file_and_record(tmp_path, record, message):
    source = _source(tmp_path, [{"conversations": _messages(("h", "a"), ("g", "b"))}, record])
    with pytest.raises(DataError, match=rf"llava\.json\[1\]: {message}"):
        source.get(1, np.random.default_rng(0))
    assert _turns(source) == [("a", "b")]


def test_synthetic_llava_file_loads_whole(data_root):
    root = data_root / "refshapes"
    file = root / "llava" / "llava_v1_5_mix665k.json"
    source = load(annotations=file, image_dir=root / "images")
    records = json.loads(file.read_text())
    assert len(source) == len(records) > 10
    for index, record in enumerate(records):
        sample = source.get(index, np.random.default_rng(index))
        texts = [text for turn in sample.turns for text in (turn.question, turn.answer)]
        assert texts == [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
        assert (sample.image_path is None) == ("image" not in record)
        if sample.image_path is not None:
            load_image(sample.image_path, where=sample.sample_id)
    assert {"image" in record for record in records} == {True, False}


def test_shared_chat_lines_load_with_their_images(tmp_path):
    """Real lines in the messages format, rewritten field by field as LLaVA's records."""
    folder = shared_data("xtuner_llava_style")
    lines = (folder / "mllm_sft_single_image_example_data.jsonl").read_text().splitlines()
    records, expected = [], []
    for line in lines:
        record, messages = {"id": len(records)}, []
        for message in json.loads(line)["messages"]:
            content = message["content"]
            for part in content if isinstance(content, list) else []:
                if part["type"] == "image_url":
                    record["image"] = Path(part["image_url"]["url"]).name
                    record["wh"] = part["image_url"]["image_wh"]
                else:
                    content = part["text"].replace("<IMG_CONTEXT>", "<image>")
            messages.append({"from": message["role"], "value": content})
        records.append(record | {"conversations": messages})
        expected.append([message["value"].replace("<image>\n", "") for message in messages])
    (tmp_path / "chat.json").write_text(json.dumps(records))
    source = load(annotations=tmp_path / "chat.json", image_dir=folder)
    assert len(source) == len(lines) == 22
    for index, texts in enumerate(expected):
        sample = source.get(index, np.random.default_rng(0))
        assert [text for turn in sample.turns for text in (turn.question, turn.answer)] == texts
        image = load_image(sample.image_path, where=sample.sample_id)
        assert list(image.size) == records[index]["wh"]

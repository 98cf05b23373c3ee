"""Caption scores against published numbers and by hand; what happens when Java is absent, dies or talks nonsense.

Tests that need Java and the extra [captions] are skipped where these are absent; one METEOR process serves all of them.
"""

import json
import logging
import sys

import pytest
from shared_data import shared_data

from pixel_sail.metrics import java_tools
from pixel_sail.metrics.captions import CaptionScores, check_caption_tools, check_references, score_captions
from pixel_sail.metrics.java_tools import CaptionTools, LineProcess, find_java, one_line, package_folder
from pixel_sail.metrics.nltk_meteor import nltk_meteor, wordnet_folder
from pixel_sail.types import DataError

SCORE_NAMES = {
    "METEOR": "meteor", "CIDEr": "cider", "ROUGE_L": "rouge_l",
    "Bleu_1": "bleu1", "Bleu_2": "bleu2", "Bleu_3": "bleu3", "Bleu_4": "bleu4",
}  # fmt: skip


@pytest.fixture(scope="module")
def tools():
    try:
        running = CaptionTools()
    except DataError as error:
        pytest.skip(str(error))
    # The language of the machine must not matter: programs started here have the one without any special letter.
    with pytest.MonkeyPatch.context() as patch, running:
        patch.setenv("LC_ALL", "POSIX")
        yield running


@pytest.fixture
def wordnet():
    try:
        wordnet_folder()
    except DataError as error:
        pytest.skip(str(error))


def _read(*names: str):
    return json.loads(shared_data("caption_metrics").joinpath(*names).read_text())


def _check(scores: CaptionScores, key: str) -> None:
    computed = _read("computed_with_pycocoevalcap.json")[key]
    published = json.loads((shared_data("stats") / "true_statistics.json").read_text())["known_metric_outputs"]
    printed = {"nlg_eval_ptb": "nlg-eval examples", "clipscore_good": "clipscore good_captions"}
    printed |= {"clipscore_bad": "clipscore bad_captions"}
    for name, own_name in SCORE_NAMES.items():
        assert scores.corpus[own_name] == pytest.approx(computed[name], abs=1e-9), name
        if key in printed:
            assert scores.corpus[own_name] == pytest.approx(published[printed[key]][name], abs=6e-5), name


# Against published numbers.


def test_nlg_eval_example(tools):
    folder = shared_data("caption_metrics") / "nlg_eval"
    hypotheses, *references = ((folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2"))
    ids = [str(number) for number in range(len(hypotheses))]
    assert len(ids) == 2
    scores = score_captions(
        dict(zip(ids, zip(*references, strict=True), strict=True)),
        dict(zip(ids, hypotheses, strict=True)),
        tools=tools,
    )
    _check(scores, "nlg_eval_ptb")


@pytest.mark.parametrize("quality", ["good", "bad"])
def test_clipscore_examples(tools, quality):
    scores = score_captions(
        _read("clipscore", "refs.json"), _read("clipscore", f"{quality}_captions.json"), tools=tools
    )
    _check(scores, f"clipscore_{quality}")
    assert scores.count == 2


def test_coco_captions_with_five_references_each(tools):
    references: dict[str, list[str]] = {}
    for split in ("train2017", "val2017"):
        file = shared_data("tiny_coco") / "tiny_coco" / "annotations" / f"captions_{split}.json"
        for record in json.loads(file.read_text())["annotations"]:
            references.setdefault(str(record["image_id"]), []).append(record["caption"])
    captions = _read("coco_caption", "captions_val2014_fakecap_results.json")
    answers = {str(c["image_id"]): c["caption"] for c in captions if str(c["image_id"]) in references}
    assert len(answers) == 100
    scores = score_captions({name: references[name] for name in answers}, answers, tools=tools)
    _check(scores, "coco_fakecap_100_of_1000")
    for name in ("cider", "rouge_l"):
        assert sum(scores.per_item[name].values()) / 100 == pytest.approx(scores.corpus[name], abs=1e-12)
    assert scores.per_item["meteor"].keys() == answers.keys()


# Captions that break the Java programs' own wrappers.

REFERENCES = {"a": ["A red cat, asleep."], "b": ["two dogs on grass"], "c": ["a bus"], "d": ["a tree", "one tall tree"]}


def test_hostile_captions_stay_with_their_items(tools):
    plain = {"a": "a red cat asleep", "b": "two dogs", "c": "", "d": "a tree"}
    hostile = {"a": "a red\ncat\x85asleep\u2028", "b": "two ||| dogs\r\n", "c": " .\n ? \t", "d": "\ta tree\x0b\x1c"}
    expected = score_captions(REFERENCES, plain, tools=tools)
    scores = score_captions(REFERENCES, hostile, tools=tools)
    assert scores == expected
    assert scores.num_wordless == 1
    assert [scores.per_item[name]["c"] for name in ("meteor", "cider", "rouge_l")] == [0, 0, 0]
    assert scores.per_item["rouge_l"]["a"] == scores.per_item["rouge_l"]["d"] == 1.0
    assert scores.per_item["meteor"]["a"] > scores.per_item["meteor"]["b"] > 0


def test_all_answers_empty_give_zero(tools):
    scores = score_captions(REFERENCES, dict.fromkeys(REFERENCES, ""), tools=tools)
    assert scores.summary() == pytest.approx(
        {**dict.fromkeys(SCORE_NAMES.values(), 0), "count": 4, "wordless": 4}, abs=1e-9
    )


def test_order_of_the_items_does_not_matter(tools):
    answers = {"a": "a red dog", "b": "two dogs on the grass", "c": "a blue bus", "d": "tall trees"}
    turned = score_captions(dict(reversed(REFERENCES.items())), answers, tools=tools)
    assert turned.corpus == pytest.approx(score_captions(REFERENCES, answers, tools=tools).corpus, abs=1e-12)


def test_letters_outside_ascii_are_words_in_any_locale(tools):
    assert tools.tokenize(["Caf\u00e9 (open)", "", "\u4e2d\u6587"]) == [
        "caf\u00e9 -lrb- open -rrb-",
        "",
        "\u4e2d\u6587",
    ]
    _, (same, other) = tools.meteor([["caf\u00e9 noir"]] * 2, ["caf\u00e9 noir", "caf\u00e8 noir"], ["1", "2"])
    assert other < same == 1.0


def test_dropped_tokens_are_those_of_the_coco_evaluation(tools):
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    assert frozenset(PUNCTUATIONS) == java_tools.DROPPED_TOKENS


# The protocol of the paper.


def test_nltk_meteor_by_hand(wordnet):
    # Two matches, one by WordNet, in one piece: precision = recall = 1, penalty 0.5 (1/2)^3.
    assert nltk_meteor(["a", "car"], ["A", "auto"]) == pytest.approx(1 - 0.5 / 8, abs=1e-12)
    # NLTK looks up stems: "large" is "larg" by then, and no synonym of "big".
    assert nltk_meteor(["a", "big", "dog"], ["a", "large", "dog"]) == pytest.approx(2 / 3 * 0.5, abs=1e-12)
    assert nltk_meteor(["dog"], ["tree"]) == nltk_meteor([], ["tree"]) == nltk_meteor(["tree"], []) == 0.0


def test_paper_exchanges_reference_and_answer(tools, wordnet):
    references = {"1": ["a dog on the grass"], "2": ["one bus"], "3": ["a cat"]}
    answers = {"1": "a dog", "2": ": one bus", "3": ""}
    scores = score_captions(references, answers, protocol="paper", tools=tools)
    # Item 1, hypothesis of 5 words against 2: P = 2/5, R = 1, F = P R / (0.9 P + 0.1 R), penalty 0.5 (1/2)^3.
    first = 0.4 / (0.9 * 0.4 + 0.1) * (1 - 0.5 / 8)
    # Item 2: the colon that PerBench answers begin with is a word of the exchanged reference, so R = 2/3.
    second = (2 / 3) / (0.9 + 0.1 * 2 / 3) * (1 - 0.5 / 8)
    assert scores.per_item["meteor"] == pytest.approx({"1": first, "2": second, "3": 0}, abs=1e-12)
    assert scores.corpus["meteor"] == pytest.approx((first + second) / 3, abs=1e-12)
    assert scores.corpus.keys() == {"meteor", "cider"}


def test_paper_takes_the_word_weights_of_cider_from_the_answers(tools, wordnet):
    references = {"1": ["a dog on the grass"], "2": ["a bus"], "3": ["a cat"]}
    answers = {"1": "a dog", "2": "one bus", "3": "the cat"}
    paper = score_captions(references, answers, protocol="paper", tools=tools)
    exchanged = score_captions(
        {name: [answer] for name, answer in answers.items()},
        {name: sentences[0] for name, sentences in references.items()},
        tools=tools,
    )
    standard = score_captions(references, answers, tools=tools)
    assert paper.per_item["cider"] == pytest.approx(exchanged.per_item["cider"], abs=1e-12)
    assert abs(paper.corpus["cider"] - standard.corpus["cider"]) > 0.01


# What is wrong is said before a program runs.


@pytest.mark.parametrize(
    ("references", "protocol", "message"),
    [
        ({}, "standard", "found no item"),
        ({"7": []}, "standard", "item 7: found references"),
        ({"7": ["a dog", " ?\n"]}, "standard", "item 7: found references"),
        ({"7": ["a dog", "one dog"]}, "paper", "item 7: found 2 references, expected exactly 1"),
        ({"7": ["a dog"]}, "swapped", "found protocol 'swapped'"),
    ],
)
def test_unsound_references_are_refused(references, protocol, message):
    with pytest.raises(DataError, match=message):
        check_references(references, protocol)


def test_ids_must_be_the_same(tools):
    with pytest.raises(DataError, match=r"1 items without an answer, such as \['b'\], and 1 answers .* \['x'\]"):
        score_captions({"a": ["one"], "b": ["two"]}, {"a": "one", "x": "two"}, tools=tools)


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_absent_java_is_said_first(monkeypatch, tmp_path, protocol):
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (
        lambda: check_caption_tools(protocol),
        lambda: score_captions({"bad": []}, {}, protocol=protocol),
    ):
        with pytest.raises(DataError, match=r"found no java on PATH.*apt-get install default-jre-headless"):
            call()


def test_java_that_does_not_run_is_refused(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no runtime here >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"does not run .*no runtime here"):
        find_java()


def test_absent_package_is_named_with_its_extra():
    with pytest.raises(DataError, match=r"no_such_package.*\[captions\]"):
        package_folder("no_such_package")


def test_one_line_keeps_words_only():
    assert one_line(" a\r\nb|||c\u2029 \ud800d ") == "a b c ?d"


# A process that misbehaves; a small program stands in for METEOR.

PROGRAM = """
import pathlib, sys, time
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
for line in sys.stdin:
    word = line.strip()
    if word == "die" or (word == "die once" and len(starts.read_text()) == 1):
        sys.exit("out of memory")
    if word == "hang":
        time.sleep(60)
    print("Error: no" if word == "nonsense" else word.upper(), flush=True)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "starts").write_text("")
    process = LineProcess([sys.executable, str(tmp_path / "program.py"), str(tmp_path / "starts")], timeout_s=1.5)
    yield process
    process.close()


def _ask(process: LineProcess, line: str) -> list[str]:
    return process.ask(line, 1, f"item {line}", str.isupper)


def test_one_process_answers_all_lines(program, tmp_path):
    assert [_ask(program, word) for word in ("one", "two")] == [["ONE"], ["TWO"]]
    assert (tmp_path / "starts").read_text() == "x"


def test_a_process_that_died_is_started_again_and_asked_again(program, caplog):
    with caplog.at_level(logging.WARNING):
        assert _ask(program, "die once") == ["DIE ONCE"]
    assert "item die once, attempt 1 of 2" in caplog.text
    assert _ask(program, "more") == ["MORE"]


@pytest.mark.parametrize(("line", "found"), [("die", "no answer.*out of memory"), ("nonsense", "'Error: no'")])
def test_a_line_that_fails_twice_is_named(program, tmp_path, line, found):
    assert _ask(program, "fine") == ["FINE"]
    with pytest.raises(DataError, match=f"METEOR, item {line}: failed twice, found .*{found}"):
        _ask(program, line)
    assert (tmp_path / "starts").read_text() == "xx"
    assert _ask(program, "more") == ["MORE"]


def test_a_process_that_hangs_is_killed(program):
    with pytest.raises(DataError, match=r"item hang: failed twice, found no answer .* within 1\.5 s"):
        _ask(program, "hang")
    assert _ask(program, "more") == ["MORE"]


def test_a_process_that_cannot_start_says_so(tmp_path):
    with pytest.raises(DataError, match="cannot start"):
        LineProcess([str(tmp_path / "absent")], timeout_s=1).ask("x", 1, "item x", str.isupper)

"""General visual questions: answers, requests and templates without the kit."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from running import ROOT

from pixel_sail.evaluation.predict import BatchPredictor, PredictorOutput
from pixel_sail.model.tokenization import special_tokens
from pixel_sail.types import DataError
from pixel_sail.vqa.answering import WINDOW, VqaRequest, answer, answers, plain_answer
from pixel_sail.vqa.kit_requests import to_request
from pixel_sail.vqa.prompts import lettered_question, mme_question, seed_question

SPECIAL = special_tokens(15)


@pytest.fixture(scope="module")
def predictor(tiny_model, processor):
    return BatchPredictor(tiny_model(), processor)


@pytest.fixture
def encoded(predictor, monkeypatch):
    """The images that were converted to patches, in order."""
    seen = []
    prepare = predictor.processor.image_patches
    monkeypatch.setattr(predictor.processor, "image_patches", lambda image: seen.append(image) or prepare(image))
    return seen


class Echo:
    """A predictor that answers a question by repeating it."""

    def __init__(self, processor, batches):
        self.processor, self.batches = processor, batches

    def changed(self, **settings):
        self.batches.append(settings)
        return self

    def prepare(self, image):
        return image.size

    def ask_many(self, requests):
        self.batches.append([len(request.questions) for request in requests])
        return [
            [
                PredictorOutput(answer=text, masks_NHW=np.zeros((0, 1, 1), dtype=bool), scores=())
                for text in request.questions
            ]
            for request in requests
        ]


def plain_image(color, size=(24, 16)):
    return Image.new("RGB", size, color)


def asked(question="red?", image=None, max_new_tokens=4, until=()):
    return VqaRequest(question=question, image=image, max_new_tokens=max_new_tokens, until=until)


def test_an_answer_is_the_predictors_without_special_tokens(predictor):
    image = plain_image((200, 30, 40))
    questions = [f"{word}?" for word in ("red", "left", "star", "the small", "box", "behind it", "of", "round")]
    raw = [output.answer for output in predictor.changed(max_new_tokens=24).ask(image, questions)]
    assert any(token in text for text in raw for token in SPECIAL), "the test needs answers with special tokens"
    said = [answer(predictor, image, question, max_new_tokens=24) for question in questions]
    assert said == [plain_answer(text, SPECIAL) for text in raw]
    assert not any(token in text for text in said for token in SPECIAL)


def test_an_image_changes_the_answer_and_none_is_allowed(predictor):
    said = [
        answer(predictor, image, "what?", max_new_tokens=24)
        for image in (None, plain_image("red"), plain_image("blue"))
    ]
    alone = predictor.changed(max_new_tokens=24).ask(None, ["what?"])[0].text
    assert said[0] == plain_answer(alone, SPECIAL)
    assert len(set(said)) == 3


def test_questions_asked_together_get_the_answers_they_get_alone(predictor):
    images = [plain_image("red"), plain_image("blue", size=(40, 24)), None]
    questions = [asked(f"{word}?", images[i % 3], 3 + i % 2) for i, word in enumerate(["a", "red", "left of"] * 4)]
    together = list(answers(predictor, questions))
    assert together == [answer(predictor, q.image, q.question, max_new_tokens=q.max_new_tokens) for q in questions]


def test_equal_images_are_encoded_once_at_any_position_in_a_window(predictor, encoded):
    list(answers(predictor, [asked(f"{i}", plain_image(("red", "blue")[i % 2])) for i in range(8)]))
    assert len(encoded) == 2


def test_images_with_equal_bytes_and_another_palette_differ(predictor, encoded):
    images = [Image.new("P", (24, 16)) for _ in range(2)]
    for image, color in zip(images, ([255, 0, 0], [0, 0, 255]), strict=True):
        image.putpalette(color)
    assert images[0].tobytes() == images[1].tobytes()
    list(answers(predictor, [asked("which?", image) for image in images]))
    assert len(encoded) == 2


def test_questions_with_other_length_limits_are_asked_apart_and_answered_in_order(processor):
    batches = []
    questions = [asked("one", None, 4), asked("two", None, 8), asked("three", plain_image("red"), 4)]
    assert list(answers(Echo(processor, batches), questions)) == ["one", "two", "three"]
    assert batches == [
        {"max_new_tokens": 4, "answer": "generated"},
        [1, 1],
        {"max_new_tokens": 8, "answer": "generated"},
        [1],
    ]


def test_no_more_than_a_window_of_images_is_read_ahead(processor):
    read = []
    questions = (read.append(i) or asked(str(i)) for i in range(3 * WINDOW))
    said = answers(Echo(processor, []), questions)
    assert next(said) == "0"
    assert len(read) == WINDOW
    assert list(said) == [str(i) for i in range(1, 3 * WINDOW)]


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("Yes", (), "Yes"),
        ("A.\n\nBecause", ("\n\n",), "A."),
        ("B ASSISTANT: C\n\nD", ("\n\n", "ASSISTANT:"), "B"),
        ("two  blanks\nand lines stay", (), "two  blanks\nand lines stay"),
        ("It is [SEG].<|im_end|>", (), "It is."),
        ("<p> A man </p> [SEG] runs", (), "A man runs"),
        ("<Prompt0>: a cup[SEG]here", (), ": a cup here"),
        ("C<|im_end|>D", ("<|im_end|>",), "C"),
        ("STOP here", ("STOP",), ""),
        ("A [SEG] B", ("A B",), ""),
    ],
)
def test_an_answer_is_cut_and_freed_of_special_tokens(text, until, expected):
    assert plain_answer(text, SPECIAL, until) == expected


def request(visuals, settings, text="red?", doc_to_visual=None):
    """The `args` of the kit's generate_until request for document 1 of a task, and the kit's documents."""
    documents = {"mme": {"test": [{}, {"visuals": visuals}]}}
    return (text, settings, doc_to_visual or (lambda document: document["visuals"]), 1, "mme", "test"), documents


def read(visuals=(), settings=None, **changes):
    arguments, documents = request(visuals, settings or {}, **changes)
    return to_request(arguments, documents, default_max_new_tokens=512)


def test_a_request_of_the_kit_becomes_a_question():
    image = plain_image("red")
    found = read([image], {"max_new_tokens": 16, "until": ["\n\n", "ASSISTANT:"], "temperature": 0, "do_sample": False})
    assert found == asked("red?", image, 16, ("\n\n", "ASSISTANT:"))


@pytest.mark.parametrize("visuals", [[], None])
def test_a_document_without_an_image_is_a_question_of_text(visuals):
    assert read(visuals).image is None
    assert to_request(("red?", {}, None, 0, "t", "s"), {"t": {"s": [{}]}}, default_max_new_tokens=1).image is None


@pytest.mark.parametrize(
    ("settings", "max_new_tokens", "until"),
    [
        ({}, 512, ()),
        ({"max_gen_toks": 7}, 7, ()),
        ({"max_new_tokens": None, "until": None}, 512, ()),
        ({"until": "\n"}, 512, ("\n",)),
        ({"do_sample": False, "temperature": 0.7}, 512, ()),
        ({"temperature": None, "num_beams": 1}, 512, ()),
    ],
)
def test_settings_of_a_task_are_read(settings, max_new_tokens, until):
    found = read(settings=settings)
    assert (found.max_new_tokens, found.until) == (max_new_tokens, until)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visuals": [plain_image("red"), plain_image("blue")]}, "2 images found, expected one or none"),
        ({"visuals": ["film.mp4"]}, "str found, expected an image"),
        ({"visuals": [{"array": []}]}, "dict found, expected an image"),
        ({"settings": {"do_sample": True}}, "answers are greedy"),
        ({"settings": {"temperature": 0.2}}, "answers are greedy"),
        ({"settings": {"num_beams": 4}}, "answers are greedy"),
        ({"settings": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"settings": {"max_new_tokens": "16"}}, "max_new_tokens is '16'"),
        ({"settings": {"until": [""]}}, "expected non-empty texts"),
        ({"text": ["a", "b"]}, "a question of type list"),
    ],
)
def test_unanswerable_requests_are_rejected_with_task_and_document(changes, message):
    with pytest.raises(DataError, match=r"^task mme, split test, document 1: ") as caught:
        read(**changes)
    assert message in str(caught.value)


def test_mme_is_asked_unchanged():
    question = "Is there a red box? Please answer yes or no."
    assert mme_question({"question": question, "answer": "Yes"}) == question


def test_missing_options_are_skipped():
    document = {"question": "Which?", "A": "box", "B": "None", "C": "nan", "D": float("nan"), "E": None, "hint": "nan"}
    assert lettered_question(document) == (
        "Which?\nA. box\nB. None\nAnswer with the option's letter from the given choices directly."
    )
    assert lettered_question(document | {"hint": "Look left.", "C": "star"}) == (
        "Look left.\nWhich?\nA. box\nB. None\nC. star\nAnswer with the option's letter from the given choices directly."
    )


def test_options_of_seed_bench_are_lettered():
    document = {"question": "How many?", "choice_a": "One", "choice_b": "Two", "choice_c": "3", "choice_d": "nan"}
    assert seed_question(document) == (
        "How many?\nA. One\nB. Two\nC. 3\nD. nan\nAnswer with the option's letter from the given choices directly."
    )


def test_the_command_explains_how_to_install_the_missing_kit():
    # An entry of None in sys.modules makes every import of that name fail, installed or not.
    code = "import sys, runpy; sys.modules['lmms_eval'] = None; runpy.run_module('pixel_sail.vqa', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -e .[vqa]" in done.stderr


def test_nothing_but_the_adapter_imports_the_kit():
    needing = {"lmms_eval_model.py", "lmms_eval_plugin.py", "__main__.py"}
    files = [path for path in (ROOT / "pixel_sail").rglob("*.py") if "lmms_eval" in path.read_text()]
    importing = {
        path.name for path in files if "import lmms_eval" in path.read_text() or "from lmms_eval" in path.read_text()
    }
    assert importing == needing

"""The public Predictor API: questions about one image and many, chats, and actionable errors."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_predict import predictor as batch  # noqa: F401, a fixture

import pixel_sail
from pixel_sail import Box, Point, Predictor, PredictorRequest
from pixel_sail import predictor as module
from pixel_sail.config import ConfigError, PredictConfig
from pixel_sail.evaluation import predict
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.model.generation import encode_images
from pixel_sail.types import DataError, VisualPrompt


@pytest.fixture
def predictor(batch):  # noqa: F811
    return Predictor(batch)


@pytest.fixture
def forced(batch):  # noqa: F811
    return Predictor(batch.changed(answer="forced"))


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (40, 64, 3), dtype=np.uint8))


@pytest.fixture
def encodings(monkeypatch):
    """Return the list of images that were encoded so far."""
    seen = []

    def counting(model, patches_IPK, *rest):
        seen.extend(range(len(patches_IPK)))
        return encode_images(model, patches_IPK, *rest)

    monkeypatch.setattr(predict, "encode_images", counting)
    return seen


def assert_same(result, output):
    assert result.answer == output.answer
    np.testing.assert_array_equal(result.masks_NHW, output.masks_NHW)
    assert result.scores == pytest.approx(output.scores, rel=1e-6)


@pytest.mark.parametrize("marks", [(), (Box(8, 8, 32, 24),)])
def test_an_answer_is_the_one_that_the_evaluation_scores(predictor, batch, image, marks):  # noqa: F811
    box = np.zeros((40, 64), dtype=bool)
    box[8:24, 8:32] = True
    masks = 0
    for text in ("a star", "the red box", "left", "the small star behind it", "c", "d", "e"):
        (output,) = batch.ask(image, [text], (VisualPrompt(prompt_id=0, mask=box),) if marks else ())
        result = predictor.ask(image, text, marks)
        assert_same(result, output)
        masks += len(result.masks_NHW)
    assert masks > 0


def test_segment_uses_the_question_of_the_evaluation(forced, image):
    result = forced.segment(image, "the red box")
    assert_same(result, forced.batch.ask(image, ["Please segment the red box in this image."])[0])
    assert_same(
        Predictor(forced.batch.changed(prompt="short")).segment(image, "the red box"),
        forced.batch.ask(image, ["the red box"])[0],
    )
    assert result.answer == "It is [SEG]." and result.text == "It is." and result.phrases == ("",)


def test_a_region_is_described_by_the_benchmarks_question(predictor, image):
    region = np.zeros((40, 64), dtype=bool)
    region[3:9, 5:20] = True
    question = "Can you provide me with a detailed description of the region in the picture marked by <Prompt0>?"
    prompt = VisualPrompt(prompt_id=0, mask=region)
    assert_same(predictor.describe(image, region), predictor.batch.ask(image, [question], (prompt,))[0])
    assert predictor.describe(image).answer != ""


def test_files_pixels_and_opened_images_give_one_answer(forced, image, tmp_path):
    image.save(tmp_path / "image.png")
    expected = forced.ask(image, "a star")
    for same in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        np.asarray(image),
        Image.open(tmp_path / "image.png"),
    ):
        np.testing.assert_array_equal(forced.ask(same, "a star").masks_NHW, expected.masks_NHW)


def test_an_opened_image_is_turned_upright(forced, tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert forced.ask(Image.open(tmp_path / "turned.png"), "a star").masks_NHW.shape == (1, 64, 40)


def test_a_chat_encodes_its_image_once_and_keeps_its_history(predictor, image, encodings):
    chat = predictor.chat(image, [Box(8, 8, 32, 24)])
    questions = ("a star at <Prompt0>", "the red box", "left")
    results = [chat.ask(question) for question in questions]
    assert len(encodings) == 1
    assert results[0].timing.encode_s > 0 and [result.timing.encode_s for result in results[1:]] == [0.0, 0.0]
    assert chat.results == results

    # The same conversation in the training layout, generated from its start for every turn.
    processor, spoken = predictor.batch.processor, []
    box = np.zeros((40, 64), dtype=bool)
    box[8:24, 8:32] = True
    request = predict.GenerationRequest(
        image=predictor.batch.prepare(image), questions=[], prompts=(VisualPrompt(prompt_id=0, mask=box),)
    )
    for turn, (question, result) in enumerate(zip(questions, results, strict=True)):
        spoken += processor.question_ids(question, follows_image=turn == 0)
        before = spoken.count(processor.seg_id)
        ((answer,),) = predict.generate(
            predictor.batch.model,
            predictor.batch.encode([request]),
            [[spoken]],
            max_new_tokens=5,
            end_ids=predictor.batch.end_ids,
        )
        assert result.answer == processor.decode(answer.token_ids)
        assert len(result.masks_NHW) == len(answer.seg_states_ND) - before
        spoken += [token for token in answer.token_ids if token not in predictor.batch.end_ids] + [processor.end_id]
    assert sum(len(result.masks_NHW) for result in results) > 0


def test_a_follow_up_question_is_not_a_first_question(predictor, image):
    chat = predictor.chat(image)
    chat.ask("the red box")
    asked = ("a star", "left", "behind it", "the small star")
    alone = [predictor.ask(image, text).answer for text in asked]
    assert [chat.ask(text).answer for text in asked] != alone


def test_marking_a_region_reencodes_the_image_and_numbering_continues(predictor, image, encodings):
    chat = predictor.chat(image, [Box(8, 8, 32, 24)])
    chat.ask("a star at <Prompt0>")
    with pytest.raises(DataError, match=r"<Prompt1> found, but 1 regions are marked"):
        chat.ask("the box at <Prompt1>")
    chat.mark(Point(50, 30))
    assert chat.num_prompts == 2
    assert chat.ask("the box at <Prompt1>").timing.encode_s > 0
    assert len(encodings) == 2


def test_pieces_of_a_stream_are_the_answer(predictor, image):
    chat, whole = predictor.chat(image), predictor.ask(image, "a star")
    pieces = list(chat.stream("a star"))
    assert len(pieces) > 1 and "".join(pieces).strip() == whole.answer
    assert_same(chat.results[0], predictor.batch.ask(image, ["a star"])[0])


def test_a_stream_that_is_given_up_was_not_asked(predictor, image):
    chat = predictor.chat(image)
    next(chat.stream("left"))
    assert chat.results == []
    assert chat.ask("a star").answer == predictor.ask(image, "a star").answer


def test_many_questions_at_once_come_back_in_their_order(predictor, image, encodings):
    other = Image.fromarray(np.asarray(image)[::-1].copy())
    requests = [
        PredictorRequest(image=image, text="a star"),
        PredictorRequest(image=other, text="a star"),
        PredictorRequest(image=image, text="the red box"),
    ]
    requests += [
        PredictorRequest(image=image, text="left of <Prompt0>", prompts=[Point(3, 3)]),
        PredictorRequest(image=None, text="left"),
    ]
    results = predictor.ask_many(requests)
    assert len(encodings) == 3
    for item, result in zip(requests, results, strict=True):
        alone = predictor.ask(item.image, item.text, item.prompts)
        assert result.answer == alone.answer and result.timing is None
        # Other batch sizes may round differently, which can flip a pixel at the threshold.
        assert (result.masks_NHW != alone.masks_NHW).sum() <= 2


def test_masks_in_an_array_are_regions_like_any_other(forced, image):
    left = np.zeros((40, 64), dtype=bool)
    left[:, :20] = True
    pairs = [np.stack([left, ~left]), np.stack([~left, left])]
    # Rows of an array are temporary objects: one may get the id of a previous one.
    requests = [PredictorRequest(image=image, text="what is <Prompt0>?", prompts=masks) for masks in pairs * 3]
    alone = [forced.ask(image, "what is <Prompt0>?", list(masks)) for masks in pairs]
    assert (alone[0].masks_NHW != alone[1].masks_NHW).sum() > 20
    for result, expected in zip(forced.ask_many(requests), alone * 3, strict=True):
        assert (result.masks_NHW != expected.masks_NHW).sum() <= 2
    np.testing.assert_array_equal(forced.ask(image, requests[0].text, pairs[0]).masks_NHW, alone[0].masks_NHW)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompts": [Box(0, 0, 99, 5)]}, "question 1: prompt 0: found Box"),
        ({"prompts": Box(0, 0, 9, 5)}, "question 1: prompts: found Box, expected a list"),
        ({"image": None, "prompts": [Point(1, 1)]}, "question 1: 1 prompts found without an image"),
        ({"text": ""}, "question 1: text"),
        ({"image": "nowhere.png"}, "question 1: nowhere.png"),
    ],
)
def test_a_question_of_many_that_cannot_be_asked_is_named(forced, image, how, message):
    fine = PredictorRequest(image=image, text="a")
    with pytest.raises(DataError, match=message):
        forced.ask_many([fine, PredictorRequest(**({"image": image, "text": "b"} | how))])


def test_a_result_tells_boxes_and_rles_as_json_does(forced, image):
    result = forced.ask(image, "a star")
    masks = np.zeros((2, 4, 6), dtype=bool)
    masks[0, 1:3, 2:5] = True
    sampled = pixel_sail.PredictorOutput(answer="<p> a cup </p> [SEG] [SEG].", masks_NHW=masks, scores=(0.9, 0.0))
    assert sampled.boxes == ((2, 1, 5, 3), None)
    assert sampled.phrases == ("a cup", "")
    assert sampled.mask.sum() == 6
    record = sampled.to_json()
    assert record["boxes"] == [[2, 1, 5, 3], None] and record["masks"][0]["size"] == [4, 6]
    assert result.to_json()["timing"]["encode_s"] > 0
    assert result.timing.total_s == pytest.approx(sum(result.to_json()["timing"].values()))


def test_a_box_covers_every_pixel_it_touches(image):
    from pixel_sail.predictor_io import region_mask

    assert np.argwhere(region_mask(Box(1.5, 0, 2.5, 1), (3, 4), "here")).tolist() == [[0, 1], [0, 2]]
    assert np.argwhere(region_mask(Point(3.9, 2), (3, 4), "here")).tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"text": "  "}, "expected a question of at least one word"),
        ({"text": 7}, "text: found 7"),
        ({"text": "It is [SEG]."}, r"\[SEG\] found, which only the model may say"),
        ({"text": "a<|im_end|>b"}, "remove it from the question"),
        ({"text": "what is <Prompt0>?"}, "<Prompt0> found, but 0 regions are marked"),
        ({"prompts": [Box(0, 0, 65, 10)]}, r"prompt 0: found Box\(.*inside the image of 64 x 40"),
        ({"prompts": [Point(3, -1)]}, "expected x, y inside the image of 64 x 40"),
        ({"prompts": [np.ones((64, 40), dtype=bool)]}, r"a mask of \(64, 40\)"),
        ({"prompts": [np.ones((40, 64))]}, "of bool"),
        ({"prompts": [np.zeros((40, 64), dtype=bool)]}, "marks no pixel"),
        ({"prompts": ["left"]}, "found str, expected Box, Point"),
        ({"prompts": Box(0, 0, 9, 9)}, "prompts: found Box, expected a list of regions"),
        ({"prompts": "left"}, "prompts: found str, expected a list of regions"),
        ({"prompts": None}, "prompts: found NoneType, expected a list of regions"),
        ({"prompts": np.ones((40, 64), dtype=bool)}, r"found one array \(40, 64\).* write \[mask\]"),
        ({"prompts": [Box("0", 0, 9, 9)]}, "prompt 0: .*expected numbers"),
        ({"prompts": [Point(1, None)]}, "prompt 0: .*expected numbers"),
        ({"text": "a \ud800 b"}, "half a character"),
        ({"text": f"<Prompt{'9' * 5000}>"}, "0 regions are marked"),
        ({"image": np.zeros((0, 5, 3), dtype=np.uint8)}, "found 5 x 0 pixels"),
        ({"image": Image.new("RGB", (0, 0))}, "found 0 x 0 pixels"),
        ({"prompts": [Point(i, 2 * i) for i in range(16)]}, "use fewer prompts"),
        ({"image": np.zeros((4, 4))}, r"found float64 \(4, 4\), expected a path"),
        ({"image": b"GIF89a"}, "found bytes, expected a path"),
        ({"image": "nowhere.jpg"}, "no such image file"),
        ({"image": None, "prompts": [Point(1, 1)]}, "without an image"),
    ],
)
def test_invalid_questions_are_rejected_with_what_to_do(predictor, image, how, message):
    with pytest.raises(DataError, match=message):
        predictor.ask(**({"image": image, "text": "a star"} | how))


def test_a_saved_model_is_found_in_its_run_and_answers_as_before(batch, image, tmp_path):  # noqa: F811
    config = PredictConfig(max_new_tokens=5)
    batch.model.save_pretrained(tmp_path / "run" / "export")
    batch.processor.save_pretrained(tmp_path / "run" / "export")
    expected = batch.ask(image, ["a star"])[0]
    for folder in (tmp_path / "run", str(tmp_path / "run" / "export")):
        assert_same(Predictor.from_pretrained(folder, config=config).ask(image, "a star"), expected)
    half = Predictor.from_pretrained(tmp_path / "run", config=config, precision="bf16")
    assert half.batch.model.dtype == torch.bfloat16 and half.ask(image, "a star").answer


def test_a_model_of_the_hub_is_fetched_at_its_revision(batch, image, tmp_path, monkeypatch):  # noqa: F811
    batch.model.save_pretrained(tmp_path / "fetched")
    batch.processor.save_pretrained(tmp_path / "fetched")
    calls = []

    def fetched(name, **settings):
        calls.append((name, settings["revision"]))
        return str(tmp_path / "fetched")

    monkeypatch.setattr(module, "snapshot_download", fetched)
    assert isinstance(Predictor.from_pretrained("owner/model", revision="abc").batch, BatchPredictor)
    assert calls == [("owner/model", "abc")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "no/such/folder"}, "use a run folder"),
        ({"precision": "fp64"}, r"found 'fp64', expected one of \('fp32', 'bf16'\)"),
    ],
)
def test_a_model_that_cannot_be_downloaded_is_rejected(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        Predictor.from_pretrained(**({"name": tmp_path} | settings))


def without_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        without_tensor,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "processor_config.json").unlink(),
    ],
)
def test_a_damaged_model_is_rejected(batch, tmp_path, damage):  # noqa: F811
    batch.model.save_pretrained(tmp_path)
    batch.processor.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))}: cannot be loaded (?s:.*)export it again"):
        Predictor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [("xyz", "expected 'cpu', 'cuda'"), ("", "expected 'cpu'"), ("mps", "expected 'cpu'"), ("cuda:2", "torch sees 2")],
)
def test_a_device_that_does_not_exist_is_rejected(tmp_path, monkeypatch, device, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        Predictor.from_pretrained(tmp_path, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        Predictor.from_pretrained(tmp_path, device="cuda")


def test_the_package_names_what_it_offers():
    assert {name: getattr(pixel_sail, name).__name__ for name in pixel_sail.__all__} == {
        n: n for n in pixel_sail.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pixel_sail.Nothing


def test_loading_warns_of_nothing(batch, tmp_path):  # noqa: F811
    """Users mistake warnings of libraries for their own errors. In another process, as warnings are shown once."""
    batch.model.save_pretrained(tmp_path)
    batch.processor.save_pretrained(tmp_path)
    code = f"from pixel_sail import Predictor; Predictor.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|not supported|error", done.stderr, re.IGNORECASE), done.stderr

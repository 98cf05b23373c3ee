"""Every evaluation task: each item is queried once, results are the same over ranks and after a kill, scores use the
files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from running import ROOT, environment, launcher
from transformers import BertConfig, BertModel

from pixel_sail.config import ConfigError, EvalConfig, PredictConfig, TrainConfig, load_config
from pixel_sail.data.masks import decode_rle
from pixel_sail.evaluation import grounded_caption, predict, refer_seg, region_caption, region_choice, visual_referring
from pixel_sail.evaluation.engine import answer_image, evaluate
from pixel_sail.evaluation.item_predictions import ITEM_PREDICTIONS, ItemPrediction
from pixel_sail.evaluation.phrase_similarity import BERT_BASE_UNCASED, EncoderSimilarity
from pixel_sail.evaluation.predict import BatchPredictor
from pixel_sail.evaluation.record_files import RecordWriter, read_records
from pixel_sail.evaluation.run import perbench_overall_of, run_evals
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import by_image
from pixel_sail.evaluation.validation import validation_for
from pixel_sail.metrics.grounded_caption import word_overlap
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError, Expression, Prediction, VisualReferring

EVALS = (
    "reasonseg_val",
    "perbench_caption",
    "perbench_choice",
    "perbench_visual_referring",
    "refcocog_region_caption",
    "gcg_val",
)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, processor, tmp_path_factory):
    """An exported random model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    model = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def region_file(data_root, tmp_path_factory):
    """RefCOCOg's region-caption file about the synthetic images: every object of PerBench's file is an "image" of
    it."""
    folder = data_root / "refshapes"
    images, annotations = [], []
    for record in json.loads((folder / "perbench" / "STBench_Detailed_Caption.json").read_text()):
        for entry in record["object_annotations"]:
            height, width = entry["segmentation"]["size"]
            images.append({"id": len(images), "file_name": record["image_name"], "height": height, "width": width,
                           "caption": entry["caption"]})  # fmt: skip
            annotations.append({"id": len(annotations), "image_id": len(annotations),
                                "segmentation": [entry["segmentation"]]})  # fmt: skip
    file = tmp_path_factory.mktemp("regions") / "regions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


@pytest.fixture(scope="module")
def options(checkpoint, data_root, region_file):
    """Return a function from evals to the command line that runs them on the synthetic files, with a few tokens
    each."""
    folder = data_root / "refshapes"
    perbench = {"caption": "Detailed_Caption", "choice": "MCQ", "visual_referring": "VRES"}
    places = {
        "reasonseg_val": {"root": folder / "reason_seg"},
        **{f"perbench_{task}": {"annotations": folder / "perbench" / f"STBench_{name}.json"}
           for task, name in perbench.items()},
        "refcocog_region_caption": {"annotations": region_file, "captions": "null"},
        "gcg_val": {"root": folder / "glamm_data" / "annotations" / "gcg_val_test", "score_text": "false"},
        "refshapes_val": {"root": folder},
    }  # fmt: skip
    for name, place in places.items():
        if name not in ("reasonseg_val", "refshapes_val"):
            place["image_dir"] = folder / "images" / "train2014"
        if name.endswith("caption"):
            place["protocols"] = "[]"

    def make(output, *names):
        overrides = [f"evals.{name}.{key}={value}" for name in names for key, value in places[name].items()]
        common = (f"checkpoint={checkpoint}", f"output={output}", f"evals=[{','.join(names)}]", "progress=false")
        return [*common, *overrides, "predict.max_new_tokens=4", "examples=2"]

    return make


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """Folder and scores of all evals, run uninterrupted by one process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_evals(load_config("evaluate", EvalConfig, options(folder, *EVALS)))


def records(folder, name):
    return (folder / name / "predictions.jsonl").read_text()


def answers(folder, name):
    return read_records(folder / name / "predictions.jsonl", ITEM_PREDICTIONS)


def test_every_task_answers_and_scores_every_item(whole):
    folder, scores = whole
    counts = {name: len(records(folder, name).splitlines()) for name in EVALS}
    assert counts == {name: scores[name]["count"] for name in EVALS}
    assert min(counts.values()) >= 2
    assert set(scores["perbench_choice"]) == {"accuracy", "paper_accuracy", "ambiguous", "unparsed", "count"}
    assert {"ciou", "giou", "each_giou", "paper_ciou", "paper_giou"} <= set(scores["perbench_visual_referring"])
    assert {"ap50", "miou", "word_recall", "paper_ap50", "paper_miou"} <= set(scores["gcg_val"])
    assert not {"paper_word_recall", "paper_recall", "recall"} & set(scores["gcg_val"])
    report = (folder / "report.html").read_text()
    assert all(f"Examples from {name}" in report for name in EVALS) and "paper_accuracy" in report


def test_every_eval_can_be_asked_as_released(options, tmp_path):
    as_released = [*options(tmp_path, *EVALS, "refshapes_val"), "recipe=released", "max_images=1", "resamples=0"]
    config = load_config("evaluate", EvalConfig, as_released)
    assert config.predict == PredictConfig(max_new_tokens=4, prompt="paper", mask="first")
    scores = run_evals(config)
    assert set(scores) == {*EVALS, "refshapes_val"}
    protocols = [json.loads((tmp_path / name / "protocol.json").read_text()) for name in scores]
    assert {protocol["precision"] for protocol in protocols} == {"bf16"}


def test_two_processes_write_the_same_predictions(whole, options, data_root, tmp_path):
    command = [*launcher("torchrun"), "scripts/evaluate.py", *options(tmp_path, *EVALS)]
    done = subprocess.run(command, cwd=ROOT, env=environment(data_root), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in EVALS:
        assert records(tmp_path, name) == records(whole[0], name)
        assert (tmp_path / name / "part-1.jsonl").stat().st_size > 0
    assert json.loads(done.stdout) == json.loads(json.dumps(whole[1]))


def test_a_killed_evaluation_resumes_with_the_missing_images(options, data_root, tmp_path, monkeypatch):
    # max_batch_tokens makes every image a separate batch.
    in_one_go = [*options(tmp_path / "whole", "perbench_choice"), "predict.max_batch_tokens=1"]
    run_evals(load_config("evaluate", EvalConfig, in_one_go))
    overrides = [*options(tmp_path / "killed", "perbench_choice"), "predict.max_batch_tokens=1"]
    kill_after_two_images = (
        "import os, runpy, signal; from pixel_sail.evaluation.record_files import RecordWriter; left = [1, 0]; "
        "RecordWriter.sync = lambda self: left.pop() and os.kill(os.getpid(), signal.SIGKILL); "
        "runpy.run_path('scripts/evaluate.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", kill_after_two_images, *overrides]
    killed = subprocess.run(command, cwd=ROOT, env=environment(data_root), capture_output=True, timeout=280)
    assert killed.returncode == -9, killed.stderr[-3000:]
    part = tmp_path / "killed" / "perbench_choice" / "part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    images = [json.loads(line)["item_id"].split("/")[0] for line in lines]
    asked = count_questions(monkeypatch)
    run_evals(load_config("evaluate", EvalConfig, overrides))
    assert records(tmp_path / "killed", "perbench_choice") == records(tmp_path / "whole", "perbench_choice")
    # The first image is not queried again; the interrupted one is queried completely.
    assert len(set(images)) == 2
    assert sum(asked) == len(answers(tmp_path / "killed", "perbench_choice")) - images.count(images[0])


def count_questions(monkeypatch):
    """Return a list that grows by the number of questions of every batch."""
    asked, generate = [], predict.generate

    def counting(model, prefix, texts, **settings):
        asked.append(sum(map(len, texts)))
        return generate(model, prefix, texts, **settings)

    monkeypatch.setattr(predict, "generate", counting)
    return asked


def test_the_questions_are_part_of_the_protocol(whole, options, tmp_path):
    protocol = json.loads((whole[0] / "perbench_choice" / "protocol.json").read_text())
    assert protocol["task"] == "region choices" and protocol["predict"]["max_new_tokens"] == 4
    overrides = options(tmp_path, "perbench_choice")
    file = next(o.split("=")[1] for o in overrides if "annotations=" in o)
    content = json.loads(Path(file).read_text())
    own = tmp_path / "own.json"
    own.write_text(json.dumps(content))
    overrides = [f"evals.perbench_choice.annotations={own}" if "annotations=" in o else o for o in overrides]
    run_evals(load_config("evaluate", EvalConfig, overrides))
    content[0]["mcqs"][0]["question"] = "Which?\nA. one\nB. two\n" + content[0]["mcqs"][0]["question"].replace(".", " ")
    content[0]["mcqs"][0]["answer"] = "A. one"
    own.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"protocol\.json: found predictions of another protocol"):
        run_evals(load_config("evaluate", EvalConfig, overrides))


def test_each_task_has_a_default_length_unless_configured(whole, options, tmp_path):
    lengths = {}
    for name in ("reasonseg_val", "gcg_val"):
        overrides = [o for o in options(tmp_path, name) if "max_new_tokens" not in o]
        run_evals(load_config("evaluate", EvalConfig, [*overrides, "max_images=1"]))
        lengths[name] = json.loads((tmp_path / name / "protocol.json").read_text())["predict"]["max_new_tokens"]
        assert len(records(tmp_path, name).splitlines()) == 1
    assert lengths == {"reasonseg_val": 32, "gcg_val": 512}


def test_a_prompt_the_task_does_not_have_is_rejected_before_the_model_is_loaded(options, tmp_path):
    config = load_config(
        "evaluate", EvalConfig, [*options(tmp_path, "refcocog_region_caption"), "predict.prompt=short"]
    )
    with pytest.raises(ConfigError, match=r"'short', expected one of .* for region captions"):
        run_evals(config)
    assert not list(tmp_path.iterdir())


# One image.


@pytest.fixture()
def predictor(checkpoint):
    return BatchPredictor.from_pretrained(checkpoint, config=PredictConfig(max_new_tokens=4))


def perbench(data_root, task, file):
    folder = data_root / "refshapes"
    return task(annotations=folder / "perbench" / f"STBench_{file}.json", image_dir=folder / "images" / "train2014")


def test_questions_about_different_regions_get_the_answers_they_get_alone(predictor, data_root):
    task = perbench(data_root, region_choice.load, "MCQ")
    group = by_image(task.requests("standard"))[0]
    items = [item for item in task.items if item.item_id in {request.key for request in group}]
    assert len(items) == 3 and len({request.overlay_key() for request in group}) == 3
    together = answer_image(predictor, task, items)
    assert together == [answer_image(predictor, task, [item])[0] for item in items]
    assert [record.item_id for record in together] == [item.item_id for item in items]
    assert answer_image(predictor.changed(max_batch_tokens=1), task, items) == together


def test_masks_depend_on_the_marked_region_and_not_on_what_else_is_asked(predictor, data_root):
    task = perbench(data_root, region_choice.load, "MCQ")
    forced = predictor.changed(answer="forced")
    items = [item for item in task.items if item.image_path == task.items[0].image_path]
    together = mask_pixels(answer_image(forced, task, items))
    alone = mask_pixels(answer_image(forced, task, items[:1]))
    other = mask_pixels(answer_image(forced, task, [replace(items[0], region=items[1].region)]))
    # Other batch sizes may round differently, which can flip a pixel at the threshold.
    assert (together[0] != alone[0]).sum() <= 2 < (other[0] != alone[0]).sum()


def mask_pixels(records):
    return [decode_rle(record.masks[0]) for record in records]


def test_an_image_is_encoded_once_for_all_questions_with_the_same_prompts(predictor, data_root, monkeypatch):
    task = perbench(data_root, region_choice.load, "MCQ")
    group = [item for item in task.items if item.image_path == task.items[0].image_path]
    twice = [replace(item, item_id=f"{item.item_id}/{copy}") for item in group for copy in "ab"]
    encoded, encode_images = [], predict.encode_images

    def counting(model, patches_IPK, *rest):
        encoded.append(len(patches_IPK))
        return encode_images(model, patches_IPK, *rest)

    monkeypatch.setattr(predict, "encode_images", counting)
    asked = count_questions(monkeypatch)
    written = answer_image(predictor, task, twice)
    assert (encoded, asked) == ([3], [6])
    assert [record.answer for record in written[::2]] == [record.answer for record in written[1::2]]


def test_an_answer_without_mask_is_followed_by_a_forced_one_that_only_paper_counts(predictor, data_root):
    task = perbench(data_root, visual_referring.load, "VRES")
    item = task.items[0]
    silent = predictor.changed(max_new_tokens=0)
    (answer,) = answer_image(silent, task, [item])
    assert answer.is_retry and answer.answer == "" and len(answer.masks) == 1
    perfect = replace(answer, masks=item.targets)
    scores = replace(task, items=[item]).score([item], [perfect])
    assert (scores["ciou"], scores["missing"], scores["retried"]) == (0.0, 1, 1)
    assert scores["paper_ciou"] == pytest.approx(1.0) and scores["paper_giou"] == pytest.approx(1.0, abs=1e-6)
    (forced,) = answer_image(silent.changed(answer="forced"), task, [item])
    assert not forced.is_retry and forced.masks == answer.masks and forced.answer == "It is [SEG]."


def test_invalid_items_are_found_before_the_first_question(predictor, data_root, tmp_path):
    task = perbench(data_root, visual_referring.load, "VRES")
    item = replace(task.items[0], item_id="new", prompt_ids=(15,))
    with pytest.raises(DataError, match=r"found <Prompt15>, expected prompts below 15"):
        evaluate(predictor, replace(task, items=[*task.items, item]), tmp_path / "out", protocol={})
    with pytest.raises(DataError, match="twice, expected every item once"):
        evaluate(predictor, replace(task, items=task.items[:1] * 2), tmp_path / "out", protocol={})
    assert not (tmp_path / "out").exists()


def test_items_of_one_image_must_agree_on_its_size(predictor, data_root):
    task = perbench(data_root, region_choice.load, "MCQ")
    wrong = replace(task.items[1], image_hw=(5, 5))
    with pytest.raises(DataError, match="expected one image of one size"):
        answer_image(predictor, task, [task.items[0], wrong])


# ReasonSeg: upright images and ignored pixels.


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_reasonseg_images_are_asked_about_upright(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    (tmp_path / "val").mkdir()
    image.save(tmp_path / "val" / "a.jpg", exif=exif)
    shape = {"label": "target", "points": [[1, 1], [9, 1], [9, 9]]}
    content = {"text": ["the corner"], "is_sentence": False, "shapes": [shape]}
    (tmp_path / "val" / "a.json").write_text(json.dumps(content))
    task = refer_seg.load_reasonseg(root=tmp_path, split="val")
    (request,) = task.requests("standard")
    assert request.text == task.requests("paper")[0].text == task.items[0].text
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "val" / "a.jpg")))
    assert np.array_equal(np.asarray(request.source_image.open("x")), expected)
    assert task.items[0].target["size"] == list(expected.shape[:2])


@pytest.mark.parametrize("orientation", [3, 6])
def test_paper_scores_of_a_turned_image_compare_with_the_target_on_the_stored_one(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "val").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "val" / "a.jpg", exif=exif)
    shape = {"label": "target", "points": [[1, 1], [9, 1], [9, 9], [1, 9]]}
    content = {"text": ["the corner"], "is_sentence": False, "shapes": [shape]}
    (tmp_path / "val" / "a.json").write_text(json.dumps(content))
    (item,) = refer_seg.load_reasonseg(root=tmp_path, split="val").items
    lying = refer_seg.load_reasonseg(root=tmp_path, split="val", upright=False)
    (image,) = [request.source_image for request in lying.requests("standard")]
    assert image.open("x").size == (48, 32) and not image.is_upright
    # The object is found on the upright image; the released target has its points elsewhere.
    assert refer_seg.measure_predictions([item], [_marked(item, item.target)]).scores["ciou"] == 1.0
    assert refer_seg.measure_predictions([item], [_marked(item, item.target)]).scores["paper_ciou"] == 0.0
    # The mask that the released script expects, on the image as stored.
    assert lying.score(lying.items, [_marked(lying.items[0], lying.items[0].target)])["paper_ciou"] > 0.999
    assert refer_seg.measure_predictions([item], [_marked(item, item.released_target)]).scores["paper_ciou"] > 0.999


def _marked(item, mask):
    names = {"ref_id": item.ref_id, "sent_id": item.sent_id, "image_id": item.image_id, "text": item.text}
    return Prediction(**names, segmentation=mask)


def test_an_image_of_another_size_is_rejected_also_upright(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"upright image is \(6, 8\) .*annotations say \(8, 6\)"):
        SourceImage(path=tmp_path / "a.png", size_hw=(8, 6), is_upright=True).open("x")


def test_ignored_pixels_are_neither_target_nor_mistake():
    target, ignored, predicted = (np.zeros((4, 4), dtype=bool) for _ in range(3))
    target[0], ignored[1:3], predicted[:3] = True, True, True
    item = Expression(ref_id=1, sent_id=1, image_id=1, image_path=ROOT, image_hw=(4, 4), text="x",
                      target=encode_mask(target), ignored=encode_mask(ignored))  # fmt: skip
    answer = Prediction(ref_id=1, sent_id=1, image_id=1, text="x", segmentation=encode_mask(predicted))
    task = refer_seg.task_of([item])
    assert task.score([item], [answer])["ciou"] == 1.0
    assert task.score([replace(item, ignored=None)], [answer])["ciou"] == pytest.approx(1 / 3)


def test_training_scores_reasonseg_and_rejects_tasks_of_another_kind(data_root):
    config = load_config("train", TrainConfig, ["name=x"])
    reason = refer_seg.load_reasonseg(root=data_root / "refshapes" / "reason_seg", split="val")
    assert validation_for({"a": reason}, config.predict, config.validation, config.log)
    choices = perbench(data_root, region_choice.load, "MCQ")
    with pytest.raises(ConfigError, match=r"evals\.a: found region choices, but training scores referring"):
        validation_for({"a": choices}, config.predict, config.validation, config.log)


# Scores of known answers.


def test_right_choices_score_one_in_both_protocols(data_root):
    task = perbench(data_root, region_choice.load, "MCQ")
    right = [
        ItemPrediction(item_id=item.item_id, question="", answer=f"<Prompt0>: {item.answer}") for item in task.items
    ]
    assert task.score(task.items, right) == {
        **{"accuracy": 1.0, "paper_accuracy": 1.0, "ambiguous": 0, "unparsed": 0, "count": len(right)}
    }
    letters = [replace(answer, answer=answer.answer.split(".")[0]) for answer in right]
    assert task.score(task.items, letters)["accuracy"] == 1.0
    assert task.score(task.items, letters)["paper_accuracy"] == 0.0


def test_visual_referring_unites_several_targets_and_paper_compares_the_first():
    left, right = (np.zeros((4, 4), dtype=bool) for _ in range(2))
    left[:, 0], right[:, 3] = True, True
    item = VisualReferring(item_id="a", image_path=ROOT, image_hw=(4, 4), question="q", regions=(), prompt_ids=(),
                           answer="", targets=(encode_mask(left), encode_mask(right)))  # fmt: skip
    both = ItemPrediction(item_id="a", question="q", answer="[SEG][SEG]", masks=item.targets[::-1])
    scores = visual_referring._measure([item], [both]).scores
    assert (scores["ciou"], scores["each_giou"], scores["paper_ciou"]) == (1.0, 0.0, 0.0)


@pytest.fixture()
def grounded(data_root):
    folder = data_root / "refshapes"
    task = grounded_caption.load(root=folder / "glamm_data" / "annotations" / "gcg_val_test", split="val",
                                 image_dir=folder / "images" / "train2014", score_text=False)  # fmt: skip
    written = []
    for item in task.items:
        text = item.captions[0]
        for phrase in item.phrases:
            text = text.replace(phrase, f"<p> {phrase} </p> [SEG]", 1)
        written.append(ItemPrediction(item_id=item.image_id, question="", answer=text, masks=item.masks))
    return task, written


def test_the_true_grounded_captions_score_one(grounded):
    task, written = grounded
    scores = task.score(task.items, written)
    names = ["ap50", "miou", "word_recall", "paper_ap50", "paper_miou"]
    assert {name: scores[name] for name in names} == dict.fromkeys(names, pytest.approx(1.0))
    assert (scores["count"], scores["targets"]) == (len(task.items), sum(len(item.masks) for item in task.items))
    wrong = [replace(answer, answer=answer.answer.replace("<p>", "").replace("</p>", "")) for answer in written]
    assert task.score(task.items, wrong)["word_recall"] == 0.0
    assert task.score(task.items, wrong)["miou"] == 1.0
    assert task.score(task.items, [replace(answer, masks=()) for answer in written])["ap50"] == 0.0


def test_captions_are_cleaned_as_each_protocol_does_before_they_are_scored(data_root, monkeypatch):
    seen = {}

    class Summary:
        def summary(self):
            return {"meteor": 0.5, "count": 99}

        def item_means(self):
            return {"meteor": {answer.item_id: 0.5}}

    def score(references, hypotheses, *, protocol, tools):
        seen[protocol] = references, hypotheses
        return Summary()

    monkeypatch.setattr(region_caption, "score_captions", score)
    monkeypatch.setattr(region_caption, "CaptionTools", region_caption.nullcontext)
    task = perbench(data_root, region_caption.load_perbench, "Detailed_Caption")
    items = task.items[:1]
    answer = ItemPrediction(item_id=items[0].item_id, question="", answer="<Prompt0>: a red cup.")
    assert task.score(items, [answer]) == {"meteor": 0.5, "paper_meteor": 0.5, "count": 1}
    assert seen["standard"] == ({answer.item_id: items[0].references}, {answer.item_id: "a red cup."})
    assert seen["paper"][1] == {answer.item_id: ": a red cup."}


def test_perbench_overall_is_there_for_each_protocol_with_all_three_parts():
    results = {
        "perbench_caption": {"meteor": 0.3, "paper_meteor": 0.2},
        "perbench_choice": {"accuracy": 0.9},
        "perbench_visual_referring": {"ciou": 0.5, "giou": 0.7, "paper_ciou": 0.1, "paper_giou": 0.1},
    }
    assert perbench_overall_of(results) == {"overall": pytest.approx(0.6)}
    results["perbench_choice"]["paper_accuracy"] = 1.0
    assert perbench_overall_of(results)["paper_overall"] == pytest.approx(1.3 / 3)
    assert perbench_overall_of({"refcoco_val": {"ciou": 1.0, "giou": 1.0}}) == {}


def test_unknown_protocols_are_rejected(data_root):
    with pytest.raises(ConfigError, match=r"found protocols \['papr'\]"):
        perbench(
            data_root, lambda **files: region_caption.load_perbench(**files, protocols=["papr"]), "Detailed_Caption"
        )
    with pytest.raises(ConfigError, match=r"found protocols \[\]"):
        perbench(data_root, lambda **files: region_choice.load(**files, protocols=[]), "MCQ")


def test_phrases_are_compared_by_an_encoder_whatever_else_is_in_the_batch(processor, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    similarity = EncoderSimilarity(tmp_path)
    matrix = similarity(["a red star", "a box"], ["a box", "a very long phrase about a red star", "a red star"])
    assert matrix.shape == (2, 3)
    assert [matrix[0, 2], matrix[1, 0]] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert matrix[1, 2] < 0.999
    assert EncoderSimilarity(tmp_path)(["a box"], ["a red star"])[0, 0] == pytest.approx(matrix[1, 2], abs=1e-5)
    with pytest.raises(DataError, match=r"found no config\.json"):
        EncoderSimilarity(tmp_path / "absent")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, {"word_recall"}),
        (BERT_BASE_UNCASED | {"hidden_act": "gelu"}, {"recall", "paper_recall"}),
        (BERT_BASE_UNCASED | {"vocab_size": 28996}, {"recall"}),
        ({"model_type": "roberta"}, {"recall"}),
    ],
)
def test_the_released_recall_is_printed_only_where_phrases_are_compared_as_released(
    grounded, tmp_path, monkeypatch, caplog, config, names
):
    task, written = grounded
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(EncoderSimilarity, "__call__", lambda self, *texts: word_overlap(*texts))
    scoring = grounded_caption.Scoring(similarity_model=None if config is None else tmp_path, score_text=False)
    grounded_caption._check(task.items, scoring)
    assert ("there will be no paper_recall" in caplog.text) == ("paper_recall" not in names)
    measured = grounded_caption._measure(task.items, written, scoring=scoring)
    assert {name for name in measured.scores if "recall" in name} == names
    assert {name for name in measured.fractions if "recall" in name} == names


def test_a_damaged_similarity_model_is_rejected_before_the_first_question(grounded, tmp_path):
    (tmp_path / "config.json").write_text("{")
    scoring = grounded_caption.Scoring(similarity_model=tmp_path, score_text=False)
    with pytest.raises(DataError, match=r"config\.json: .*; download it again"):
        grounded_caption._check(grounded[0].items, scoring)
    (tmp_path / "config.json").write_text(json.dumps(BERT_BASE_UNCASED))
    with pytest.raises(DataError, match="expected"):
        grounded_caption._check(grounded[0].items, scoring)


# The file.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"item_id": 3}, "found item_id = 3, expected str"),
        ({"is_retry": 1}, "found is_retry = 1, expected bool"),
        ({"score": 1}, r"unknown fields \['score'\]"),
        ({"masks": [{"size": [2, 2], "counts": "zz"}]}, "mask 0: found RLE counts"),
    ],
)
def test_a_wrong_line_is_an_error_with_its_number(tmp_path, change, reason):
    good = ItemPrediction(item_id="a", question="q", answer="x", masks=(encode_mask(np.ones((2, 2), dtype=bool)),))
    with RecordWriter(tmp_path / "a.jsonl", ITEM_PREDICTIONS) as writer:
        writer.write(good)
    assert read_records(tmp_path / "a.jsonl", ITEM_PREDICTIONS) == [good]
    assert decode_rle(good.masks[0]).all()
    line = json.loads((tmp_path / "a.jsonl").read_text()) | {"item_id": "b"} | change
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}|a\.jsonl:2: {reason}"):
        read_records(tmp_path / "a.jsonl", ITEM_PREDICTIONS)


def test_two_different_answers_to_one_item_are_rejected(tmp_path):
    with RecordWriter(tmp_path / "a.jsonl", ITEM_PREDICTIONS) as writer:
        for text in ("x", "x", "y"):
            writer.write(ItemPrediction(item_id="a", question="q", answer=text))
    with pytest.raises(DataError, match=r"a\.jsonl:3: found a second, different record for item_id a"):
        read_records(tmp_path / "a.jsonl", ITEM_PREDICTIONS)

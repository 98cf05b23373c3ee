"""Batched answers about many images equal those of one question at a time, for every `max_batch_tokens`."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pixel_sail.config import PredictConfig
from pixel_sail.evaluation import predict
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest, span_length
from pixel_sail.model.generation import generate
from pixel_sail.types import VisualPrompt

SIZES = ((40, 64), (64, 40), (40, 64), (64, 64), (41, 63), (40, 64))
QUESTIONS = (("a star", "the red box", "left"), ("b",), ("the small star behind it",), ("c", "d"), ("e",), ("f", "g"))


@pytest.fixture()
def predictor(tiny_model, processor):
    """A random model that often predicts [SEG], which replaces its most likely token."""
    model = tiny_model(seed=5, tie_word_embeddings=False)
    texts = [[processor.question_ids(question) for own in QUESTIONS for question in own]]
    (answers,) = generate(model, None, texts, max_new_tokens=5, end_ids=())
    favourite = Counter(token for answer in answers for token in answer.token_ids).most_common(1)[0][0]
    with torch.no_grad():
        model.lm_head.weight[model.config.token_id("[SEG]")] = 1.01 * model.lm_head.weight[favourite]
    return BatchPredictor(model, processor, PredictConfig(max_new_tokens=5))


@pytest.fixture()
def images():
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def prompts_of(image, index):
    """Return a visual prompt on every second image."""
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[8:24, 8:32] = True
    return (VisualPrompt(prompt_id=index, mask=mask),) if index % 2 else ()


def requests_of(predictor, images):
    return [
        GenerationRequest(image=predictor.prepare(image), prompts=prompts_of(image, index), questions=questions)
        for index, (image, questions) in enumerate(zip(images, QUESTIONS, strict=True))
    ]


def one_at_a_time(predictor, images):
    return [
        [predictor.ask(image, [question], prompts_of(image, index))[0] for question in questions]
        for index, (image, questions) in enumerate(zip(images, QUESTIONS, strict=True))
    ]


def flat(outputs):
    return [output for own in outputs for output in own]


@pytest.mark.parametrize("max_batch_tokens", [1, 90, 200, 16384])
def test_many_images_at_once_get_the_answers_of_one_question_at_a_time(predictor, images, max_batch_tokens):
    alone = one_at_a_time(predictor, images)
    together = predictor.changed(max_batch_tokens=max_batch_tokens).ask_many(requests_of(predictor, images))
    assert [len(own) for own in together] == [len(own) for own in alone]
    assert sum(len(output.masks_NHW) for output in flat(alone)) >= 3, "too few masks to compare"
    assert len({output.answer for output in flat(alone)}) > 5, "answers too alike to show a mix-up"
    for output, expected in zip(flat(together), flat(alone), strict=True):
        assert output.answer == expected.answer
        assert output.masks_NHW.shape == expected.masks_NHW.shape
        # Other batch sizes may round differently, which can flip a pixel at the threshold.
        assert (output.masks_NHW != expected.masks_NHW).sum() <= 2
        assert output.scores == pytest.approx(expected.scores, abs=1e-4)


def test_batches_have_images_of_one_grid_within_max_batch_tokens(predictor, images, monkeypatch):
    batches, encode = [], predict.encode_images

    def counting_images(model, patches_IPK, grid, *rest):
        batches.append([len(patches_IPK) * span_length(grid)])
        return encode(model, patches_IPK, grid, *rest)

    def counting_texts(model, prefixes, texts, **settings):
        longest = max(len(text) for group in texts for text in group) + settings["max_new_tokens"]
        batches[-1] += [len(texts), len(texts) * max(map(len, texts)) * longest]
        return generate(model, prefixes, texts, **settings)

    monkeypatch.setattr(predict, "encode_images", counting_images)
    monkeypatch.setattr(predict, "generate", counting_texts)
    requests = requests_of(predictor, images)
    predictor.ask_many(requests)
    grids = [request.grid_hw for request in requests]
    assert sorted(count for _, count, _ in batches) == sorted(grids.count(grid) for grid in set(grids))
    batches.clear()
    predictor.changed(max_batch_tokens=200).ask_many(requests)
    assert len(batches) > len(set(grids))
    assert all(image_tokens + text_tokens <= 200 for image_tokens, _, text_tokens in batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_resized_and_cut_at_one_half_in_the_precision_of_the_model(predictor, images, monkeypatch, dtype):
    # sigmoid(0.004) is 0.501, which bf16 rounds to 0.5: not above it.
    monkeypatch.setattr(
        predict, "mask_logits", lambda queries, features: torch.full((len(queries), 10, 16), 0.004, dtype=dtype)
    )
    masks = [output.masks_NHW for output in flat(predictor.ask_many(requests_of(predictor, images))) if output.scores]
    assert len(masks) > 0
    assert all(mask.all() if dtype is torch.float32 else not mask.any() for mask in masks)
    resized = predict.resize_logits(torch.randn(2, 5, 6, dtype=dtype), (9, 7))
    assert (resized.dtype, resized.shape) == (dtype, (2, 9, 7))


def test_a_request_without_questions_gets_no_reply_and_text_needs_no_image(predictor, images):
    prepared = predictor.prepare(images[0])
    outputs = predictor.ask_many(
        [
            GenerationRequest(image=prepared, questions=()),
            GenerationRequest(image=None, questions=("a star",)),
            GenerationRequest(image=prepared, questions=("a star",)),
        ]
    )
    assert outputs[0] == []
    assert outputs[1][0].answer == predictor.ask(None, ["a star"])[0].answer != outputs[2][0].answer
    assert outputs[1][0].masks_NHW.shape[1:] == (0, 0)


def test_half_precision_changes_few_answers(tiny_model, processor, images):
    model = tiny_model(seed=5, tie_word_embeddings=False, initializer_range=0.02)
    single = BatchPredictor(model, processor, PredictConfig(answer="forced"))
    expected = flat(single.ask_many(requests_of(single, images)))
    half = BatchPredictor(model.to(torch.bfloat16), processor, PredictConfig(answer="forced"))
    found = flat(half.ask_many(requests_of(half, images)))
    together = flat(one_at_a_time(half, images))
    for output, alone, exact in zip(found, together, expected, strict=True):
        assert output.answer == alone.answer == exact.answer
        changed = (output.masks_NHW != exact.masks_NHW).mean(), (output.masks_NHW != alone.masks_NHW).mean()
        assert max(changed) < 0.1

"""Images are turned into the right patches, texts into the right tokens and labels; inconsistent samples raise an
error."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixel_sail.model.image_layout import image_positions
from pixel_sail.model.patches import (
    PIXEL_MEAN,
    PIXEL_STD,
    covered_patches,
    grid_size,
    image_to_patches,
    normalize_patches,
    resized_size,
)
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor, ProcessorSettings
from pixel_sail.model.tokenization import load_tokenizer, model_token_ids, special_tokens, train_tokenizer
from pixel_sail.types import IGNORE_LABEL, DataError, Sample, Turn, VisualPrompt

TEXTS = (
    "Please segment the lady in blue.",
    "a , b . it 's n't  two  spaces\t\n ",
    "\u00e9 e\u0301 \u6f22\u5b57 \U0001f642 \u200d \u0000 \ufffd \u05d0",
    "no [SEG] here <p>a</p>, <Prompt0>?",
    "",
)


@pytest.mark.parametrize(
    ("image_hw", "resized_hw", "grid_hw"),
    [
        ((427, 640), (432, 640), (27, 40)),
        ((480, 640), (480, 640), (30, 40)),
        ((1080, 1920), (576, 1024), (36, 64)),
        ((640, 427), (640, 432), (40, 27)),
        ((1, 1), (16, 16), (1, 1)),
        ((16, 16), (16, 16), (1, 1)),
        ((17, 17), (32, 32), (2, 2)),
        ((1, 5000), (16, 1024), (1, 64)),
        ((5000, 1), (1024, 16), (64, 1)),
        ((3, 1000), (16, 1008), (1, 63)),
        ((1023, 1024), (1024, 1024), (64, 64)),
        ((100_000, 100_000), (1024, 1024), (64, 64)),
    ],
)
def test_sizes_of_worked_examples_and_of_extreme_shapes(image_hw, resized_hw, grid_hw):
    assert resized_size(image_hw, 16, 1024) == resized_hw
    assert grid_size(image_hw, 16, 1024) == grid_hw


def test_a_longest_side_between_multiples_is_rounded_down():
    assert resized_size((2000, 2000), 32, 1000) == (992, 992)


@pytest.mark.parametrize("image_hw", [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_is_rejected(image_hw):
    with pytest.raises(ValueError, match="at least 1 pixel"):
        resized_size(image_hw, 16, 1024)


def test_a_pixel_lands_in_its_patch_channel_first():
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[9, 18] = (51, 102, 204)  # patch row 1, column 2; within it row 1, column 2
    patches, grid_hw = image_to_patches(Image.fromarray(pixels), 8, 64)
    assert grid_hw == (2, 3)
    values = patches.view(6, 3, 8, 8)
    assert values.nonzero().tolist() == [[5, channel, 1, 2] for channel in range(3)]
    assert values[5, :, 1, 2].tolist() == [51, 102, 204]


def test_normalized_patches_are_those_of_the_release():
    patches = torch.tensor([[0, 51, 102, 255, 7, 8], [1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
    found = normalize_patches(patches)
    assert found.dtype == torch.float32
    for row in range(2):
        for place in range(6):
            channel = place // 2
            expected = (patches[row, place].item() / 255.0 - PIXEL_MEAN[channel]) / PIXEL_STD[channel]
            assert found[row, place].item() == pytest.approx(expected, abs=1e-6)


def test_patches_put_together_give_the_image_back(make_image):
    image = make_image(np.random.default_rng(0), (24, 40))
    patches, (rows, columns) = image_to_patches(image, 8, 64)
    canvas = torch.zeros(24, 40, 3, dtype=torch.uint8)
    for index, patch in enumerate(patches):
        top, left = 8 * (index // columns), 8 * (index % columns)
        canvas[top : top + 8, left : left + 8] = patch.view(3, 8, 8).permute(1, 2, 0)
    assert (rows, columns) == (3, 5)
    np.testing.assert_array_equal(canvas.numpy(), np.asarray(image))


@pytest.mark.parametrize("image_hw", [(1, 1), (5, 7), (100, 3), (7, 500)])
def test_covered_patches_equal_a_loop_over_pixels(image_hw):
    mask = np.random.default_rng(1).random(image_hw) < 0.1
    mask[-1, -1] = True
    grid_hw = grid_size(image_hw, 8, 64)
    expected = np.zeros(grid_hw, dtype=bool)
    for row, column in zip(*np.nonzero(mask), strict=True):
        expected[int((row + 0.5) / image_hw[0] * grid_hw[0]), int((column + 0.5) / image_hw[1] * grid_hw[1])] = True
    np.testing.assert_array_equal(covered_patches(mask, grid_hw), expected)
    assert expected[-1, -1]


@pytest.mark.parametrize("pixel", [(0, 0), (2999, 1999), (1234, 567)])
def test_a_single_pixel_prompt_in_a_huge_image_survives(processor, pixel):
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[pixel] = True
    grid_hw = processor.grid_of(mask.shape)
    painted = processor.paint_prompts((VisualPrompt(prompt_id=4, mask=mask),), grid_hw, "test")
    assert painted[[0, -1]].tolist() == [-1, -1]
    cells = painted[1:-1].view(grid_hw)
    assert (cells == 4).nonzero().tolist() == [[pixel[0] * 8 // 3000, pixel[1] * 6 // 2000]]
    assert int((cells == -1).sum()) == cells.numel() - 1


@pytest.mark.parametrize("small_first", [True, False])
def test_a_small_prompt_over_a_large_one_stays_visible(processor, small_first):
    large, small = np.ones((16, 24), dtype=bool), np.zeros((16, 24), dtype=bool)
    small[0:3, 8:11] = True
    prompts = (VisualPrompt(prompt_id=2, mask=large), VisualPrompt(prompt_id=1, mask=small))
    painted = processor.paint_prompts(prompts[::-1] if small_first else prompts, (2, 3), "test")
    assert painted.tolist() == [-1, 2, 1, 2, 2, 2, 2, -1]


def test_positions_of_the_worked_example():
    pairs = [(0, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (4, 4)]
    assert image_positions((2, 3)).T.tolist() == [list(pair) for pair in pairs]


def test_layout_of_a_sample_with_two_turns(processor, make_sample):
    sample, image = make_sample(np.random.default_rng(0), size_hw=(16, 24), masks_per_turn=(1, 2))
    example = processor.encode_sample(sample, image, independent_turns=False)
    turns = [f"<|im_start|>user\n{t.question}<|im_end|>\n{t.answer}<|endoftext|>" for t in sample.turns]
    text = processor.tokenizer.decode(example.input_ids_T.tolist(), skip_special_tokens=False)
    assert text == "<vision>" + "<vpatch>" * 6 + "</vision>" + "".join(turns)
    assert example.in_image_T.tolist() == [True] * 8 + [False] * (len(example) - 8)
    assert example.branch_ids_T.tolist() == [0] * 8 + [1] * (len(example) - 8)
    assert example.patch_index_T.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1] + [-1] * (len(example) - 8)
    assert example.position_ids_2T[:, 8:].tolist() == [list(range(5, 5 + len(example) - 8))] * 2
    assert len(example.masks) == 3
    assert all(a is b for a, b in zip(example.masks, sample.turns[0].masks + sample.turns[1].masks, strict=True))


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("size_hw", [(16, 24), None])
def test_labels_are_exactly_the_answers_with_their_end_tokens(processor, make_sample, independent, size_hw):
    counts = (1, 0, 2) if size_hw else (0, 0, 0)
    sample, image = make_sample(np.random.default_rng(4), size_hw=size_hw, masks_per_turn=counts)
    example = processor.encode_sample(sample, image, independent_turns=independent)
    kept = example.labels_T != IGNORE_LABEL
    assert torch.equal(example.labels_T[kept], example.input_ids_T[kept])
    text = processor.tokenizer.decode(example.labels_T[kept].tolist(), skip_special_tokens=False)
    assert text == "".join(f"{turn.answer}<|endoftext|>" for turn in sample.turns)


def test_independent_turns_start_at_one_position_in_branches_of_their_own(processor, make_sample):
    sample, image = make_sample(np.random.default_rng(4), size_hw=(16, 24), masks_per_turn=(1, 0, 2))
    example = processor.encode_sample(sample, image, independent_turns=True)
    for branch in (1, 2, 3):
        own = example.branch_ids_T == branch
        assert example.position_ids_2T[:, own].tolist() == [list(range(5, 5 + int(own.sum())))] * 2
    assert example.branch_ids_T.unique_consecutive().tolist() == [0, 1, 2, 3]


def test_text_only_samples_start_at_position_zero(processor, make_sample):
    sample, image = make_sample(np.random.default_rng(4), size_hw=None, masks_per_turn=(0,))
    example = processor.encode_sample(sample, image, independent_turns=False)
    assert example.position_ids_2T.tolist() == [list(range(len(example)))] * 2
    assert example.grid_hw is None
    assert example.patches_PK.shape == (0, 192)
    assert not example.in_image_T.any()


MASK = np.ones((16, 24), dtype=bool)
EMPTY = np.zeros((16, 24), dtype=bool)


def _sample(*turns, prompts=()):
    return Sample(sample_id="toy/7", source="toy", image_path=None, image_hw=(16, 24), turns=turns, prompts=prompts)


@pytest.mark.parametrize(
    ("sample", "with_image", "found", "expected"),
    [
        (_sample(Turn(question="a", answer="[SEG] [SEG]", masks=(MASK,))), True, r"2 \[SEG\]", "1 masks"),
        (_sample(Turn(question="a", answer="no", masks=(MASK,))), True, r"0 \[SEG\]", "1 masks"),
        (_sample(Turn(question="a", answer="[SEG]")), True, r"1 \[SEG\]", "0 masks"),
        (_sample(Turn(question="a", answer="[SEG]")), False, r"1 \[SEG\]", "0 masks"),
        (_sample(Turn(question="the [SEG]", answer="no")), True, r"turn 0 has \[SEG\] in its question", "only answers"),
        (_sample(Turn(question="a", answer="[SEG]", masks=(MASK,))), False, "masks or visual prompts", "no image"),
        (
            _sample(Turn(question="a", answer="b"), prompts=(VisualPrompt(prompt_id=0, mask=MASK),)),
            False,
            "",
            "no image",
        ),
        (
            _sample(Turn(question="a", answer="b"), prompts=(VisualPrompt(prompt_id=15, mask=MASK),)),
            True,
            "15",
            "0 .. 14",
        ),
        (
            _sample(Turn(question="a", answer="b"), prompts=(VisualPrompt(prompt_id=-1, mask=MASK),)),
            True,
            "-1",
            "0 .. 14",
        ),
        (
            _sample(Turn(question="a", answer="b"), prompts=(VisualPrompt(prompt_id=3, mask=EMPTY),)),
            True,
            "<Prompt3>",
            "no pixel",
        ),
        (_sample(), True, "no question", "at least one turn"),
    ],
)
def test_a_sample_that_contradicts_itself_stops_with_its_name_and_both_sides(
    processor, sample, with_image, found, expected
):
    image = Image.new("RGB", (24, 16)) if with_image else None
    with pytest.raises(DataError, match=f"^toy/7: .*{found}.*{expected}"):
        processor.encode_sample(sample, image, independent_turns=False)


def test_the_second_turn_is_named_when_it_is_wrong(processor):
    sample = _sample(Turn(question="a", answer="[SEG]", masks=(MASK,)), Turn(question="b", answer="[SEG]"))
    with pytest.raises(DataError, match=r"toy/7: turn 1 has 1 \[SEG\] in its answer and 0 masks"):
        processor.encode_sample(sample, Image.new("RGB", (24, 16)), independent_turns=True)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_its_tokens(tokenizer, processor, text):
    ids = processor.text_ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_random_unicode_comes_back_from_its_tokens(tokenizer, processor):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x110000, 3000)
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(processor.text_ids(text), skip_special_tokens=False) == text


def test_special_tokens_are_single_pieces_everywhere_in_a_text(tokenizer, processor):
    tokens = special_tokens(15)
    assert len(set(tokens)) == 24
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        assert processor.text_ids(f"x{token}y") == [
            *processor.text_ids("x"),
            vocabulary[token],
            *processor.text_ids("y"),
        ]
    assert model_token_ids(tokenizer, num_visual_prompts=15) == {token: vocabulary[token] for token in tokens}


def test_a_vocabulary_too_small_for_the_bytes_is_rejected():
    with pytest.raises(ValueError, match="vocab_size is 279, expected at least 280"):
        train_tokenizer([], vocab_size=279, num_visual_prompts=15)
    assert len(train_tokenizer([], vocab_size=280, num_visual_prompts=15)) == 280


def test_training_on_text_shortens_it():
    text = "Please segment the red star in this image."
    trained = train_tokenizer([text] * 9, vocab_size=400, num_visual_prompts=0)
    assert len(trained(text)["input_ids"]) <= 9 < len(text)
    assert trained.decode(trained(text)["input_ids"]) == text


def test_a_saved_processor_gives_equal_tokens(processor, make_sample, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = PixelSailProcessor.from_pretrained(tmp_path)
    assert loaded.settings == processor.settings
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    sample, image = make_sample(np.random.default_rng(0), masks_per_turn=(1, 2), prompts=(3,))
    found = loaded.encode_sample(sample, image, independent_turns=True)
    expected = processor.encode_sample(sample, image, independent_turns=True)
    for name, value in vars(expected).items():
        assert (
            torch.equal(vars(found)[name], value)
            if isinstance(value, torch.Tensor)
            else vars(found)[name] is value or (vars(found)[name] == value)
        )
    for text in TEXTS:
        assert loaded.text_ids(text) == processor.text_ids(text)
        assert loaded.decode(processor.text_ids(text)) == processor.decode(processor.text_ids(text))


def test_missing_tokens_are_added_behind_the_known_ones(tmp_path):
    known = train_tokenizer([], vocab_size=300, num_visual_prompts=2)
    known.save_pretrained(tmp_path)
    grown = load_tokenizer(tmp_path, num_visual_prompts=4)
    assert grown.get_vocab() == known.get_vocab() | {"<Prompt2>": len(known), "<Prompt3>": len(known) + 1}
    assert grown("a<Prompt3>", add_special_tokens=False)["input_ids"][-1] == len(known) + 1


def test_a_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere", num_visual_prompts=0)


def test_a_folder_without_processor_settings_is_rejected(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no processor_config\.json"):
        PixelSailProcessor.from_pretrained(tmp_path)


def test_decoded_answers_keep_seg_and_lose_the_end(processor):
    ids = [*processor.text_ids(" It is [SEG]."), processor.end_id]
    assert processor.decode(ids) == "It is [SEG]."


def test_processor_takes_its_settings_from_the_model(tokenizer, make_config):
    config = make_config(patch_size=16, max_long_side=128, num_visual_prompts=3)
    settings = PixelSailProcessor.for_model(tokenizer, config).settings
    assert settings == ProcessorSettings(patch_size=16, max_long_side=128, num_visual_prompts=3)

"""The batch viewer shows the texts, supervised tokens, pixels, masks and prompts of the batch."""

import numpy as np
from PIL import Image
from running import load_tool

from pixel_sail.evaluation.batch_view import patches_to_pixels, view_samples
from pixel_sail.evaluation.sample_image import WIDTH_PX, mask_numbers, render_masks, scale_mask
from pixel_sail.evaluation.stage_view import token_kinds


def test_images_mark_every_mask_and_prompt_however_small():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    mask = np.zeros((900, 1200), bool)
    mask[700, 801] = True
    plain = render_masks(image, [], {})
    assert plain.shape == (360, WIDTH_PX, 3)
    assert (render_masks(image, [mask], {}) != plain).any() and (render_masks(image, [], {4: mask}) != plain).any()
    assert scale_mask(mask, (360, 480)).sum() == 1
    assert scale_mask(mask[:6, :8] | True, (12, 16)).sum() == 12 * 16
    assert mask_numbers([mask, ~mask, mask]) == [0, 1, 0]


def test_the_first_batch_is_shown_as_text_and_images(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    arguments = ["experiment=quickstart", "data.micro_batch_size=4", f"out={tmp_path / 'view'}"]
    assert load_tool("show_batch").main(arguments) == 0
    text = (tmp_path / "view" / "batch.txt").read_text()
    page = (tmp_path / "view" / "index.html").read_text()
    assert "4 rows of" in capsys.readouterr().out
    num_questions = text.count("<|im_start|>user\n")
    assert (
        text.count(">>[SEG].<|endoftext|><<") == page.count("<mark>[SEG].&lt;|endoftext|&gt;</mark>") == num_questions
    )
    assert num_questions > 20 and "patches]<|im_start|>" in text
    names = sorted(path.name for path in (tmp_path / "view").glob("sample_*.png"))
    assert len(names) == text.count("patches]") == 4 and all(f'src="{name}"' in page for name in names)
    assert np.asarray(Image.open(tmp_path / "view" / names[0])).std() > 10
    figure = np.asarray(Image.open(tmp_path / "view" / "stages.png").convert("RGB"))
    assert figure.shape[1] == 1210 and (figure == (0x41, 0xAB, 0x5D)).all(-1).sum() > 1000


def test_a_tokenizer_that_is_not_there_or_empty_ends_with_one_message(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        arguments = ["experiment=quickstart", f"model.tokenizer={folder}", f"out={tmp_path / 'view'}"]
        assert load_tool("show_batch").main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"ConfigError: model.tokenizer={folder}: ") and printed.out == ""
    assert not (tmp_path / "view").exists()


def test_help_is_the_words_at_the_top_and_every_setting(capsys):
    assert load_tool("show_batch").main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: show_batch.py KEY=VALUE ...") and "out=FOLDER" in printed
    assert "data.global_batch_size" in printed and "optim.lr" in printed


def test_a_shown_batch_has_the_pixels_and_prompts_of_its_samples(processor, make_batch, make_sample, tmp_path):
    rng = np.random.default_rng(1)
    sample, image = make_sample(rng, size_hw=(16, 24), masks_per_turn=(2, 0), prompts=(2,))
    text_only, _ = make_sample(rng, size_hw=None, masks_per_turn=(0,), sample_id="words")
    batch = make_batch(
        [processor.encode_sample(sample, image, independent_turns=True),
         processor.encode_sample(text_only, None, independent_turns=True)]
    )  # fmt: skip
    np.testing.assert_array_equal(patches_to_pixels(batch.patches_SK, batch.grids[0]), np.asarray(image))
    first, second = view_samples(batch, processor)
    assert first.runs[0].text == "[image 2 x 3 patches, painted <Prompt2>]"
    assert [run.branch for run in first.runs] == [0, 1, 1, 2, 2]
    assert [run.text for run in first.runs if run.is_supervised] == [
        "here [SEG] and here [SEG]<|endoftext|>",
        "no<|endoftext|>",
    ]
    assert (second.image, second.first) == (None, sum(run.num_tokens for run in first.runs))
    kinds = token_kinds(batch)
    assert (kinds == 3).sum() == len(batch.targets_M) and (kinds == 1).sum() == 2 * 3 + 2
    assert ((kinds == 0) == (batch.sample_index_BT < 0).numpy()).all()

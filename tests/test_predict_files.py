"""Questions about image files: every image of a folder gets separate results, and no image is overwritten."""

import json
import unicodedata

import pytest
from PIL import Image
from test_predict import predictor as batch  # noqa: F401, a fixture

from pixel_sail import predict_files as module
from pixel_sail.config import ConfigError, PredictCommandConfig, PredictConfig
from pixel_sail.predict_files import predict_files
from pixel_sail.types import DataError

COLOURS = {"a.png": "red", "b.jpg": "blue", "b.png": "green"}


@pytest.fixture
def images(tmp_path, batch):  # noqa: F811
    batch.model.save_pretrained(tmp_path / "model")
    batch.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 48), colour).save(tmp_path / "images" / name)
    return tmp_path / "images"


def ask(images, image, output):
    forced = PredictConfig(answer="forced")
    config = PredictCommandConfig(
        checkpoint=str(images.parent / "model"), image=str(image), question="a", output=str(output), predict=forced
    )
    return list(predict_files(config))


def test_mac_metadata_files_are_ignored_and_unicode_forms_of_names_may_differ(tmp_path):
    for name in ("a.png", "._a.png", ".b.png", unicodedata.normalize("NFD", "\u00e9.png")):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    stored = tmp_path / unicodedata.normalize("NFD", "\u00e9.png")
    assert module.image_files(tmp_path) == [tmp_path / "a.png", stored]
    assert module.image_files(tmp_path / "\u00e9.png") == [stored]


def test_images_that_differ_in_their_ending_have_results_of_their_own(images, tmp_path):
    results = dict(ask(images, images, tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"a.json", "a.png", "b.jpg.json", "b.jpg.png", "b.png.json", "b.png.png"}
    for name in ("b.jpg", "b.png"):
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["image"] == name and record["masks"] == list(results[images / name].rles)


def test_results_never_replace_an_image(images, monkeypatch):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    # Reported before the model is loaded.
    monkeypatch.setattr(module, "Predictor", None)
    for image in (images, images / "a.png"):
        with pytest.raises(ConfigError, match=r"a\.png is one of the images; give another folder"):
            ask(images, image, images.parent / "images" / ".." / "images")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        ask(images, images, images / "a.png")
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_a_broken_image_of_a_folder_does_not_block_others(images, tmp_path):
    (images / "aa.jpg").write_bytes(b"no image")
    results = dict(ask(images, images, tmp_path / "out"))
    assert isinstance(results.pop(images / "aa.jpg"), DataError)
    assert len(results) == 3 and all(result.answer == "It is [SEG]." for result in results.values())
    with pytest.raises(DataError, match="cannot be decoded"):
        ask(images, images / "aa.jpg", tmp_path / "out")

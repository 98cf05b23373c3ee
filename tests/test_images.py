"""Image files of every kind become upright 8-bit RGB, and damaged or foreign ones stop with their name."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pixel_sail.data.images import load_image
from pixel_sail.types import DataError

ORIENTATION, DESCRIPTION = 0x0112, 0x010E


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def _load(path, expected_hw=None):
    return np.asarray(load_image(path, where="toy/7", expected_hw=expected_hw))


def test_an_rgb_image_keeps_its_pixels(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_load(tmp_path / "a.png", (6, 9)), pixels)
    assert load_image(str(tmp_path / "a.png"), where="test").mode == "RGB"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^toy/7: .*nowhere\.jpg: no such image file"):
        _load(tmp_path / "nowhere.jpg")


def _truncated(tmp_path, pixels, image_format):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(pixels, (20, 20, 1))).save(buffer, image_format)
    (tmp_path / "bad").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_refused(tmp_path, pixels, image_format):
    _truncated(tmp_path, pixels, image_format)
    with pytest.raises(DataError, match=r"^toy/7: .*bad: cannot be decoded \(.+\); replace the file"):
        _load(tmp_path / "bad")


@pytest.mark.parametrize("content", [b"", b"404: Not Found", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"^toy/7: .*bad\.jpg: cannot be decoded"):
        _load(tmp_path / "bad.jpg")


def test_a_folder_in_place_of_an_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be decoded"):
        _load(tmp_path)


@pytest.mark.parametrize("expected_hw", [(9, 6), (6, 10), (12, 18)])
def test_a_size_the_annotations_do_not_state_is_refused_with_both_sizes(tmp_path, pixels, expected_hw):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    height, width = expected_hw
    message = rf"image is \(6, 9\) \(height, width\), annotations say \({height}, {width}\)"
    with pytest.raises(DataError, match=rf"^toy/7: .*a\.png: {message}"):
        _load(tmp_path / "a.png", expected_hw)


def test_grayscale_is_repeated_over_channels(tmp_path, pixels):
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_load(tmp_path / "a.png"), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    values = np.array([[0, 256, 32768], [65535, 40000, 128]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    found = _load(tmp_path / name)
    expected = values / 65535.0 * 255.0
    assert np.abs(found - expected[..., None]).max() <= 1.0
    assert found[1, 0].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    cmyk.save(tmp_path / "a.jpg", quality=95)
    found = _load(tmp_path / "a.jpg", (8, 16)).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(found, [255, 0, 0], atol=6)


def test_palette_bilevel_and_transparent_images_become_rgb(tmp_path, pixels):
    flat = np.where(pixels[..., :1] > 127, np.uint8(255), np.uint8(0))
    black_and_white = np.repeat(flat, 3, axis=2)
    Image.fromarray(black_and_white).quantize(2).save(tmp_path / "palette.png")
    Image.fromarray(flat[..., 0]).convert("1").save(tmp_path / "bilevel.png")
    opaque = np.concatenate((black_and_white, np.full((6, 9, 1), 255, dtype=np.uint8)), axis=2)
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    for name in ("palette.png", "bilevel.png", "rgba.png"):
        np.testing.assert_array_equal(_load(tmp_path / name), black_and_white)


def _save_rotated(path, pixels, orientation, description=None):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if description is not None:
        exif[DESCRIPTION] = description
    Image.fromarray(pixels).save(path, exif=exif)


UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_without_a_stated_size_is_turned_upright(tmp_path, pixels, orientation):
    _save_rotated(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(_load(tmp_path / "a.png"), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_whose_stored_size_is_annotated_stays_as_stored(tmp_path, pixels, orientation):
    _save_rotated(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(_load(tmp_path / "a.png", (6, 9)), pixels)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_whose_upright_size_is_annotated_is_turned(tmp_path, pixels, orientation):
    _save_rotated(tmp_path / "a.png", pixels, orientation)
    np.testing.assert_array_equal(_load(tmp_path / "a.png", (9, 6)), UPRIGHT[orientation](pixels))


def test_a_damaged_tag_beside_the_orientation_does_not_stop_an_image(tmp_path, pixels):
    _save_rotated(tmp_path / "a.png", pixels, 6, description="abcdefgh")
    content = (tmp_path / "a.png").read_bytes()
    text_tag, number_tag = b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02"  # a description, and a width written as text
    start = content.index(b"eXIf")
    length = int.from_bytes(content[start - 4 : start])
    chunk = content[start : start + 4 + length].replace(text_tag, number_tag)
    checksum = zlib.crc32(chunk).to_bytes(4)
    (tmp_path / "a.png").write_bytes(content[:start] + chunk + checksum + content[start + 8 + length :])
    np.testing.assert_array_equal(_load(tmp_path / "a.png"), UPRIGHT[6](pixels))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"^toy/7: .*a\.png: cannot be decoded \(.*54 pixels"):
        _load(tmp_path / "a.png")


def test_the_file_is_closed_and_the_image_usable_afterwards(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", where="test", expected_hw=(6, 9))
    (tmp_path / "a.png").unlink()
    np.testing.assert_array_equal(np.asarray(image), pixels)

"""Image files of every kind are decoded to upright 8-bit RGB; damaged or unsupported ones raise an error with their
path."""

import io
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from pixel_sail.data.image_sizes import stored_hw
from pixel_sail.data.images import existing_file, find_image, image_file, load_image
from pixel_sail.data.remarks import collect_remarks
from pixel_sail.model.patches import grid_size, image_to_patches
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
def test_a_truncated_image_is_rejected(tmp_path, pixels, image_format):
    _truncated(tmp_path, pixels, image_format)
    with pytest.raises(DataError, match=r"^toy/7: .*bad: cannot be decoded \(.+\); replace the file"):
        _load(tmp_path / "bad")


@pytest.mark.parametrize("content", [b"", b"404: Not Found", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_rejected(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"^toy/7: .*bad\.jpg: cannot be decoded"):
        _load(tmp_path / "bad.jpg")


def test_a_folder_in_place_of_an_image_is_rejected(tmp_path):
    with pytest.raises(DataError, match="cannot be decoded"):
        _load(tmp_path)


@pytest.mark.parametrize("expected_hw", [(9, 6), (6, 10), (12, 18)])
def test_a_size_the_annotations_do_not_state_is_rejected_with_both_sizes(tmp_path, pixels, expected_hw):
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


def _rgba(*pixels):
    return Image.fromarray(np.array([pixels], dtype=np.uint8))


def test_transparent_pixels_show_a_white_page(tmp_path):
    _rgba((9, 9, 9, 0), (200, 0, 0, 255), (0, 0, 0, 128)).save(tmp_path / "rgba.png")
    assert _load(tmp_path / "rgba.png").tolist() == [[[255] * 3, [200, 0, 0], [127] * 3]]
    Image.fromarray(np.array([[[9, 0], [40, 255], [0, 128]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
    assert _load(tmp_path / "la.png").tolist() == [[[255] * 3, [40] * 3, [127] * 3]]
    _rgba((9, 9, 9, 0), (200, 0, 0, 255), (0, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True, exact=True)
    assert _load(tmp_path / "a.webp").tolist() == [[[255] * 3, [200, 0, 0], [127] * 3]]


def _palette_image():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize(
    ("name", "transparency", "expected"),
    [
        ("one.png", 1, [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        ("one.gif", 1, [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        ("shades.png", bytes([255, 255, 128]), [[255, 0, 0], [0, 255, 0], [127, 127, 255]]),
    ],
)
def test_transparent_colours_of_a_palette_show_a_white_page(tmp_path, name, transparency, expected):
    _palette_image().save(tmp_path / name, transparency=transparency)
    assert _load(tmp_path / name).tolist() == [expected]


@pytest.mark.parametrize(
    ("pixels", "transparency", "expected"),
    [
        (np.array([[0, 7, 255]], dtype=np.uint8), 7, [0, 255, 255]),
        (np.array([[0, 7, 65535]], dtype=np.uint16), 7, [0, 255, 255]),
    ],
)
def test_the_grey_level_a_file_calls_transparent_shows_a_white_page(tmp_path, pixels, transparency, expected):
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=transparency)
    assert _load(tmp_path / "a.png")[0].tolist() == [[value] * 3 for value in expected]


def test_the_colour_a_file_calls_transparent_shows_a_white_page(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint8))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert _load(tmp_path / "a.png").tolist() == [[[255] * 3, [1, 2, 4]]]


def test_a_turned_image_stays_transparent_where_it_was(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    _rgba((9, 9, 9, 0), (200, 0, 0, 255)).save(tmp_path / "a.png", exif=exif)
    assert _load(tmp_path / "a.png").tolist() == [[[255] * 3], [[200, 0, 0]]]


def test_cmyk_inks_become_the_colours_they_print(tmp_path):
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255)}
    for number, (cmyk, rgb) in enumerate(inks.items()):
        Image.new("CMYK", (4, 4), cmyk).save(tmp_path / f"{number}.tif")
        np.testing.assert_array_equal(_load(tmp_path / f"{number}.tif"), np.tile(np.uint8(rgb), (4, 4, 1)))


@pytest.mark.parametrize("values", [np.float32([[0.0, 0.5]]), np.int32([[0, 70_000]]), np.int32([[-1, 5]])])
def test_values_without_a_known_range_are_rejected(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"^toy/7: .*a\.tif: found pixel values .*, expected whole numbers 0 \.\. 65535"
    ):
        _load(tmp_path / "a.tif")


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 500), (500, 1), (1, 3000)])
def test_sides_of_one_pixel_pass_through_to_patches(tmp_path, size_hw):
    image = Image.fromarray(np.full((*size_hw, 3), 77, dtype=np.uint8))
    image.save(tmp_path / "a.png")
    opened = load_image(tmp_path / "a.png", where="toy/7", expected_hw=size_hw)
    patches, grid_hw = image_to_patches(opened, 16, 1024)
    assert grid_hw == grid_size(size_hw, 16, 1024)
    assert patches.shape == (grid_hw[0] * grid_hw[1], 3 * 16 * 16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_altered_bytes_end_in_an_image_or_in_the_named_error(tmp_path, pixels):
    """Every format, bytes changed at random: nothing but a DataError may come out."""
    buffers = []
    for image_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(np.tile(pixels, (3, 3, 1))).save(buffer, image_format)
        buffers.append(buffer.getvalue())
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(300):
        content = bytearray(buffers[number % len(buffers)])
        for place in rng.integers(0, min(len(content), 100), size=3):
            content[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        try:
            assert load_image(tmp_path / "a", where="toy/7").mode == "RGB"
        except DataError as error:
            assert str(error).startswith(f"toy/7: {tmp_path / 'a'}: ")
            refused += 1
    assert 50 < refused < 300


@pytest.mark.parametrize("error", [RuntimeError("Invalid size"), NotImplementedError("DDS"), MemoryError()])
def test_whatever_a_decoder_raises_names_the_file_and_the_sample(tmp_path, monkeypatch, pixels, error):
    # AVIF, DDS and JPEG 2000 raise these for damaged files; not every Pillow is built with all three.
    def fails(self):
        raise error

    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    with pytest.raises(DataError, match=rf"sample 1: .*a\.png: cannot be decoded \({str(error) or 'MemoryError'}\)"):
        load_image(tmp_path / "a.png", where="sample 1")


@pytest.mark.parametrize("image_format", ["AVIF", "DDS", "JPEG2000"])
def test_damaged_files_of_rare_formats_are_rejected(tmp_path, pixels, image_format):
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, image_format)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write {image_format}: {error}")
    content, generator, refused = buffer.getvalue(), np.random.default_rng(0), 0
    for _ in range(60):
        altered = bytearray(content)
        for place in generator.integers(min(len(altered), 200), size=4):
            altered[place] = generator.integers(256)
        (tmp_path / "a.jpg").write_bytes(altered)
        try:
            load_image(tmp_path / "a.jpg", where="sample 1")
        except DataError as error:
            refused += 1
            assert "a.jpg: cannot be decoded (" in str(error)
    assert refused > 5


def remarked(path):
    with collect_remarks() as heard:
        load_image(path, where="image")
    return [(remark.topic, remark.message.partition(";")[0]) for remark in heard]


@pytest.mark.parametrize(
    ("largest", "is_dark"), [(4095, True), (16383, True), (16384, False), (65535, False), (0, False)]
)
def test_levels_of_twelve_bits_in_a_file_of_sixteen_are_remarked(tmp_path, largest, is_dark):
    levels = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        expected = f"the largest level is about {largest} of 65535, so the image is nearly black"
        assert remarked(tmp_path / name) == ([("dark 16-bit image", expected)] if is_dark else [])


def test_sixteen_bit_colours_of_twelve_bits_are_remarked(tmp_path):
    # A PNG of 16-bit colors by hand, as Pillow writes none.
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for largest, is_dark in ((4095, True), (65535, False)):
        row = b"\0" + np.full(3 * 4, largest, dtype=">u2").tobytes()
        header = (4).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
        png = (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
        )
        (tmp_path / "a.png").write_bytes(png)
        assert bool(remarked(tmp_path / "a.png")) is is_dark


def test_a_dark_8_bit_image_is_not_reported(tmp_path):
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png")
    assert remarked(tmp_path / "a.png") == []


@pytest.mark.parametrize(("stored", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_the_other_unicode_form_and_remarked(tmp_path, pixels, stored, asked):
    name = "caf\u00e9/\u00fcber \uac00.png"
    path = tmp_path / unicodedata.normalize(stored, name)
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    wanted = unicodedata.normalize(asked, name)
    assert str(tmp_path / wanted) != str(path)
    with collect_remarks() as heard:
        assert find_image([tmp_path / "absent", tmp_path], wanted) == image_file(tmp_path, wanted) == path
        np.testing.assert_array_equal(_load(tmp_path / wanted), pixels)
        assert stored_hw(tmp_path / wanted, "w") == pixels.shape[:2]
    assert {remark.topic for remark in heard} == {"Unicode form of a file name"}


def test_the_exact_unicode_form_goes_first_and_an_absent_name_stays(tmp_path, pixels):
    for form in ("NFC", "NFD"):
        Image.fromarray(pixels).save(tmp_path / unicodedata.normalize(form, "\u00e9.png"))
    for form in ("NFC", "NFD"):
        exact = tmp_path / unicodedata.normalize(form, "\u00e9.png")
        assert existing_file(exact) == exact
    assert existing_file(tmp_path / "\u00e8.png") == tmp_path / "\u00e8.png"
    assert existing_file(tmp_path / ("\u00e9" * 300)).name == "\u00e9" * 300


def test_a_name_that_is_too_long_is_a_missing_image(tmp_path):
    path = find_image([tmp_path], "x" * 5000)
    with pytest.raises(DataError, match="sample 1") as caught:
        load_image(path, where="sample 1")
    assert len(str(caught.value)) < 4100


def test_an_image_is_looked_for_in_all_folders_under_both_coco_names(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "a.jpg").touch()
    (folders[1] / "000000000009.jpg").touch()
    (folders[1] / "000000000007.jpg").touch()
    (folders[0] / "COCO_train2014_000000000007.jpg").touch()
    assert find_image(folders, "a.jpg") == folders[1] / "a.jpg"
    assert find_image(folders, "COCO_train2014_000000000009.jpg") == folders[1] / "000000000009.jpg"
    assert find_image(folders, "COCO_train2014_000000000007.jpg").parent == folders[0]
    assert find_image(folders, "nowhere.jpg") == folders[0] / "nowhere.jpg"


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


def test_a_decompression_bomb_is_rejected(tmp_path, monkeypatch, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"^toy/7: .*a\.png: cannot be decoded \(.*54 pixels"):
        _load(tmp_path / "a.png")


def test_the_file_is_closed_and_the_image_usable_afterwards(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", where="test", expected_hw=(6, 9))
    (tmp_path / "a.png").unlink()
    np.testing.assert_array_equal(np.asarray(image), pixels)

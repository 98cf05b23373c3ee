"""The demo in a real browser: load an image, mark regions, ask, view and save masks, and see errors.

Chromium comes from the system's packages (`apt-get install chromium`); PIXEL_SAIL_CHROMIUM names one elsewhere.
"""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving import served
from test_demo import Gate
from test_predict import predictor as batch  # noqa: F401, a fixture

from pixel_sail import Box, Point, Predictor
from pixel_sail.config import DemoLimits
from pixel_sail.demo.api import read_regions
from pixel_sail.demo.examples import render_examples
from pixel_sail.rle import encode_mask

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("PIXEL_SAIL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
LIMITS = DemoLimits(upload_mb=1.0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser here: none of {', '.join(NAMES)} is installed"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def predictor(batch):  # noqa: F811
    return Predictor(batch.changed(answer="forced"))


@pytest.fixture
def address(predictor):
    with served(predictor, limits=LIMITS, examples=render_examples(2, "standard")) as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    """Return a function that opens the page as a new user; console errors fail the test."""
    contexts, faults = [], []

    def open_page(width=1280, height=800):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        # The browser also reports every rejected request, which tests of rejections expect.
        page.on("console", lambda said: faults.append(said.text) if "status of 4" not in said.text else None)
        page.goto(address)
        expect(page.locator("#examples button")).to_have_count(2)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def image_file(tmp_path):
    """Return a small image as a file, with its pixels."""
    coarse = Image.fromarray(np.random.default_rng(4).integers(0, 256, (5, 8, 3), dtype=np.uint8))
    image = coarse.resize((64, 40), Image.Resampling.BICUBIC)
    image.save(tmp_path / "my image.png")
    return tmp_path / "my image.png", image


def load(page, path):
    page.set_input_files("#file", path)
    expect(page.locator("#ask")).to_be_enabled()


def ask(page, text):
    before = page.locator(".timing").count()
    page.fill("#text", text)
    page.click("#ask")
    expect(page.locator(".timing")).to_have_count(before + 1)


def drag(page, start, end, size_hw=(40, 64)):
    """Drag from one position of the image to another."""
    places = [on_screen(page, place, size_hw) for place in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=6)
    page.mouse.up()


def on_screen(page, place, size_hw):
    box = page.locator("#canvas").bounding_box()
    return box["x"] + place[0] * box["width"] / size_hw[1], box["y"] + place[1] * box["height"] / size_hw[0]


def shown_pixels(page):
    """Return the pixels of the canvas, shrunk to the image's size."""
    shot = Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
    return np.asarray(shot.resize((64, 40), Image.Resampling.BOX), dtype=np.float32)


def saved(page, name):
    with page.expect_download() as download:
        page.get_by_role("button", name=name).last.click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_load_mark_ask_see_and_save(open_page, predictor, image_file):
    page, (path, image) = open_page(), image_file
    load(page, path)
    expect(page.locator("#model")).to_have_text("test")
    before = shown_pixels(page)
    assert np.abs(before - np.asarray(image)).mean() < 8
    drag(page, (4, 5), (40, 30))
    page.click("[data-tool=point]")
    page.mouse.click(*on_screen(page, (52, 10), (40, 64)))
    page.click("[data-tool=brush]")
    drag(page, (10, 35), (50, 36))
    expect(page.locator("#names button")).to_have_text(["<Prompt0>", "<Prompt1>", "<Prompt2>"])
    page.fill("#text", "What is")
    page.locator("#names button").nth(1).click()
    assert page.input_value("#text") == "What is <Prompt1>"

    with page.expect_request("**/api/ask") as request:
        page.keyboard.press("Enter")
        expect(page.locator(".timing")).to_have_count(1)
    sent = json.loads(request.value.post_data)
    assert sent["text"] == "What is <Prompt1>"
    kinds = [next(iter(region)) for region in sent["regions"]]
    assert kinds == ["box", "point", "png"]
    np.testing.assert_allclose(sent["regions"][0]["box"], [4, 5, 40, 30], atol=0.3)
    np.testing.assert_allclose(sent["regions"][1]["point"], [52, 10], atol=0.3)

    # The shown and saved masks equal the Predictor's for the same marks.
    regions = read_regions(sent["regions"], (40, 64), 15, LIMITS)
    assert isinstance(regions[0], Box) and isinstance(regions[1], Point)
    assert regions[2][35, 11:50].all() and not regions[2][:30].any()
    expected = predictor.ask(image, sent["text"], regions)
    (mask,) = expected.masks_NHW
    name, content = saved(page, "Save mask as PNG")
    assert name == "my image_1_1.png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content)).convert("1")), mask)
    name, content = saved(page, "Save mask as RLE")
    assert name == "my image_1_1.json" and json.loads(content) == encode_mask(mask)

    # The mask is shown in its color, and can be hidden.
    with_mask = shown_pixels(page)
    page.locator(".masks input").uncheck()
    without = shown_pixels(page)
    changed = np.abs(with_mask - without).sum(axis=2) > 30
    assert 0 < mask.sum() < mask.size and (changed == mask).mean() > 0.97


def test_history_of_one_image(open_page, image_file):
    page, (path, _) = open_page(), image_file
    load(page, path)
    ask(page, "the star")
    ask(page, "the box")
    assert "image kept" in page.locator(".timing").nth(1).inner_text()
    assert "image kept" not in page.locator(".timing").nth(0).inner_text()
    # Only the newest mask is shown, the older one can be shown again.
    boxes = page.locator(".masks input")
    expect(boxes.nth(0)).not_to_be_checked()
    expect(boxes.nth(1)).to_be_checked()
    one = shown_pixels(page)
    boxes.nth(0).check()
    assert np.abs(shown_pixels(page) - one).max() > 30
    expect(page.locator(".break")).to_have_count(0)
    # Adding a mark continues the conversation; removing one starts another.
    drag(page, (4, 5), (40, 30))
    ask(page, "what is <Prompt0>")
    page.click("#undo")
    ask(page, "the star")
    expect(page.locator(".break")).to_have_count(1)
    page.click("#restart")
    expect(page.locator("#history li")).to_have_count(0)
    ask(page, "the star")
    assert "image kept" not in page.locator(".timing").inner_text()


def test_an_example_is_loaded_with_its_question(open_page):
    page = open_page()
    page.locator("#examples button").first.click()
    expect(page.locator("#ask")).to_be_enabled()
    text = page.locator("#examples button span").first.inner_text()
    assert page.input_value("#text") == text
    page.click("#ask")
    expect(page.locator(".question")).to_have_text(text)
    expect(page.locator(".answer")).to_have_text("It is.")


def test_a_wrong_file_is_rejected_with_a_clear_message(open_page, image_file, tmp_path):
    page, (path, _) = open_page(), image_file
    error = page.locator("#error")
    for name, content, message in (
        ("notes.txt", b"no image at all", "not a readable image"),
        ("cut.png", path.read_bytes()[:1500], "damaged"),
        ("empty.jpg", b"", "empty"),
        ("large.jpg", b"\0" * 1_100_000, "more than 1 MB"),
    ):
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#file", tmp_path / name)
        expect(error).to_contain_text(message)
        expect(page.locator("#ask")).to_be_disabled()
    load(page, path)
    expect(error).to_be_hidden()
    # The loaded image stays if the next file is rejected, and so does a rejected question.
    page.set_input_files("#file", tmp_path / "notes.txt")
    expect(error).to_contain_text("not a readable image")
    page.fill("#text", "What is <Prompt5>?")
    page.click("#ask")
    expect(error).to_contain_text("<Prompt5> found")
    assert page.input_value("#text") == "What is <Prompt5>?"
    expect(page.locator("#history li")).to_have_count(0)
    ask(page, "the star")


def test_script_in_a_text_or_a_name_is_only_text(open_page, image_file, tmp_path):
    page, (path, _) = open_page(), image_file
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    named = tmp_path / "<img src=x onerror=alert(1)>.png"
    shutil.copyfile(path, named)
    load(page, named)
    ask(page, hostile)
    expect(page.locator(".question")).to_have_text(hostile)
    assert page.locator("#history img, #history script").count() == 0 and dialogs == []
    name, _ = saved(page, "Save mask as PNG")
    assert name.endswith("_1_1.png") and "/" not in name


def test_two_users_at_once(open_page, image_file, tmp_path):
    path, image = image_file
    other_path = tmp_path / "other.png"
    Image.fromarray(255 - np.asarray(image)).save(other_path)
    pages = [open_page(), open_page()]
    for page, own in zip(pages, (path, other_path), strict=True):
        load(page, own)
    for text in ("the star", "the box"):
        for page in pages:
            page.fill("#text", text)
        for page in pages:
            page.click("#ask")
        for page in pages:
            expect(page.locator(".question").last).to_have_text(text)
    for page in pages:
        expect(page.locator(".timing")).to_have_count(2)
    first, second = (saved(page, "Save mask as RLE")[1] for page in pages)
    assert first != second


def test_an_answer_can_be_stopped(open_page, image_file, monkeypatch):
    page, (path, _) = open_page(), image_file
    load(page, path)
    gate = Gate(monkeypatch)
    page.fill("#text", "the star")
    page.click("#ask")
    expect(page.locator("#ask")).to_have_text("Stop")
    gate.pieces.release(2)
    expect(page.locator(".answer")).to_have_text("0 1 ")
    page.click("#ask")
    expect(page.locator("#ask")).to_have_text("Ask")
    assert page.input_value("#text") == "the star"
    expect(page.locator("#history li")).to_have_count(0)
    expect(page.locator("#error")).to_be_hidden()
    for _ in range(100):
        gate.pieces.release(1)
        if gate.ended.wait(0.05):
            break
    assert gate.ended.is_set()


def test_the_page_fits_a_narrow_screen(open_page, image_file):
    page, (path, _) = open_page(width=360, height=700), image_file
    load(page, path)
    drag(page, (4, 5), (40, 30))
    ask(page, "a-question-of-one-very-long-word-" * 4)
    viewport = page.viewport_size["width"]
    assert page.locator("body").evaluate("body => body.scrollWidth") <= viewport
    for name in ("#canvas", "#tools", "#text", "#ask", ".masks"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport, name
    # The number of a mark is as large as elsewhere.
    x, y = on_screen(page, (4, 5), (40, 64))
    page.screenshot(path=image_file[0].with_name("page.png"))
    shot = Image.open(image_file[0].with_name("page.png")).convert("RGB")
    assert all(max(shot.getpixel((round(x + dx), round(y)))) < 40 for dx in (-8, 8))
    for button in page.locator("#tools button:visible, #ask, #restart").all():
        assert button.bounding_box()["height"] >= 36


def test_the_keyboard_sees_where_an_image_is_chosen(open_page, image_file):
    page, (path, _) = open_page(), image_file
    for _ in range(2):
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "file":
                break
        assert page.evaluate("document.activeElement.id") == "file"
        assert page.locator("#stage").evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
        # The same with an image in the way.
        load(page, path)
        page.focus("#text")


def test_the_page_shows_a_lost_connection(browser, predictor, image_file):
    path, _ = image_file
    with browser.new_context() as context:
        page = context.new_page()
        with served(predictor) as address:
            page.goto(address)
            load(page, path)
        page.fill("#text", "the star")
        page.click("#ask")
        expect(page.locator("#error")).to_contain_text("does not answer")
        assert page.input_value("#text") == "the star"

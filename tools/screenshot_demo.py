"""Make the screenshot of the demo for the documentation, with a real browser.

Connects to a running `scripts/demo.py` with the Chromium of the system's packages.

    python scripts/demo.py checkpoint=runs/quickstart predict.prompt=short predict.max_new_tokens=16 &
    python tools/screenshot_demo.py --example 3 --text "pink cross" --out docs/demo.jpg
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

VIEW = {"width": 1120, "height": 640}


def mark_and_ask(page: Page, example: int, texts: list[str]) -> None:
    """Load an example, ask its question and the others, and show all masks."""
    page.locator("#examples button").nth(example).click()
    expect(page.locator("#ask")).to_be_enabled()
    for number, text in enumerate(["", *texts]):
        if text:
            page.fill("#text", text)
        page.click("#ask")
        expect(page.locator(".timing")).to_have_count(number + 1)
    for box in page.locator(".masks input").all():
        box.check()


def main() -> int:
    """Write the screenshot; exit status 2 if no browser is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:7860")
    parser.add_argument("--out", type=Path, required=True, help="output JPEG file")
    parser.add_argument("--example", type=int, default=0)
    parser.add_argument("--text", nargs="*", default=[], help="more questions after the one of the example")
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("found neither chromium nor google-chrome; install one (apt-get install chromium)", file=sys.stderr)
        return 2
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": VIEW["width"], "height": VIEW["height"]})
        page.goto(arguments.address)
        mark_and_ask(page, arguments.example, arguments.text)
        page.mouse.move(0, 0)
        page.screenshot(path=str(arguments.out), type="jpeg", quality=85)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Take the pictures of the chat page in docs/images from a running server.

Usage: unmask serve --model M & python scripts/page_screenshots.py http://127.0.0.1:8000 [docs/images]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

CHROMIUM = "/usr/bin/chromium"
QUESTIONS = (
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Count from one to twenty.",
)
HALFWAY = """() => {
  const answer = document.querySelector("#messages > li:last-child");
  const count = look => answer.querySelectorAll(`.${look}`).length;
  const isGood = count("masked") >= 2 && count("committed") >= 1 && count("provisional") >= 2;
  return isGood && answer.textContent.length > 60 ? "good" : answer.dataset.state !== "running" && "missed";
}"""


def open_page(browser: Browser, url: str, scheme: Literal["dark", "light"], viewport: ViewportSize) -> Page:
    page = browser.new_context(color_scheme=scheme, viewport=viewport).new_page()
    page.goto(url)
    page.wait_for_function("document.getElementById('model').textContent.length > 0")
    return page


def ask(page: Page, question: str) -> None:
    page.locator("#input").fill(question)
    page.locator("#input").press("Enter")


def finish(page: Page) -> None:
    page.locator("#messages > li:last-child[data-state=done]").wait_for(timeout=120_000)


def slow_down(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Threshold").fill("0.4")  # tokens of a block are decided out of order more often
    page.get_by_label("Slow motion").select_option("400")
    page.keyboard.press("Escape")
    page.mouse.move(0, 300)


def picture_of_a_block(page: Page, path: Path) -> None:
    """Ask until a block shows every state between mask and word at once."""
    for question in QUESTIONS:
        ask(page, question)
        if page.wait_for_function(HALFWAY, timeout=300_000).json_value() == "good":
            page.screenshot(path=path)
            return
    raise SystemExit("no block had masked, provisional and committed tokens at once; nothing was saved")


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = open_page(browser, url, "dark", {"width": 1000, "height": 600})
        ask(page, "What is the capital of France?")
        finish(page)
        slow_down(page)
        picture_of_a_block(page, folder / "chat-dark.png")
        page = open_page(browser, url, "light", {"width": 360, "height": 640})
        ask(page, "List three primary colours.")
        finish(page)
        page.screenshot(path=folder / "chat-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images"))

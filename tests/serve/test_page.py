"""The page in Chromium: against a scripted server for what must happen at one moment, against the real one for the whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")
from browser import CHROMIUM_FLAGS, FakeServer, Script, Visit, running, visit
from live import live, served_model
from playwright.sync_api import Browser, Page, expect, sync_playwright

from unmask.engine.sampling_params import SamplingParams
from unmask.serve.config import ServerConfig

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

ANSWER = "The capital of France is Paris."
MARKDOWN = ("A ", "**bold**", " [link](https://example.org)\n\n", "```python\n", "print(1)\n", "```\n\n", "- one\n", "- two")
Open = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    with running(fake) as url:
        yield fake, url


@pytest.fixture
def fake(served: tuple[FakeServer, str]) -> FakeServer:
    served[0].reset()
    return served[0]


@pytest.fixture
def opened(browser: Browser, fake: FakeServer, served: tuple[FakeServer, str]) -> Open:
    return partial(visit, browser, served[1])


@pytest.fixture
def tab(opened: Open) -> Iterator[Visit]:
    with opened() as tab:
        yield tab


SIDEWAYS = """['html', 'main', '#settings'].filter(name => {
  const element = document.querySelector(name);
  return element.scrollWidth > element.clientWidth;
})"""
TO_END = "(main => main.scrollHeight - main.scrollTop - main.clientHeight)(document.querySelector('main'))"
PAPER = "getComputedStyle(document.documentElement).backgroundColor"
LOOKS = """all => all.map(element => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .05 + .2126 * r + .7152 * g + .0722 * b;
  };
  const { color, backgroundColor, backgroundImage, borderStyle, textDecorationLine, textDecorationStyle }
    = getComputedStyle(element);
  const paper = light(getComputedStyle(document.documentElement).backgroundColor, backgroundColor), ink = light(color);
  return {
    look: [textDecorationLine, textDecorationStyle, borderStyle, backgroundImage === "none"].join(),
    contrast: Math.max(ink, paper) / Math.min(ink, paper),
  };
})"""
SEEN = """() => new MutationObserver(
  () => saw([...document.querySelectorAll("#messages .token")].flatMap(token => [...token.classList]))
).observe(document.getElementById("messages"), { childList: true, subtree: true, attributes: true })"""


def states(page: Page) -> list[tuple[str, str]]:
    """Text and look of the block's tokens."""
    tokens = page.locator("#messages .block .token:not([hidden])").evaluate_all(
        "all => all.map(e => [e.textContent, e.className])"
    )
    return [(text, look.removeprefix("token ")) for text, look in tokens]


def test_a_question_is_answered(tab: Visit, fake: FakeServer) -> None:
    expect(tab.page.locator("#model")).to_have_text("tiny")
    expect(tab.page.locator("#empty")).to_be_visible()
    tab.ask("What is the capital of France?")
    answer = tab.answer()
    expect(answer.locator(".markdown")).to_have_text(ANSWER)
    expect(answer.locator(".costs")).to_have_text("7 tokens · 6 forwards · 1.17 tokens per forward · 88 tokens/s · finished")
    expect(tab.page.locator("#announce")).to_have_text(f"Answer complete. {ANSWER}")
    expect(tab.page.locator("#empty")).to_be_hidden()
    expect(tab.page.locator("#input")).to_be_focused()
    tab.ask("And of Spain?")
    tab.answer()
    expect(tab.page.locator("#messages > li")).to_have_count(4)
    assert fake.bodies[1] == {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "And of Spain?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "diffusion": {"watch": True},
    }


def test_an_example_is_asked_by_a_click_and_leaves_a_draft_alone(tab: Visit, fake: FakeServer) -> None:
    tab.page.locator("#input").fill("half a thought")
    tab.page.get_by_role("button", name="What is the capital of France?").click()
    tab.answer()
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    expect(tab.page.locator("#input")).to_have_value("half a thought")


def test_a_block_is_watched_as_it_forms(tab: Visit, fake: FakeServer) -> None:
    fake.script = Script(wrong={5: " Lyon"}, hold=2)
    tab.ask("Capital?")
    expect(tab.page.locator("#messages .provisional")).to_have_count(1)
    expect(tab.page.locator("#messages .markdown")).to_have_text("The capital░░ France")
    assert states(tab.page) == [
        (" capital", "masked"),
        ("░░", "masked no-candidate"),
        (" France", "provisional"),
    ]
    expect(tab.page.locator("#messages .costs")).to_have_text(
        re.compile(r"^1 token · 2 forwards · 0.50 tokens per forward · [\d.]+ tokens/s$")
    )
    assert tab.page.locator("#messages .block").get_attribute("aria-hidden") == "true"
    expect(tab.page.locator("#announce")).to_have_text("")
    fake.script.hold = 6
    fake.released.set()
    tab.answer()
    fake.released.clear()
    tab.ask("Again?")
    expect(tab.page.locator("#messages .provisional")).to_have_count(3)
    assert states(tab.page)[1] == (" Lyon", "provisional")
    expect(tab.page.locator("#messages li:last-child .markdown")).to_contain_text("The capital of France is")
    fake.script.hold = None
    fake.released.set()
    answer = tab.answer()
    expect(answer.locator(".markdown")).to_have_text(ANSWER)
    expect(answer.locator(".costs")).to_contain_text("1 edit ·")
    expect(answer.locator(".block")).to_have_count(0)


def test_an_edit_is_marked_while_its_block_forms(tab: Visit, fake: FakeServer) -> None:
    fake.script = Script(tokens=("a", " b", " c", " d", " e"), wrong={1: " x"}, hold=5)
    tab.ask("?")
    expect(tab.page.locator("#messages .edited")).to_have_text("b")
    fake.released.set()
    tab.answer()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_differ_without_colour_and_can_be_read(opened: Open, fake: FakeServer, scheme: str) -> None:
    with opened(color_scheme=scheme) as tab:
        looks = tab.page.locator("#legend .token").evaluate_all(LOOKS)
        assert len({look["look"] for look in looks}) == 4
        assert all(look["contrast"] >= 4.5 for look in looks), looks


def test_the_theme_follows_the_system_until_chosen(opened: Open) -> None:
    with opened(color_scheme="dark") as tab:
        dark, button = tab.page.evaluate(PAPER), tab.page.locator("#theme")
        expect(button).to_have_accessible_name("Theme: auto")
        button.click()
        light = tab.page.evaluate(PAPER)
        assert light != dark
        tab.page.reload()
        assert tab.page.evaluate(PAPER) == light
        expect(button).to_have_accessible_name("Theme: light")
        button.click()
        assert tab.page.evaluate(PAPER) == dark


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_keeps_what_has_come_and_ends_the_request(tab: Visit, fake: FakeServer, way: str) -> None:
    fake.script = Script(hold=4)
    tab.ask("Capital?")
    expect(tab.page.locator("#messages .markdown")).to_contain_text("The capital of France")
    if way == "key":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.get_by_role("button", name="Stop").click()
    answer = tab.answer("stopped")
    expect(answer.locator(".markdown")).to_have_text("The capital of France")
    expect(answer.locator(".costs")).to_contain_text("stopped")
    assert fake.gone.wait(5), "the server was not told"
    tab.page.reload()
    expect(tab.answer("stopped").locator(".markdown")).to_have_text("The capital of France")
    fake.script = Script()
    tab.page.get_by_role("button", name="Try again").click()
    expect(tab.answer().locator(".markdown")).to_have_text(ANSWER)
    expect(tab.page.locator("#messages > li")).to_have_count(2)
    expect(tab.page.locator("#input")).to_be_focused()


def test_escape_closes_a_panel_before_it_stops_an_answer(tab: Visit, fake: FakeServer) -> None:
    fake.script = Script(hold=1)
    tab.ask("Capital?")
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#settings")).to_be_hidden()
    expect(tab.page.get_by_role("button", name="Stop")).to_be_visible()
    tab.page.keyboard.press("Escape")
    tab.answer("stopped")


def test_a_reload_keeps_the_conversation_the_half_finished_answer_and_the_draft(tab: Visit, fake: FakeServer) -> None:
    tab.ask("first")
    tab.answer()
    fake.script = Script(hold=4)
    tab.ask("second")
    expect(tab.page.locator("#messages li:last-child .markdown")).to_contain_text("The capital of France")
    tab.page.locator("#input").fill("third, not sent")
    tab.page.reload()
    expect(tab.answer("stopped").locator(".markdown")).to_have_text("The capital of France")
    expect(tab.page.locator("#messages > li")).to_have_count(4)
    expect(tab.page.locator("#input")).to_have_value("third, not sent")


def test_conversations_are_listed_opened_and_deleted(tab: Visit) -> None:
    for question in ("one", "two"):
        tab.page.get_by_role("button", name="New chat").click()
        tab.ask(question)
        tab.answer()
    chats = tab.page.locator("#chat-list li")
    expect(chats.locator(".open")).to_have_text(["two", "one"])
    chats.nth(1).locator(".open").click()
    expect(tab.page.locator(".user-text")).to_have_text("one")
    chats.nth(1).hover()
    chats.nth(1).locator(".delete").click()
    expect(chats).to_have_count(2)
    chats.nth(1).locator(".delete").click()
    expect(chats).to_have_count(1)
    tab.page.reload()
    expect(chats.locator(".open")).to_have_text(["two"])
    expect(tab.page.locator(".user-text")).to_have_text("two")


def test_an_earlier_message_can_be_changed(tab: Visit, fake: FakeServer) -> None:
    tab.ask("Capitol?")
    tab.answer()
    tab.page.locator("#input").fill("a draft")
    tab.page.locator(".user").hover()
    tab.page.get_by_role("button", name="Edit").click()
    expect(tab.page.locator("#input")).to_have_value("Capitol?\n\na draft")
    tab.ask("Capital?")
    tab.answer()
    expect(tab.page.locator(".user-text")).to_have_text("Capital?")
    assert fake.bodies[1]["messages"] == [{"role": "user", "content": "Capital?"}]


def test_every_declared_option_has_a_control(tab: Visit) -> None:
    for option in SamplingParams.options().values():
        control = tab.page.locator(f"#settings [name={option.name}]")
        expect(control).to_have_count(int("page" in option.surfaces))
        if option.choices:
            assert control.locator("option").evaluate_all("all => all.map(each => each.value)") == ["", *option.choices]
        elif option.kind in (int, float) and "page" in option.surfaces:
            limits = option.to_json(None)
            given = [control.get_attribute("min"), control.get_attribute("max")]
            assert [limit and float(limit) for limit in given] == [
                "" if limits[name] is None else float(limits[name]) for name in ("minimum", "maximum")
            ]


def test_settings_are_sent_and_kept(tab: Visit, fake: FakeServer) -> None:
    page = tab.page
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#capabilities")).to_contain_text("fills holes")
    threshold = page.get_by_label("Threshold", exact=True)
    expect(threshold).to_have_attribute("placeholder", "0.95")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Preset").select_option("quality")
    threshold.fill("0.6")
    page.get_by_label("Block size").fill("16")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Max new tokens").fill("99")
    page.get_by_label("Mode", exact=True).select_option("diffusion")
    page.get_by_label("Seed").fill("3")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(threshold).to_have_value("0.6")
    page.keyboard.press("Escape")
    tab.ask("hello")
    tab.answer()
    body = fake.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["diffusion"] == {"watch": True, "threshold": 0.6, "block_size": 16, "preset": "quality", "mode": "diffusion"}
    assert (body["temperature"], body["max_completion_tokens"], body["seed"]) == (0.7, 99, 3)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset to defaults").click()
    expect(threshold).to_have_value("")
    expect(page.get_by_label("Mode", exact=True)).to_have_value("")
    page.keyboard.press("Escape")
    tab.ask("again")
    tab.answer()
    assert fake.bodies[1]["diffusion"] == {"watch": True}
    assert "seed" not in fake.bodies[1]


def test_an_autoregressive_model_has_no_diffusion_controls(opened: Open, fake: FakeServer) -> None:
    fake.diffusion = False
    with opened() as tab:
        expect(tab.page.locator("#legend")).to_be_hidden()
        tab.page.get_by_role("button", name="Settings").click()
        expect(tab.page.locator("#capabilities")).to_have_text("tiny decodes token by token.")
        expect(tab.page.get_by_label("Temperature")).to_be_visible()
        expect(tab.page.get_by_label("Threshold", exact=True)).to_be_hidden()
        tab.page.keyboard.press("Escape")
        tab.ask("Capital?")
        expect(tab.answer().locator(".markdown")).to_have_text(ANSWER)
        assert "diffusion" not in fake.bodies[0]


def test_a_key_is_asked_for_when_the_server_wants_one(opened: Open, fake: FakeServer) -> None:
    fake.key = "secret"
    with opened() as tab:
        expect(tab.page.get_by_label("This server needs an API key")).to_be_focused()
        tab.expect("401")
        tab.page.locator("#input").fill("Capital?")
        tab.page.locator("#input").press("Enter")
        expect(tab.answer("failed").locator(".error")).to_have_text("The server needs a valid API key.")
        tab.expect("401")
        expect(tab.page.locator("#key-problem")).to_be_hidden()
        tab.page.locator("#key").fill("sacred")
        tab.page.get_by_role("button", name="Use key").click()
        expect(tab.page.locator("#key-problem")).to_be_visible()
        expect(tab.page.get_by_label("This server needs an API key")).to_be_focused()
        tab.expect("401")
        tab.page.locator("#key").fill("secret")
        tab.page.get_by_role("button", name="Use key").click()
        expect(tab.answer().locator(".markdown")).to_have_text(ANSWER)
        tab.page.reload()
        expect(tab.page.locator("#model")).to_have_text("tiny")
        expect(tab.page.locator("#key-form")).to_be_hidden()


REFUSALS = [
    (429, {"Retry-After": "7"}, "The server is busy. Try again in 7 seconds."),
    (503, {}, "The server is starting or shutting down. Try again in a moment."),
    (
        400,
        {},
        "The server refused the request: the prompt has 9 tokens too many. Your message is left out of the conversation: "
        "edit it, or try again.",
    ),
    (500, {}, "Server error: the prompt has 9 tokens too many"),
]


@pytest.mark.parametrize(("status", "headers", "words"), REFUSALS)
def test_refusals_are_told_in_plain_words_and_can_be_tried_again(
    tab: Visit, fake: FakeServer, status: int, headers: dict[str, str], words: str
) -> None:
    fake.script = Script(status=status, headers=headers, message="the prompt has 9 tokens too many")
    tab.ask("Capital?")
    expect(tab.answer("failed").locator(".error")).to_have_text(words)
    expect(tab.page.locator("#announce")).to_contain_text(words)
    tab.expect(str(status))
    fake.script = Script()
    tab.page.get_by_role("button", name="Try again").click()
    expect(tab.answer().locator(".markdown")).to_have_text(ANSWER)
    expect(tab.page.locator(".user-text")).to_have_text("Capital?")


def test_a_refused_message_does_not_stay_in_the_conversation(tab: Visit, fake: FakeServer) -> None:
    tab.ask("one")
    tab.answer()
    fake.script = Script(status=400, message="too long")
    tab.ask("far too long")
    tab.answer("failed")
    tab.expect("400")
    fake.script = Script()
    tab.ask("two")
    tab.answer()
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["one", ANSWER, "two"]
    tab.page.locator(".user").nth(1).hover()
    tab.page.get_by_role("button", name="Edit").nth(1).click()
    expect(tab.page.locator("#input")).to_have_value("far too long")
    tab.ask("shorter")
    tab.answer()
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["one", ANSWER, "shorter"]


@pytest.mark.parametrize("width", [1280, 1000, 720])
def test_the_settings_do_not_cover_the_composer(opened: Open, width: int) -> None:
    with opened(viewport={"width": width, "height": 720}) as tab:
        tab.page.get_by_role("button", name="Settings").click()
        panel, send = (tab.page.locator(name).bounding_box() for name in ("#settings", "#send"))
        assert panel is not None
        assert send is not None
        assert send["x"] + send["width"] <= panel["x"]
        assert tab.page.evaluate(SIDEWAYS) == []


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ("cut", "The connection was lost before the answer was complete."),
        ("error", "The server ended the answer with an error: the engine failed"),
    ],
)
def test_a_broken_stream_keeps_what_came(tab: Visit, fake: FakeServer, breaks: str, words: str) -> None:
    fake.script = Script(breaks=breaks)
    tab.ask("Capital?")
    answer = tab.answer("failed")
    expect(answer.locator(".error")).to_have_text(words)
    expect(answer.locator(".markdown")).to_have_text("The capital of France")


def test_a_lost_network_is_told_and_a_failed_turn_leaves_no_gap(tab: Visit, fake: FakeServer) -> None:
    expect(tab.page.locator("#model")).to_have_text("tiny")
    tab.page.context.set_offline(True)
    tab.ask("one")
    expect(tab.answer("failed").locator(".error")).to_have_text("The server cannot be reached. Is it still running?")
    tab.page.context.set_offline(False)
    tab.ask("two")
    tab.answer()
    # At the end: the browser's own request for the icon may fail as well, and later.
    tab.expect("ERR_INTERNET_DISCONNECTED")
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_markup_of_the_model_stays_text(tab: Visit, fake: FakeServer) -> None:
    attacks = (
        "<img src=x onerror=\"document.title='owned'\">",
        "<script>document.title='owned'</script>",
        "[click](javascript:document.title='owned')",
        "![picture](https://elsewhere.example/pixel.png)",
        '<a href="data:text/html,x" onclick="document.title=\'owned\'">a</a>',
        "<style>body{display:none}</style>",
        "```html\n<b onclick=alert(1)>x</b>\n```",
        "<form action=/x><input name=q></form>",
        '[a](https://example.org "t" onmouseover="x")',
    )
    fake.script = Script(tokens=tuple(f"{attack}\n\n" for attack in attacks), block_size=2)
    tab.ask("attack")
    body = tab.answer().locator(".markdown")
    for words in ("<img src=x onerror=", "<script>document.title", "<style>body", "<form action=/x>", "<b onclick=alert(1)>"):
        expect(body).to_contain_text(words)
    assert body.locator("img, script, style, form, input, iframe, svg, [onclick], [onerror]").count() == 0
    for link in body.locator("a").all():
        href = link.get_attribute("href")
        assert href is None or href.startswith("https://"), href
    expect(body.locator("a", has_text="picture")).to_have_attribute("rel", "noopener noreferrer")
    body.locator("a", has_text="click").click()
    assert tab.page.title() == "unmask"
    tab.ask("<b>mine</b>")
    expect(tab.page.locator(".user-text").last).to_have_text("<b>mine</b>")


def test_markdown_is_shown_and_copied(opened: Open, fake: FakeServer) -> None:
    fake.script = Script(tokens=MARKDOWN, block_size=3)
    with opened(permissions=["clipboard-read", "clipboard-write"]) as tab:
        tab.ask("markdown")
        body = tab.answer().locator(".markdown")
        expect(body.locator("strong")).to_have_text("bold")
        expect(body.locator("a")).to_have_attribute("target", "_blank")
        expect(body.locator("li")).to_have_text(["one", "two"])
        body.get_by_role("button", name="Copy code").click()
        expect(body.locator(".code button")).to_have_text("Copied")
        assert tab.page.evaluate("navigator.clipboard.readText()") == "print(1)\n"
        tab.page.locator(".answer .actions").get_by_role("button", name="Copy").click()
        assert tab.page.evaluate("navigator.clipboard.readText()") == "".join(MARKDOWN)


def test_a_block_forms_inside_code_and_lists(tab: Visit, fake: FakeServer) -> None:
    fake.script = Script(tokens=MARKDOWN, block_size=1, hold=9)
    tab.ask("markdown")
    expect(tab.page.locator("#messages pre code .block")).to_have_text("░░")
    fake.released.set()
    tab.answer()


def test_the_keyboard_is_enough(tab: Visit, fake: FakeServer) -> None:
    page = tab.page
    keys = page.keyboard
    expect(page.locator("#input")).to_be_focused()
    keys.type("line one")
    keys.press("Shift+Enter")
    keys.type("line two")
    fake.script = Script(hold=1)
    keys.press("Enter")
    expect(page.locator(".user-text")).to_have_text("line one\nline two")
    keys.press("Tab")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_focused()
    assert stop.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    keys.press("Enter")
    tab.answer("stopped")
    expect(page.locator("#input")).to_be_focused()
    names = []
    for _ in range(9):
        keys.press("Shift+Tab")
        names.append(page.evaluate("(e => e.ariaLabel || e.title || e.textContent)(document.activeElement)"))
    assert names[:6] == ["Try again", "Copy", "Copy", "Edit", "Settings", "Theme: auto"]
    page.get_by_role("button", name="Settings").focus()
    keys.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    keys.press("Tab")
    assert page.evaluate("document.querySelector('#settings').contains(document.activeElement)")
    keys.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_everything_fits_a_phone(opened: Open, fake: FakeServer) -> None:
    wide = "| " + " | ".join(f"column{i}" for i in range(9)) + " |\n|" + "---|" * 9 + "\n"
    fake.script = Script(tokens=("word" * 60, "\n\n", f"```\n{'code ' * 60}\n```\n\n", wide, "end"), hold=4)
    with opened(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as tab:
        page = tab.page
        assert page.evaluate(SIDEWAYS) == []
        tab.ask("long" * 40)
        expect(page.locator("#messages .block")).to_be_visible()
        assert page.evaluate(SIDEWAYS) == []
        fake.released.set()
        tab.answer()
        assert page.evaluate(SIDEWAYS) == []
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Temperature")).to_be_in_viewport()
        assert page.evaluate(SIDEWAYS) == []
        page.get_by_role("button", name="Close settings").click()
        page.get_by_role("button", name="Conversations", exact=True).click()
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#chats")).to_be_hidden()
        expect(page.locator("#empty")).to_be_visible()


def test_the_page_follows_the_answer_only_while_the_reader_is_at_its_end(tab: Visit, fake: FakeServer) -> None:
    fake.script = Script(tokens=tuple(f"line {i}\n\n" for i in range(60)), block_size=2, hold=50)
    tab.ask("many lines")
    expect(tab.page.locator("#messages .markdown")).to_contain_text("line 40")
    assert tab.page.evaluate(TO_END) < 48
    tab.page.locator("main").evaluate("e => { e.scrollTop = 100 }")
    expect(tab.page.locator("#to-end")).to_be_visible()
    fake.released.set()
    tab.answer()
    assert tab.page.locator("main").evaluate("e => e.scrollTop") == 100
    tab.page.locator("#to-end").click()
    assert tab.page.evaluate(TO_END) < 48


def test_nothing_moves_where_motion_is_not_wanted(opened: Open, fake: FakeServer) -> None:
    fake.script = Script(hold=0)
    with opened(reduced_motion="reduce") as tab:
        tab.ask("?")
        moving = "getComputedStyle(document.querySelector('#messages .markdown'), '::before').animationName"
        tab.page.locator(".answer[data-state=running]").wait_for()
        assert tab.page.evaluate(moving) == "none"
        assert tab.page.locator("#legend .token").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


def test_a_conversation_is_saved_as_markdown(tab: Visit, tmp_path: Path) -> None:
    tab.ask("Capital?")
    tab.answer()
    tab.page.get_by_role("button", name="Settings").click()
    with tab.page.expect_download() as waiting:
        tab.page.get_by_role("button", name="Save chat as Markdown").click()
    waiting.value.save_as(tmp_path / "chat.md")
    assert (tmp_path / "chat.md").read_text() == f"### You\n\nCapital?\n\n### Answer\n\n{ANSWER}\n"


class TestRealServer:
    """A random model's nonsense through the whole of it."""

    @pytest.mark.parametrize("diffusion", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_a_block_denoises_and_the_answer_is_the_servers(self, browser: Browser, tmp_path: Path, diffusion: bool) -> None:
        model = served_model(tmp_path, diffusion=diffusion, seconds=0.03)
        with live(model, ServerConfig(api_keys=("secret",))) as server, visit(browser, server.url) as tab:
            page = tab.page
            page.get_by_label("This server needs an API key").fill("secret")
            tab.expect("401")
            page.get_by_role("button", name="Use key").click()
            expect(page.locator("#model")).to_have_text("tiny")
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Max new tokens").fill("40")
            page.keyboard.press("Escape")
            seen: set[str] = set()
            page.expose_function("saw", lambda looks: seen.update(looks))
            page.evaluate(SEEN)
            tab.ask("What is 2 + 3?")
            costs = tab.answer().locator(".costs").inner_text()
            assert re.fullmatch(
                r"\d+ tokens · \d+ forwards · [\d.]+ tokens per forward · [\d.]+ tokens/s · (finished|cut off .*)", costs
            )
            assert ({"masked", "committed"} <= seen) == diffusion
            server.wait_idle()

    def test_stop_frees_what_was_held_and_errors_are_told(self, browser: Browser, tmp_path: Path) -> None:
        with live(served_model(tmp_path, seconds=0.05)) as server, visit(browser, server.url) as tab:
            tab.ask("What is 2 + 3?")
            expect(tab.page.locator("#messages .block")).to_be_visible()
            tab.page.keyboard.press("Escape")
            tab.answer("stopped")
            server.wait_idle()
            tab.ask("long " * 300)
            expect(tab.answer("failed").locator(".error")).to_contain_text("maximum context length is 256")
            tab.expect("400")


def test_every_file_is_small_and_names_no_other_place() -> None:
    page = Path(__file__).parents[2] / "src/unmask/serve/page"
    ours: list[Any] = [file for file in page.iterdir() if file.is_file()]
    assert len(ours) > 10
    for file in ours:
        text = file.read_text()
        assert text.count("\n") < 400, file
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file

"""The page in a browser: what no look at its text can tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
OpenPage = Callable[..., Page]

# Every element with text of its own: its colour against the first ground below it that is not see-through.
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = (colour) => {
    const [red, green, blue] = numbers(colour).map((part) => linear(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const found = {};
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || element.closest("svg") || !element.checkVisibility()) continue;
    const [text, below] = [getComputedStyle(element).color, ground(element)];
    const [low, high] = [luminance(text), luminance(below)].sort((one, other) => one - other);
    found[`${text} on ${below}`] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""
# Letters of the pictures but for those inside a filled cell, which take the colour of the paper.
PICTURE_COLOURS = """() => {
  const paper = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim();
  const probe = document.createElement("span");
  probe.style.color = paper;
  document.body.append(probe);
  const paperColour = getComputedStyle(probe).color;
  probe.remove();
  const fills = [...document.querySelectorAll("svg text")].map((text) => getComputedStyle(text).fill);
  return [paperColour, [...new Set(fills)].filter((fill) => fill !== paperColour)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser, page: str, tmp_path: Path) -> Iterator[OpenPage]:
    """Open the report in a window of its own; what goes wrong in it fails the test at the end."""
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    contexts, troubles = [], []

    def note(request: Any) -> None:
        if request.url != address:
            troubles.append(f"asks for {request.url}")

    def open_it(width: int = 1280, scheme: str = "light", script: str | None = None) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        opened = context.new_page()
        if script:
            opened.add_init_script(script)
        opened.on("console", lambda message: troubles.append(f"says {message.text}"))
        opened.on("pageerror", lambda error: troubles.append(f"throws {error}"))
        opened.on("request", note)
        opened.goto(address)
        return opened

    yield open_it
    for context in contexts:
        context.close()
    assert not troubles


def column(page: Page, caption: str, number: int) -> list[str]:
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    return [text.split("\n")[0] for text in table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()]


def test_nothing_is_asked_for_and_nothing_goes_wrong(open_page: OpenPage) -> None:
    page = open_page()
    page.wait_for_load_state("networkidle")
    assert page.title() == "Headroom report: headroom-questions"
    assert page.locator("#theme").is_visible()  # the script ran


@pytest.mark.parametrize(
    ("part", "directive"),
    [("<iframe src='data:text/html,x'></iframe>", "frame-src"), ("<img src='elsewhere.png' alt=''>", "img-src")],
)
def test_the_policy_refuses_what_a_page_could_ask_for(
    browser: Browser, page: str, tmp_path: Path, part: str, directive: str
) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    opened = browser.new_page()
    opened.goto((tmp_path / "report.html").as_uri())
    refused = opened.evaluate(
        """(part) => new Promise((done) => {
          addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
          setTimeout(() => done("nothing"), 5000);
          document.body.insertAdjacentHTML("beforeend", part);
        })""",
        part,
    )
    opened.close()
    assert refused == directive


def test_a_table_sorts_both_ways_by_value(open_page: OpenPage) -> None:
    page = open_page()
    caption = "Quality, speed and size of both baselines"
    head = page.locator("table.ladder th", has_text="Texts/s")
    assert head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, caption, 5) == ["9.4", "287", "1,320", "2,270", "2,310", "2,610", "2,850", "3,560"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, caption, 5)[:2] == ["3,560", "2,850"]
    runtime = page.locator("table.ladder th", has_text="Runtime").locator("button")
    runtime.click()
    assert page.locator("[aria-sort]").count() == 1
    assert column(page, caption, 10)[0] == "openvino-cpu"


def test_cells_without_a_value_stay_last(open_page: OpenPage) -> None:
    page = open_page()
    button = page.locator("table.ladder th", has_text="File, MiB").locator("button")
    for _ in range(2):
        button.click()
        assert column(page, "Quality, speed and size", 9)[-2:] == ["–", "–"]


def test_every_sortable_table_sorts_by_every_column(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    buttons = page.locator("table.sortable th[scope=col] button").all()
    assert len(buttons) == page.locator("table.sortable th[scope=col]").count() > 30
    for button in buttons:
        assert button.inner_text()
        button.evaluate("(button) => { button.click(); button.click(); }")
        assert button.locator("..").get_attribute("aria-sort") == "descending"


def test_the_keyboard_reaches_the_verdict_the_switch_and_the_headers(open_page: OpenPage) -> None:
    page = open_page()
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the verdict"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.id") == "theme"
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused}.parentElement.scope") == "col":
            break
    assert page.evaluate(f"{focused}.tagName") == "BUTTON"
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("Space")
    assert page.evaluate(f"{focused}.parentElement.getAttribute('aria-sort')") == "ascending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_reader_and_switches(open_page: OpenPage, scheme: str) -> None:
    page = open_page(scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    switch = page.locator("#theme")
    first, pressed = page.evaluate(ground), switch.get_attribute("aria-pressed")
    assert pressed == str(scheme == "dark").lower()
    switch.click()
    second = page.evaluate(ground)
    assert second != first
    assert switch.get_attribute("aria-pressed") != pressed
    page.reload()
    assert page.evaluate(ground) == second
    switch.click()
    assert page.evaluate(ground) == first


def test_the_switch_works_where_there_is_no_storage(open_page: OpenPage) -> None:
    refused = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('refused'); }});"
    page = open_page(script=refused)
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_contrasts_with_its_ground(open_page: OpenPage, scheme: str) -> None:
    page = open_page(scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 5
    assert {pair: value for pair, value in contrasts.items() if value < 4.5} == {}
    paper, fills = page.evaluate(PICTURE_COLOURS)
    assert len(fills) >= 2
    assert {fill: contrast(fill, paper) for fill in fills if contrast(fill, paper) < 4.5} == {}


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_page_never_scrolls_sideways(open_page: OpenPage, width: int) -> None:
    page = open_page(width=width)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_told_to_those_who_do_not_see_them(open_page: OpenPage) -> None:
    page = open_page()
    for picture in page.locator("svg, img").all():
        label = picture.get_attribute("aria-label") or picture.get_attribute("alt") or ""
        assert len(label) > 20
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    assert page.get_by_role("navigation", name="Contents").count() == 1
    assert page.get_by_role("region", name="The performance ladder").count() == 1


def test_on_paper_everything_is_open_light_and_without_contents(open_page: OpenPage) -> None:
    page = open_page(width=718, scheme="dark")  # the width of A4 between its margins
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink')").strip() == "#1c2430"
    assert not page.locator("nav").is_visible()
    assert page.locator("figure.wide").first.is_visible()
    assert not page.locator("figure.narrow").first.is_visible()
    assert page.locator("#environment details").count() == 2
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == page.locator("details").count()

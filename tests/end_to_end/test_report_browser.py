"""The report in a real Chromium: nothing is fetched, nothing fails, and what it offers works."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from wegeft_cli.analysis.report import report

pytestmark = [pytest.mark.slow]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECTIONS = ("summary", "scores", "samples", "curves", "learned", "recipe", "environment")
PATIENCE_MS = 60_000


class Opened:
    """A page in the browser, with all that it said, raised and asked for."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.wait_for_function("document.documentElement.dataset.charts !== undefined")


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None and os.environ.get("WEGEFT_NEED_BROWSER") == "1":
        pytest.fail("WEGEFT_NEED_BROWSER=1, but there is no Chromium")
    if found is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    executable = find_browser()
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=executable,
            headless=True,
            args=FLAGS,
            viewport={"width": 1200, "height": 900},
            color_scheme="light",
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def page_path(pair, tmp_path_factory) -> Path:
    return report(pair, output=tmp_path_factory.mktemp("page") / "report.html").output


@pytest.fixture(scope="module")
def opened(browser, page_path) -> Opened:
    return Opened(browser.new_page(), page_path.as_uri())


def test_it_opens_without_a_word_or_a_request(opened, page_path):
    assert opened.said == []
    assert opened.asked == [page_path.as_uri()]


def test_every_section_and_chart_shows(opened):
    page = opened.page
    for section in SECTIONS:
        box = page.locator(f"#{section}").bounding_box()
        assert box is not None, section
        assert box["height"] > 60, section
    charts = page.locator("[data-chart]").all()
    num_drawn = int(page.evaluate("document.documentElement.dataset.charts"))
    # Curves 5 and eval_loss; scores; of either run size, novelty, rank and cosines of three kinds.
    assert len(charts) == num_drawn == 6 + 1 + 2 * (3 + 3)
    for chart in charts:
        drawing = chart.locator("svg, canvas").first
        box = drawing.bounding_box()
        assert box is not None
        assert box["width"] > 150
        assert box["height"] > 30
    marks = page.locator("#chart-curve-loss svg [aria-roledescription='line mark']")
    assert marks.count() == 2
    told = page.locator("[role='graphics-document']")
    assert told.count() == num_drawn
    assert all(each.get_attribute("aria-label") for each in told.all())


def count_samples(page: Any) -> int:
    return int(page.locator("#sample-count").inner_text().split()[0])


def test_filters_do_what_they_say(opened):
    page = opened.page
    assert count_samples(page) == 6
    assert page.locator("#filter-model").input_value() == "tiny: tuned"
    wanted = {"right": 4, "wrong": 2, "unreadable": 1, "fixed": 3, "broken": 0, "all": 6}
    for outcome, number in wanted.items():
        page.locator("#filter-outcome").select_option(outcome)
        assert count_samples(page) == number, outcome
        assert page.locator("#sample-list > li").count() == number
    page.locator("#filter-text").fill("target row 2")
    assert count_samples(page) == 1
    assert "row 2" in page.locator("#sample-list > li").inner_text()
    page.locator("#filter-text").fill("")
    page.locator("#filter-model").select_option("tiny: base")
    page.locator("#filter-outcome").select_option("right")
    assert count_samples(page) == 1
    page.locator("#filter-outcome").select_option("all")
    page.locator("#filter-model").select_option("tiny: tuned")


def test_hostile_samples_are_text(opened):
    page = opened.page
    assert page.evaluate("window.hacked") is None
    shown = page.locator("#sample-list .output").first.inner_text()
    assert shown.startswith("</script><script>window.hacked")
    assert page.locator("main img").count() == 0
    # The policy itself holds: a script that gets in all the same does not run.
    before = len(opened.said)
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hacked = 3";
        document.body.append(script);
    }""")
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.said[before:])
    del opened.said[before:]


def test_figures_of_a_chart_become_a_table(opened):
    page = opened.page
    details = page.locator("details[data-table='chart-curve-loss']")
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    details.locator("tbody tr").first.wait_for()
    assert details.locator("tbody tr").count() == 12
    assert details.locator("th").all_inner_texts() == ["run", "step", "value"]


def test_colours_follow_the_system_and_the_choice(opened):
    page = opened.page

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.locator("#theme").select_option("light")
    assert background() == light
    page.locator("#theme").select_option("auto")
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(200)
    assert opened.said == []


def test_the_keyboard_reaches_everything(browser, page_path):
    page = Opened(browser.new_page(), page_path.as_uri()).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.hash"))
    wanted = {"theme", "filter-task", "filter-model", "filter-outcome", "filter-other"}
    assert wanted | {"filter-text"} | {f"#{section}" for section in SECTIONS} <= seen
    names = page.evaluate("""() => [...document.querySelectorAll("select, input, button, a")]
        .filter((each) => !(each.labels?.length || each.textContent.trim()))
        .map((each) => each.outerHTML)""")
    assert names == []
    levels = page.evaluate("""() => [...document.querySelectorAll("h1, h2, h3")]
        .map((each) => Number(each.tagName[1]))""")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = page.evaluate("() => [...document.querySelectorAll('main [id]')].map((each) => each.id)")
    own = [name for name in ids if not name.startswith("gradient")]
    assert len(own) == len(set(own))
    page.close()


def test_a_phone_shows_it_without_sideways_scrolling(browser, page_path):
    page = browser.new_page()
    page.set_viewport_size({"width": 360, "height": 740})
    opened = Opened(page, page_path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    widths = [chart.bounding_box()["width"] for chart in page.locator("[data-chart]").all()]
    assert max(widths) <= 360
    assert opened.said == []
    page.close()

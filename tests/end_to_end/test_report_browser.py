"""The report in a real Chromium: nothing is fetched, nothing fails, and what it offers works."""

from __future__ import annotations

import csv
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
SECTIONS = ("summary", "scores", "curves", "samples", "learned", "recipe", "environment")
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
        self.wait()

    def wait(self) -> None:
        """Wait until every chart is drawn."""
        self.page.wait_for_function("document.documentElement.dataset.charts !== undefined")


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
    # Curves 5; scores; of either run size, novelty, rank and cosines of three kinds.
    assert len(charts) == num_drawn == 5 + 1 + 2 * (3 + 3)
    for chart in charts:
        drawing = chart.locator("svg, canvas").first
        box = drawing.bounding_box()
        assert box is not None
        assert box["width"] > 150
        assert box["height"] > 30
    # Of either run the losses of training and validation.
    marks = page.locator("#chart-curve-loss svg [aria-roledescription='line mark']")
    assert marks.count() == 4
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
    assert details.locator("tbody tr").count() == 12 + 4
    assert details.locator("th").all_inner_texts() == ["run", "kind", "step", "value"]


def test_a_chart_is_a_csv_file(opened):
    with opened.page.expect_download() as download:
        opened.page.locator("button[data-csv='chart-curve-loss']").click()
    assert download.value.suggested_filename == "chart-curve-loss.csv"
    with Path(download.value.path()).open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = opened.page.evaluate("""() => JSON.parse(document.getElementById("data").textContent)
        .charts[0].spec.data.values""")
    assert [(row["run"], row["kind"], float(row["value"])) for row in rows] == [
        (row["run"], row["kind"], row["value"]) for row in shown
    ]


def read_lines(page: Any) -> list[str]:
    """Return the paths of the loss chart's lines."""
    lines = page.locator("#chart-curve-loss svg .mark-line path").all()
    return [line.get_attribute("d") for line in lines]


def test_curves_are_smoothed_logarithmic_and_chosen(browser, page_path):
    opened = Opened(browser.new_page(), page_path.as_uri())
    page = opened.page
    plain = read_lines(page)
    assert len(plain) == 4
    page.locator("#smoothing").fill("0.9")
    opened.wait()
    smoothed = read_lines(page)
    assert len(smoothed) == 8
    assert smoothed[:4] == plain  # pale, behind the smoothed lines
    assert smoothed[4] != plain[0]
    assert smoothed[5] in plain or smoothed[6] in plain  # validations are not smoothed
    page.locator("#smoothing").fill("0")
    page.locator("#logarithmic").check()
    opened.wait()
    assert len(read_lines(page)) == 4
    assert read_lines(page) != plain
    page.locator("#logarithmic").uncheck()
    page.locator("[data-run='tiny']").uncheck()
    opened.wait()
    assert len(read_lines(page)) == 2
    page.locator("[data-run='b<i>&']").uncheck()
    opened.wait()
    assert page.locator("#chart-curve-loss").inner_text() == "No values are shown."
    page.locator("[data-run='tiny']").check()
    opened.wait()
    assert len(read_lines(page)) == 2
    assert opened.said == []
    page.close()


def test_values_show_under_the_pointer(opened):
    page = opened.page
    chart = page.locator("#chart-curve-loss")
    chart.scroll_into_view_if_needed()
    box = chart.locator(".role-frame .background").first.bounding_box()
    values = page.locator("figure:has(#chart-curve-loss) .values")
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 60)
    values.wait_for()
    shown = values.inner_text().splitlines()
    assert shown[0] == "step 6"
    rows = page.evaluate("""() => JSON.parse(document.getElementById("data").textContent)
        .charts[0].spec.data.values.filter((row) => row.step === 6)""")
    assert len(rows) == len(shown) - 1 == 4
    for row, line in zip(rows, shown[1:], strict=True):
        name, value = line.rsplit(": ", 1)
        assert name == f"{row['run']}, {row['kind']}"
        assert float(value) == pytest.approx(row["value"], rel=1e-4)
    page.mouse.move(1, 1)
    values.wait_for(state="hidden")


def test_the_legend_shows_whole_symbols(opened):
    swatches = opened.page.locator("#curves .legend svg line").all()
    assert [each.get_attribute("stroke-dasharray") for each in swatches] == ["none", "6 3"]
    # No symbol of Vega's is left, which the dashes of a line would cut.
    assert opened.page.locator(".role-legend").count() == 0


def test_a_matrix_has_the_color_of_the_page(opened):
    page = opened.page
    cell = """() => {
        const canvas = document.querySelector("#chart-inspect-0-cosine-0 canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let opaque = 0;
        for (let i = 0; i < data.length; i += 4) {
            if (Math.min(data[i], data[i + 1], data[i + 2]) > 240 && data[i + 3] > 240) opaque += 1;
        }
        return opaque;
    }"""
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    opened.wait()
    assert page.evaluate(cell) == 0
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(200)
    opened.wait()


def test_without_scripts_the_page_shows_charts_and_samples(browser, page_path):
    page = browser.new_page()
    session = browser.new_cdp_session(page)
    session.send("Emulation.setScriptExecutionDisabled", {"value": True})
    page.goto(page_path.as_uri())
    for chart in page.locator("[data-chart]").all():
        box = chart.locator(".still svg").bounding_box()
        assert box is not None
        assert box["height"] > 30
    assert page.locator("#sample-list > li").count() == 6
    assert page.locator("#sample-list .output").first.inner_text().startswith("</script>")
    assert not page.locator("#filters, #curve-controls, button").locator("visible=true").count()
    assert page.locator("noscript").inner_text().startswith("Without JavaScript")
    page.close()


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
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.hash"))
    wanted = {
        "theme",
        "smoothing",
        "logarithmic",
        "filter-task",
        "filter-model",
        "filter-outcome",
        "filter-other",
    }
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


@pytest.fixture(scope="module")
def long_page(pair, tmp_path_factory) -> Path:
    """A page of two runs with names of 150 characters without a space."""
    folder = tmp_path_factory.mktemp("long")
    runs = [folder / f"learning_rate=0.0003_target_modules={letter * 115}" for letter in "qv"]
    for run in runs:
        shutil.copytree(pair[0], run)
    return report(runs, output=folder / "report.html").output


@pytest.mark.parametrize("width", [360, 390, 1200])
@pytest.mark.parametrize("which", ["page_path", "long_page"])
def test_no_width_scrolls_sideways(browser, which, width, request):
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 740})
    opened = Opened(page, request.getfixturevalue(which).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = [chart.bounding_box()["width"] for chart in page.locator("[data-chart]").all()]
    assert max(widths) <= width
    assert opened.said == []
    page.close()

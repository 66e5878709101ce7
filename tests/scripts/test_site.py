"""The documentation site: it builds offline, loads nothing from elsewhere, and shows every page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

import wegeft_cli

# Tags whose address a browser fetches by itself, with the attribute.
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Fetches(HTMLParser):
    """Collects the addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(FETCHED.get(tag, ""))
        if address:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    # No address resolves: what asked the network would fail.
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "NO_MKDOCS_2_WARNING": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 60
    for page in pages:
        fetches = Fetches()
        fetches.feed(page.read_text(encoding="utf-8"))
        assert len(fetches.addresses) >= 3
        for address in fetches.addresses:
            assert not re.match(r"(https?:)?//", address), f"{page}: {address}"
            if not address.startswith("data:") and page.name != "404.html":
                target = page.parent / address.partition("#")[0].partition("?")[0]
                assert target.exists(), f"{page}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site as a server shows it: from a folder, browsers forbid the search its index."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
)
def test_pages_in_a_browser(address: str, width: int, scheme: Any) -> None:
    """Nothing is fetched or reported, and no page scrolls sideways."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None and os.environ.get("WEGEFT_NEED_BROWSER") == "1":
        pytest.fail("WEGEFT_NEED_BROWSER=1, but there is no Chromium")
    if executable is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    reported: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("pageerror", lambda error: reported.append(str(error)))
        page.on(
            "request",
            lambda r: reported.append(r.url) if not r.url.startswith((address, "data:")) else None,
        )
        for name in ("index", "method", "architecture", "recipe", "troubleshooting", "api"):
            page.goto(f"{address}/{name}.html")
            page.wait_for_selector("article h1")
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} is {wide} pixels too wide"
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            is_dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
            assert is_dark == (scheme == "dark"), name
        page.keyboard.press("/")
        page.keyboard.type("learning rate")
        page.wait_for_selector(".md-search-result__link")
        browser.close()
    assert reported == []


def test_no_diagram_is_left_to_a_script_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page
    assert (site / "roads.html").read_text(encoding="utf-8").count('<svg class="diagram"') == 4
    assert (site / "architecture.html").read_text(encoding="utf-8").count("<svg class=") >= 1


def test_every_page_is_reached_from_the_navigation(repository: Path, site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    pages = sorted((repository / "docs").glob("*.md"))
    assert len(pages) >= 24
    for page in pages:
        assert f'href="{page.stem}.html"' in start or page.stem == "index", page
    for title in ("Decisions", "API", "Changelog", "Contributing"):
        assert re.search(rf'class="md-ellipsis">\s*{title}\s*<', start), title
    decisions = (site / "decisions" / "index.html").read_text(encoding="utf-8")
    for page in sorted((repository / "docs" / "decisions").glob("*.md")):
        assert f'href="{page.stem}.html"' in decisions, page


def test_the_api_page_shows_every_exported_name(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in wegeft_cli.__all__:
        if name != "__version__":
            assert re.search(rf'id="wegeft_cli\.[\w.]*\.{name}"', page), name
    assert "wegeft_cli.methods.wegeft.equations.delta_weight" in page


def test_the_picture_is_the_scripts(
    repository: Path, load_script: Callable[[str], ModuleType]
) -> None:
    script = load_script("method_picture")
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw_picture()
    assert "prefers-color-scheme: dark" in script.draw_picture()
    for page in ("README.md", "docs/index.md", "docs/method.md"):
        assert "images/method.svg" in (repository / page).read_text(encoding="utf-8"), page


def test_flowcharts_keep_boxes_labels_and_groups(load_script: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("mkdocs")
    script = load_script("site_hooks")
    nodes, edges = script.read_flowchart(
        'flowchart TD\n    A["a/one.py"] -- "rows" --> B["b.py"]\n    A --> c & D["d.py"] --> B\n'
    )
    assert nodes == {"A": "a/one.py", "B": "b.py", "c": "c", "D": "d.py"}
    assert edges == [
        ("A", "rows", "B"), ("A", "", "c"), ("A", "", "D"), ("c", "", "B"), ("D", "", "B")
    ]  # fmt: skip
    picture = script.draw_flowchart('flowchart TD\n    A["a<b"] -- "rows" --> B["b.py"]\n')
    assert "a&lt;b" in picture
    assert picture.count("<rect") == 2

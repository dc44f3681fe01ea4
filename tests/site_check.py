"""The documentation in a browser: `make site-check` builds it and runs this.

Every page of docs/_build/html is opened once, with the network cut off, and looked at in three
widths, light and dark. It is no test_*.py, since `make test` builds no documentation.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from .helpers import ROOT
from .test_site import NETWORKS, chosen

SITE = Path(os.environ.get("FASTNORM_SITE", ROOT / "docs" / "_build" / "html"))
AXE = Path(os.environ.get("FASTNORM_AXE", Path(sys.prefix, ".stamps", "axe.min.js")))
WIDTHS = (400, 768, 1400)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith("_static/")]
# How axe sees a page: pages that a program has written in turns the one or the other way, the
# rest in both.
LOOKS = ((400, "dark"), (1400, "light"))
WRITTEN = {page for page in PAGES if "generated/" not in page and not page.startswith("_modules/")}

# Milliseconds after a change of the width until the theme has looked which parts scroll.
DEBOUNCED = 400

# What is wrong with the page as it is drawn now, as texts.
FAULTS = """() => {
  const found = [], page = document.documentElement
  const scrolls = e => e && e.tagName !== "ARTICLE" &&
    (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
  // the theme has the article scroll where something in it is too wide: that is a fault, too
  for (const box of [page, ...document.querySelectorAll("main, .bd-article-container, article")])
    if (box.scrollWidth > box.clientWidth + 1)
      found.push(`${box.tagName} is ${box.scrollWidth - box.clientWidth} pixels too wide: ` +
        [...box.querySelectorAll("article *")]
          .filter(e => e.getBoundingClientRect().right > box.getBoundingClientRect().right + 1)
          .filter(e => !scrolls(e.parentElement)).slice(0, 3)
          .map(e => `${e.tagName}.${e.className}`).join(", "))
  const edge = document.querySelector("article, main").getBoundingClientRect().right
  for (const table of document.querySelectorAll("article table"))
    if (table.getBoundingClientRect().right > edge + 1 && !scrolls(table.parentElement))
      found.push("a table is cut off: " + table.textContent.trim().slice(0, 40))
  for (const image of document.images) {
    if (image.loading === "lazy") continue
    if (!image.complete || !image.naturalWidth) found.push("not drawn: " + image.src)
    if (!image.hasAttribute("alt")) found.push("no alternative text: " + image.src)
  }
  for (const formula of document.querySelectorAll("math")) {
    const {width, height} = formula.getBoundingClientRect()
    const hidden = !formula.checkVisibility()
    if (!hidden && (width < 2 || height < 2)) found.push("not drawn: " + formula.textContent)
  }
  if (document.querySelector("math") && ![...document.fonts].some(
    font => /STIX Two Math/.test(font.family) && font.status === "loaded"))
    found.push("the formulas' font is missing")
  return found
}"""
AXE_RUN = """async () => {
  const {violations} = await axe.run(document, {resultTypes: ["violations"]})
  return violations.filter(v => ["serious", "critical"].includes(v.impact)).map(
    ({id, nodes}) => `${id}: ${nodes.length} times, first ${nodes[0].target}` +
      ` ${nodes[0].html.slice(0, 200)} (${nodes[0].failureSummary.slice(0, 300)})`)
}"""
DRESS = """mode => {
  document.documentElement.dataset.theme = document.documentElement.dataset.mode = mode
}"""


# --- Links ----------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page links to or shows, and the places that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {given[key] or "" for key in ("id", "name") if key in given}
        wanted = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}
        if tag in wanted and given.get(wanted[tag]):
            self.targets.append(given[wanted[tag]] or "")


def test_no_link_is_broken() -> None:
    pages = {page: Links((SITE / page).read_text(encoding="utf-8")) for page in PAGES}
    assert len(pages) > 50, "make docs writes them"
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            address, place = urldefrag(unquote(parts._replace(query="").geturl()))
            path = (SITE / page).parent / address if address else SITE / page
            path = path / "index.html" if path.is_dir() else path
            name = os.path.relpath(path, SITE)
            if not path.is_file() or (name in pages and place not in pages[name].places):
                broken.append(f"{page}: {target}")
    assert not broken


# --- In the browser -------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the pages and says nothing."""

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the pages are served."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Open the system's Chromium."""
    found = os.environ.get("FASTNORM_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), ""
    )
    if not found:
        pytest.skip(
            f"no browser here: none of {', '.join(BROWSERS)} (Debian: apt-get install chromium)"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page of the browser, and what it complained of since it was last asked."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address, self.complaints = address, list[str]()
        self.page = browser.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", self._response)
        self.page.route("**/*", self._route)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    def _route(self, route: Any) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.complaints.append(f"asks the network for {route.request.url}")
            route.abort()

    def open(self, name: str) -> Any:
        self.complaints.clear()
        self.page.set_viewport_size({"width": WIDTHS[0], "height": 900})
        self.page.goto(self.address + name)
        return self.page


@pytest.fixture(scope="module")
def visit(browser: Any, address: str) -> Visit:
    """Open a page that is used again and again."""
    return Visit(browser, address)


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, visit: Visit) -> None:
    """No complaint, nothing cut off or missing, no serious fault for those who do not see it."""
    assert AXE.exists(), "make site-check fetches axe-core"
    page, found = visit.open(name), list[str]()
    page.evaluate("document.fonts.ready.then(() => null)")
    page.add_style_tag(content="* { transition: none !important }")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    looks = LOOKS if name in WRITTEN else LOOKS[PAGES.index(name) % 2 :][:1]
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for mode in ("light", "dark"):
            page.evaluate(DRESS, mode)
            faults = page.evaluate(FAULTS)
            if (width, mode) in looks:
                page.wait_for_timeout(DEBOUNCED)
                faults += page.evaluate(AXE_RUN)
            found += [f"{width}, {mode}: {fault}" for fault in faults]
    found += visit.complaints
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("group_norm", "fastnorm.group_norm"),
        ("pytorch", "Coming from PyTorch"),
        ("batch size 2", "Which norm to use"),
    ],
)
def test_search_finds(words: str, expected: str, visit: Visit) -> None:
    """Among the first five."""
    page = visit.open(f"search.html?q={words.replace(' ', '+')}")
    page.wait_for_function("document.querySelectorAll('ul.search li').length > 0")
    page.wait_for_function(
        "/finished|found/i.test(document.querySelector('.search-summary').textContent)"
    )
    titles = page.locator("ul.search li > a").all_inner_texts()
    assert expected in titles[:5]
    assert not visit.complaints


# --- What the first page leads to -----------------------------------------------------------------


def test_two_questions_are_answered_within_one_click(visit: Visit) -> None:
    page = visit.open("index.html")
    page.get_by_role("link", name="Which norm for batch size 2?").click()
    answer = page.locator("#chooser output")
    answer.wait_for()
    assert "Group norm" in answer.inner_text()
    assert answer.evaluate("e => e.getBoundingClientRect().top < window.innerHeight")
    visit.open("index.html")
    page.get_by_role("link", name="How do I use it in PyTorch?").click()
    assert page.locator("h1").inner_text().startswith("Coming from PyTorch")
    assert not visit.complaints


def test_the_chooser_shows_the_answers_of_its_file(visit: Visit) -> None:
    """For every network, on both sides of every limit."""
    page = visit.open("which-norm.html")
    shown = page.locator("#chooser output")
    for network in NETWORKS:
        page.select_option("#chooser select", network)
        for batch in (1, 15, 16, 31, 32, 1000):
            page.fill("#chooser input", str(batch))
            answer = chosen(network, batch)
            found = shown.locator("strong").inner_text(), shown.locator("code").inner_text()
            assert found == (answer["norm"], answer["call"])
    for wrong in ("", "-3", "0"):
        page.fill("#chooser input", wrong)
        assert shown.locator("strong").inner_text()
    assert not visit.complaints

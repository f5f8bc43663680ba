"""The report page in a browser: narrow and wide, light and dark, on screen and on paper."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, axe_source, open_browser
from commands import ROOT, run
from runs import documented_log
from test_report import import_log

from nanogauge.runlog.reader import LOG_NAME

SHOWN = [(390, 844, "dark"), (1440, 900, "light")]
PAGES = ["documented", "gpu", "dead"]

OVERFLOWING = """
const wide = [];
for (const one of document.querySelectorAll("body *")) {
  const box = one.getBoundingClientRect();
  if (box.right > innerWidth + 1 && !one.closest("nav, .wrap, svg")) wide.push(one.outerHTML);
}
return [document.documentElement.scrollWidth, innerWidth, wide.map(html => html.slice(0, 200))];
"""
CUT_OFF = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push(text.textContent);
  }
}
return found;
"""
OVERLAPPING = """
const found = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const boxes = [...svg.querySelectorAll("text")]
    .map(text => [text.textContent, text.getBoundingClientRect()]);
  for (const [i, [one, a]] of boxes.entries())
    for (const [other, b] of boxes.slice(i + 1))
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        found.push([svg.closest("figure").id, one, other]);
}
return found;
"""
SERIOUS_VIOLATIONS = """
const done = arguments[arguments.length - 1];
axe.run().then(found => done([found.passes.length, found.violations
  .filter(one => ["serious", "critical"].includes(one.impact))
  .map(one => [one.id, one.nodes.map(node => node.html.slice(0, 200))])]));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make the pages of the documented run, of a run with every sensor and of a dead run."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "log.txt").write_text(documented_log(), encoding="utf-8")
    done = import_log(folder / "log.txt", folder / "documented")
    assert done.returncode == 0, done.stderr
    long_ago = time.time() - 86_400
    for name, arguments in (("gpu", [2000]), ("dead", [20_000, "--until", 812])):
        for command in (
            ["bench/make_run.py", *arguments, folder / name, "--sensors", 4000],
            ["report.py", folder / name],
        ):
            if name == "dead" and command[0] == "report.py":
                os.utime(folder / name / LOG_NAME, (long_ago, long_ago))
            done = run(*map(str, command), PYTHONPATH=str(ROOT))
            assert done.returncode == 0, done.stderr
    return {name: folder / name / "report.html" for name in PAGES}


@pytest.mark.parametrize(("width", "height", "scheme"), SHOWN)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_without_overlaps_and_is_accessible(
    browser: Browser, pages: dict[str, Path], name: str, width: int, height: int, scheme: str
) -> None:
    browser.show(pages[name], width, height, scheme)
    whole, window, wide = browser.run(OVERFLOWING)
    assert whole <= window == width
    assert wide == []
    for script in (CUT_OFF, OVERLAPPING):
        assert browser.run(script) == []
    assert browser.console() == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == (scheme == "light")
    browser.run(axe_source())
    passed, violations = browser.run_async(SERIOUS_VIOLATIONS)
    assert passed > 10
    assert violations == []


def header(browser: Browser) -> str:
    text = browser.run("return document.querySelector('header').innerText")
    return str(text).replace("\u00a0", " ")


def test_the_first_screen_has_the_outcome(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["documented"], 1440, 900, "light")
    inside = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    for part in (".say", ".outcomes", ".cards", "nav"):
        assert browser.run(inside, part) <= 900, part
    text = header(browser)
    for words in ("Finished after 20,001 steps", "21.9 h", "4 contradicted", "3.91 s", "69 %"):
        assert words in text, words
    browser.show(pages["dead"], 390, 844, "dark")
    text = header(browser)
    for words in ("Died at step 812 of 20,000", "Would take", "Time so far", "Energy so far"):
        assert words in text, words


def test_the_navigation_bar_covers_no_heading_it_links_to(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["gpu"], 390, 844, "light")
    for target in browser.run("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"):
        assert target.startswith("#")
        top, bar = browser.run(
            "const heading = document.querySelector(arguments[0]); heading.scrollIntoView();"
            "return [heading.getBoundingClientRect().top,"
            " document.querySelector('nav').getBoundingClientRect().bottom]",
            target,
        )
        assert top >= bar - 1, target


def test_a_printed_page_is_white_without_navigation(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["gpu"], 700, 900, "dark")
    browser.emulate_print()
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.run(style, "nav", "display") == "none"
    assert browser.run(style, "body", "backgroundColor") == "rgb(255, 255, 255)"

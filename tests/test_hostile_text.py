"""Any text in a run folder is shown on the page and never becomes markup."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from commands import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from runs import make_finished

from nanogauge.analysis.report_model import Report, build_report, claims_of
from nanogauge.analysis.status import ShownEvent
from nanogauge.report.escape import LONGEST, markdown, visible
from nanogauge.report.html import render_html, render_markdown, write_report
from nanogauge.runlog.folder import RunFolder
from nanogauge.runlog.history import RunHistory
from nanogauge.schema import Event, Prediction

WORDS_OF_OURS = {"id", "verdict", "judged_by", "status", "source", "prediction", "kind", "unit", "level"}
"""Fields with a fixed set of values, left unchanged."""
MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></svg><iframe src=//x>",
    "]]> --> {{ 7*7 }} {% raw %}",
    "&lt;b&gt; &amp; &#60;",
    "| a | b |\n|---|---|\n```\n# no heading",
    "\u202egnp.exe\u2066 \x00\x07\x1b[31m\x7f\x85\u2028 \ud800",
    "w" * 3000,
    "# a heading",
    "- - -",
    "1. one",
    "![x](y) [z](//x) `code` ~~no~~ **bold** _thin_ __x__",
]
texts = st.one_of(st.sampled_from(MARKUP), st.text(min_size=1, max_size=60))
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@cache
def whole() -> tuple[Report, RunFolder, RunHistory]:
    """Return a run that fills every part of a page."""
    folder = Path(mkdtemp())
    done = run("bench/make_run.py", 120, folder / "run", "--sensors", 40, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return build_report(folder / "run", claims_of(folder, ROOT / "predictions" / "seed_zh.toml"))


def with_text(value: Any, text: str) -> Any:
    """Return a copy of nested values with every untrusted text replaced."""
    match value:
        case str():
            return text
        case dict():
            return {
                key: one if key in WORDS_OF_OURS and isinstance(one, str) else with_text(one, text)
                for key, one in value.items()
            }
        case list():
            return [with_text(one, text) for one in value]
        case _:
            return value


def hostile(text: str) -> tuple[Report, RunFolder, RunHistory]:
    """Return the run with this text in every field that holds one."""
    report, folder, recorded = whole()
    machine = {f"{key} {text}": with_text(value, text) for key, value in folder.machine.items()}
    prediction = with_text(folder.prediction.model_dump(), text)
    written = text.encode(errors="replace").decode()  # UTF-8 has no lone surrogates
    copied = RunFolder(
        folder.path,
        replace(folder.spec, name=written, dataset=written),
        machine,
        Prediction.model_validate(prediction),
        prediction_sha256=text,
        config_toml=f"# {written}",
    )
    events = [Event(level=e, what=w, text=text, step=1) for e in ("info", "alarm") for w in (text, "sample")]
    log = RunHistory(**{**vars(recorded), "events": events, "end": None})
    changed = Report.model_validate(with_text(report.model_dump(), text))
    running = changed.run.model_copy(update={"status": "unfinished"})
    return changed.model_copy(update={"run": running}), copied, log


class Parsed(HTMLParser):
    """Elements, attributes and words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


@given(texts)
@settings(max_examples=15, deadline=None)
def test_no_text_becomes_markup_or_hides_anything(text: str) -> None:
    """Control characters are shown as symbols, direction marks by name."""
    pages = render_html(*hostile(text)), render_markdown(*hostile(text))
    plain, page = Parsed(render_html(*hostile("word"))), Parsed(pages[0])
    assert page.elements <= plain.elements
    assert page.attributes <= plain.attributes
    assert "script" not in page.elements
    assert not any(name.startswith("on") for name in page.attributes)
    for shown in pages:
        assert not UNSEEN.search(shown)
        shown.encode()  # no half of a surrogate pair


@given(texts)
@settings(max_examples=15, deadline=None)
def test_no_text_is_read_as_markdown_or_breaks_a_table(text: str) -> None:
    """Table rows have as many cells as the head, and no text opens an element."""
    page = render_markdown(*hostile(text))
    assert parts(page) == parts(render_markdown(*hostile("word")))
    outside = re.sub(r"^(`{3,})\n.*?\n\1$", "", page, flags=re.S | re.M)
    assert "<" not in outside
    columns = 0
    for line in outside.split("\n"):
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else 0
        assert cells in (0, columns or cells), line
        columns = cells


def parts(page: str) -> Counter[str]:
    """Count the Markdown elements of a page."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
    found = Counter(one.type for token in tokens for one in (token, *(token.children or [])))
    return Counter({kind: n for kind, n in found.items() if not kind.startswith("text")})


@pytest.mark.parametrize("text", MARKUP)
def test_a_text_is_shown_completely(text: str) -> None:
    page = Parsed(render_html(*hostile(text)))
    assert sum(visible(text).strip() in words for words in page.words) > 20


def test_a_long_text_is_cut_and_says_so() -> None:
    shown = visible("x" * 50_000)
    assert len(shown) < LONGEST + 100 and "45,000 characters more" in shown


def test_a_log_full_of_alarms_makes_a_page_that_can_be_mailed() -> None:
    report, folder, recorded = whole()
    events = [
        Event(level=level, what="w", text="<" * 9000, step=n, about="cost")
        for n in range(10_000)
        for level in ("alarm", "warning")
    ]
    alarm = ShownEvent(what="w", step=1, elapsed_seconds=2.0, text="<" * 9000)
    changed = {"alarms": [alarm] * 10_000, "warnings": [f"{n}" * 9000 for n in range(999)]}
    log = RunHistory(**{**vars(recorded), "events": events})
    page = render_html(report.model_copy(update=changed), folder, log)
    assert len(page.encode()) < 1_500_000
    assert "9,960 more in the log" in page
    assert ">959 more in the log" in page


def test_markdown_leaves_numbers_and_names_alone() -> None:
    assert markdown("tokens_per_step = 524,288 (3.5 %)") == "tokens_per_step = 524,288 (3.5 %)"
    assert markdown("a * b | _c_ <d>") == r"a \* b \| \_c\_ &lt;d&gt;"
    assert [markdown(text) for text in ("-3 s", "1.5 s", "1. a")] == ["-3 s", "1.5 s", r"1\. a"]


def test_a_folder_with_surrogates_in_machine_json_is_reported(tmp_path: Path) -> None:
    """JSON can write them, UTF-8 cannot."""
    make_finished(tmp_path)
    machine = r'{"gpu": "\ud800 <script>", "list": [{"a": "|"}]}'
    (tmp_path / "machine.json").write_text(machine)
    write_report(*build_report(tmp_path, None))
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")

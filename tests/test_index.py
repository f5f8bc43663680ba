"""Several runs: a start page that lists all of them, and a comparison of some."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from commands import run
from runs import make_finished, make_folder, steps, write

import report
from nanogauge.errors import BadInput
from nanogauge.runlog.reader import FILE_NAME

EVIL_FOLDER = "<script>alert(1)<_script>"


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two finished runs, a dead one, four broken folders and one that is no run."""
    root = tmp_path_factory.mktemp("many") / "runs"
    make_finished(root / "old", name="old")
    make_folder(root / "new" / "nested", name="newest", unix_time=1.75e9)
    write(root / "new" / "nested", steps(0, 60, lambda step: 3.8 + 0.01 * (step % 7)))
    os.utime(root / "new" / "nested" / FILE_NAME, (1.76e9, 1.76e9))
    make_finished(root / EVIL_FOLDER, name="hostile", step_seconds=4.5)
    for name in ("old", EVIL_FOLDER):
        assert run("report.py", root / name).returncode == 0
    (root / "empty").mkdir()
    (root / "empty" / "machine.json").touch()
    make_finished(root / "damaged")
    write(root / "damaged", b"\x00\xff{}\n")
    make_finished(root / "changed")
    (root / "changed" / "prediction.json").write_text("{}")
    make_finished(root / "javascript:alert(1)")
    (root / "javascript:alert(1)" / "spec.json").unlink()
    (root / "javascript:alert(1)" / "report.html").touch()
    (root / "no run").mkdir()
    (root / "no run" / "notes.txt").touch()
    return root


@pytest.fixture(scope="module")
def index(runs: Path) -> dict[str, Any]:
    done = run("report.py", "--index", runs, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def entry(index: dict[str, Any], folder: str) -> dict[str, Any]:
    (found,) = (e for e in index["runs"] if e["folder"] == folder)
    return dict(found)


def test_every_run_folder_is_listed_and_nothing_else(index: dict[str, Any]) -> None:
    folders = {e["folder"] for e in index["runs"]}
    broken = {"empty", "damaged", "changed", "javascript:alert(1)"}
    assert folders == {"old", "new/nested", EVIL_FOLDER, *broken}
    assert {e["folder"] for e in index["runs"] if e["problem"]} == broken


def test_an_entry_agrees_with_report_json(runs: Path, index: dict[str, Any]) -> None:
    report_json = json.loads((runs / "old" / "report.json").read_text(encoding="utf-8"))
    total = next(row for row in report_json["rows"] if row["id"] == "total_seconds")
    old = entry(index, "old")
    assert old["headline"] == report_json["run"]["headline"]
    assert old["predicted_total"] == total["analytic"]
    assert old["actual_total_s"] == total["measured"]["value"]
    assert old["prediction"] == total["prediction"]
    assert old["report"] == "./old/report.html"
    dead = entry(index, "new/nested")
    assert dead["state"] == "died"
    assert dead["actual_total_s"] is None
    assert dead["projected_low_s"] < dead["projected_total_s"] < dead["projected_high_s"]
    assert dead["report"] is None


def test_the_newest_run_comes_first(index: dict[str, Any]) -> None:
    began = [e["started_unix"] or e["log_written_unix"] or 0.0 for e in index["runs"]]
    assert began == sorted(began, reverse=True)
    readable = [e["name"] for e in index["runs"] if not e["problem"]]
    assert readable[0] == "newest"


def test_a_broken_folder_is_listed_with_the_reason_in_one_sentence(index: dict[str, Any]) -> None:
    for folder, words in (
        ("empty", FILE_NAME),
        ("damaged", "is damaged"),
        ("changed", "prediction.json"),
        ("javascript:alert(1)", "spec.json"),
    ):
        problem = entry(index, folder)["problem"]
        assert words in problem
        assert problem.endswith(".")
        assert "\n" not in problem


def test_the_start_page_has_no_script_and_links_only_existing_reports(
    runs: Path, index: dict[str, Any]
) -> None:
    page = (runs / "index.html").read_text(encoding="utf-8")
    links = Links(page)
    assert not links.tags & {"script", "link", "img", "iframe", "object"}
    assert "&lt;script&gt;alert(1)" in page
    assert sorted(links.found) == sorted(e["report"] for e in index["runs"] if e["report"])
    for link in links.found:
        assert link.startswith("./")
        assert ":" not in link
        assert (runs / unquote(link)).is_file()
    assert not re.search(r"(?:url\(|@import)", page)


def test_folder_names_may_be_any_bytes(tmp_path: Path) -> None:
    for name in (b"a\nb", b"\x1b[31mred", b"\xff\xfe"):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        make_finished(folder)
        (folder / "report.html").touch()
    done = run("report.py", "--index", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert sorted(Links(page).found) == [
        "./%1B%5B31mred/report.html",
        "./%FF%FE/report.html",
        "./a%0Ab/report.html",
    ]
    assert "\x1b" not in page
    listed = run("report.py", "--index", tmp_path, "--json")
    assert len(json.loads(listed.stdout)["runs"]) == 3


def test_a_folder_without_runs_has_an_empty_start_page(tmp_path: Path) -> None:
    done = run("report.py", "--index", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == []
    assert "0 runs" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--index", "{runs}/none"], "there is no folder"),
        (["--index", "{runs}/old"], "is the folder of one run"),
        (["--index", "{runs}", "{runs}/old"], "give no other run"),
        (["--index", "{runs}", "--serve", "{runs}/old"], "not both"),
        (["--index", "{runs}", "--gpu", "RTX 4070"], "--gpu does not go together with --index"),
        (["--index", "{runs}", "--out", "x"], "--out does not go together"),
        (["{runs}/old", "--port", "1"], "belongs to --serve"),
        (["{runs}/old", "{runs}/damaged"], "is damaged"),
        (["{runs}/old", "{runs}/none"], "there is no run folder"),
        (["{runs}/old", "{runs}/new/nested", "--claims", "x"], "--claims does not go together"),
        (["{runs}/old", "{runs}/new/nested", "--train.max-steps=4"], "does not go together"),
        (["--serve", "{runs}/old", "--json"], "--json does not go together with --serve"),
    ],
)
def test_conflicting_flags_are_refused_in_one_sentence(
    runs: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(BadInput) as refused:
        report.main([argument.format(runs=runs) for argument in arguments])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Compare three runs that are not given in order of their start."""
    out = tmp_path_factory.mktemp("out") / "comparison"
    names = ("new/nested", "old", EVIL_FOLDER)
    done = run("report.py", *(runs / name for name in names), "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8")) == found
    return out, found


def test_compared_runs_are_in_order_and_agree_with_their_own_reports(
    runs: Path, compared: tuple[Path, dict[str, Any]]
) -> None:
    _, found = compared
    assert [side["label"] for side in found["runs"]] == ["old", "hostile", "newest"]
    rows = {row["id"]: row for row in found["rows"]}
    for column, name in enumerate(("old", EVIL_FOLDER)):
        report_json = json.loads((runs / name / "report.json").read_text(encoding="utf-8"))
        for row in report_json["rows"]:
            if row["id"] not in rows:
                continue
            cell = rows[row["id"]]["cells"][column]
            assert cell["analytic"] == row["analytic"]
            assert cell["measured"] == (row["measured"] and row["measured"]["value"])
            assert cell["prediction"] == row["prediction"]
            if cell["factor"] is not None:
                assert cell["factor"] == pytest.approx(
                    row["measured"]["value"] / row["analytic"]["expected"]
                )
    assert rows["total_seconds"]["cells"][2]["measured"] is None
    assert "parameters" not in rows  # the same in each


def test_a_trend_is_the_error_run_by_run(compared: tuple[Path, dict[str, Any]]) -> None:
    out, found = compared
    rows = {row["id"]: row for row in found["rows"]}
    trends = {trend["id"]: trend["errors"] for trend in found["trends"]}
    expected = [cell["factor"] - 1 for cell in rows["step_seconds"]["cells"]]
    assert trends["step_seconds"] == pytest.approx(expected)
    assert trends["total_seconds"][2] is None
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert f"{100 * expected[0]:+.3g} % in old" in page
    assert f"{100 * expected[2]:+.3g} % in newest" in page
    assert not Links(page).found
    assert "<script" not in page


def test_a_comparison_is_written_beside_the_runs_by_default(runs: Path) -> None:
    done = run("report.py", runs / "old", runs / "new" / "nested")
    assert done.returncode == 0, done.stderr
    assert (runs / "comparison.html").is_file()
    for words in ("Time per step, steady", "newest", "held", "smaller than in the run before"):
        assert words in done.stdout
    (runs / "comparison.html").unlink()
    silent = run("report.py", runs / "old", runs / "new" / "nested", "--json")
    assert json.loads(silent.stdout)["schema"] == 1
    assert not (runs / "comparison.html").exists()

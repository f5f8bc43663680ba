"""Comparison of several runs, and the flags of report.py that go together."""

import json
from pathlib import Path

import pytest
from commands import run
from runs import make_finished, make_folder, steps, write

import report
from nanogauge.errors import BadInput


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two finished runs, a dead one and a damaged one."""
    root = tmp_path_factory.mktemp("runs")
    make_finished(root / "old", name="old")
    make_finished(root / "slow", name="\x1b[31mslow", step_seconds=4.5)
    make_folder(root / "new", name="newest", unix_time=1.75e9)
    write(root / "new", steps(0, 60, lambda step: 3.8 + 0.01 * (step % 7)))
    make_finished(root / "damaged")
    write(root / "damaged", b"\x00\xff{}\n")
    for name in ("old", "slow"):
        assert run("report.py", root / name).returncode == 0
    return root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{runs}/old", "{runs}/damaged"], "is damaged"),
        (["{runs}/old", "{runs}/none"], "there is no run folder"),
        (["{runs}/old", "{runs}/new", "--claims", "x"], "--claims does not go together"),
        (["{runs}/old", "{runs}/new", "--train.max-steps=4"], "does not go together"),
    ],
)
def test_conflicting_flags_are_refused_in_one_sentence(runs: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        report.main([argument.format(runs=runs) for argument in arguments])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compared_runs_are_in_order_and_agree_with_their_own_reports(runs: Path) -> None:
    done = run("report.py", *(runs / name for name in ("new", "old", "slow")), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [side["label"] for side in found["runs"]] == ["old", "\ufffd[31mslow", "newest"]
    rows = {cells[0]["id"]: cells for cells in found["rows"]}
    for column, name in enumerate(("old", "slow")):
        report_json = json.loads((runs / name / "report.json").read_text(encoding="utf-8"))
        own = {row["id"]: row for row in report_json["rows"]}
        assert [cells[column] for cells in rows.values()] == [own[row_id] for row_id in rows]
    assert rows["total_seconds"][2]["measured"] is None
    assert "parameters" not in rows  # the same in each


def test_a_comparison_is_printed_and_writes_nothing(runs: Path) -> None:
    before = sorted(runs.rglob("*"))
    done = run("report.py", runs / "old", runs / "slow")
    assert done.returncode == 0, done.stderr
    settings, step, _, *table = done.stdout.splitlines()
    assert settings.endswith("against old: the same settings")
    assert step.endswith("3.9 s -> 4.5 s, +15.4 %, more than the noise of single steps")
    assert any("held" in line for line in table)
    assert sorted(runs.rglob("*")) == before

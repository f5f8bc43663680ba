"""Unfinished runs: state, projected total, last events."""

import math
import os
import random
from pathlib import Path

import pytest
from runs import EVALUATION_SECONDS, EVERY, START_SECONDS, end, event, make_finished, make_folder, steps, write

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.report.html import render_report
from nanogauge.runlog.reader import LOG_NAME

NOW = 1.8e9


def report_of(folder: Path, age: float = 0.0) -> Report:
    """Report at NOW on a log last written `age` seconds before."""
    os.utime(folder / LOG_NAME, (NOW - age, NOW - age))
    return build_report(folder, None, now_unix=NOW)[0]


@pytest.mark.parametrize(
    ("age", "state", "words"),
    [
        (0.0, "running", "Running, last line 0 s ago: step 120 of 1,000 after 8.92 min."),
        (50.0, "running", "Running, last line 50 s ago: step 120 of 1,000"),
        (90.0, "silent", "Silent at step 120 of 1,000 after 8.92 min, and perhaps dead: no line"),
        (3 * 3600.0, "died", "Died at step 120 of 1,000 after 8.92 min: no line for 3 h, while"),
        (-3600.0, "running", "Running, last line 0 s ago"),  # the clock was set back
    ],
)
def test_a_run_is_dead_only_after_a_silence_far_longer_than_its_longest_work(
    tmp_path: Path, age: float, state: str, words: str
) -> None:
    """The longest work is an evaluation of 15 s."""
    make_folder(tmp_path)
    write(tmp_path, steps(0, 120))
    run = report_of(tmp_path, age).run
    assert run.status == "unfinished"
    assert run.state == state
    assert run.last_line_age_s == max(age, 0.0)
    assert run.headline.startswith(words)
    assert ("15 s" in run.headline) == (state != "running")


def test_before_the_first_step_silence_is_compared_with_its_prediction(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert report_of(tmp_path, 60.0).run.state == "running"
    dead = report_of(tmp_path, 10 * 3600.0).run
    assert dead.state == "died"
    assert "the first step was predicted to take at most" in dead.headline
    assert dead.projected_total_s is None


def test_the_report_of_a_finished_run_does_not_depend_on_its_time(tmp_path: Path) -> None:
    make_finished(tmp_path)
    first = render_report(*build_report(tmp_path, None, now_unix=NOW))
    assert render_report(*build_report(tmp_path, None, now_unix=NOW + 3e7)) == first
    run = report_of(tmp_path, 3e7).run
    assert run.state is run.last_line_age_s is run.projected_total_s is run.projected_how is None


def test_totals_of_an_unfinished_run_are_not_compared(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write(tmp_path, steps(0, 120) + end("stopped", 120, 535.0))
    report = report_of(tmp_path)
    rows = {row.id: row for row in report.rows}
    for name in ("tokens_total", "flops_total_6n", "total_seconds"):
        assert rows[name].measured is None
        assert rows[name].prediction is None
    assert "62,914,560 so far, after 120 of 1,000 steps" in rows["tokens_total"].why
    assert rows["step_seconds"].prediction == "held"
    assert report.run.headline.startswith("Stopped at step 120 of 1,000 after 8.92 min.")
    assert report.run.state is None


def test_a_log_cut_within_any_line_is_reported(tmp_path: Path) -> None:
    make_folder(tmp_path)
    whole = (tmp_path / LOG_NAME).read_bytes() + steps(0, EVERY + 3)
    pieces = whole.splitlines(keepends=True)
    for count in [*range(1, 8), len(pieces) - 2, len(pieces)]:
        (tmp_path / LOG_NAME).write_bytes(b"".join(pieces[:count]) + b'{"kind": "st')
        for age in (0.0, 1e5):
            report = report_of(tmp_path, age)
            texts = render_report(report, *build_report(tmp_path, None)[1:])
            assert "of 1,000" in texts["report.html"]
            cut = [text for text in report.warnings if "cut" in text]
            assert bool(cut) == (age > 0)  # a running process may be writing the line


@pytest.mark.parametrize("done", [60, 450, 999])
def test_the_projected_interval_contains_the_actual_total(tmp_path: Path, done: int) -> None:
    """Steps drift by 2 % and jitter by 1 %, evaluations vary by 5 %."""
    jitter = random.Random(7)
    noise = [jitter.gauss(0, 0.01) for _ in range(1000)]

    def step_seconds(step: int) -> float:
        return 3.9 * (1 + 0.02 * math.sin(step / 15) + noise[step])

    def evaluation_seconds(step: int) -> float:
        return EVALUATION_SECONDS * (1 + 0.05 * math.sin(step))

    make_folder(tmp_path)
    write(tmp_path, steps(0, done, step_seconds, evaluation_seconds))
    run = report_of(tmp_path).run
    total = START_SECONDS + sum(step_seconds(step) for step in range(1000))
    total += sum(evaluation_seconds(step) for step in range(0, 1001, EVERY)) + 1000 / EVERY - 1
    total += 1  # the last checkpoint
    low, high = run.projected_low_s, run.projected_high_s
    assert low is not None and high is not None
    assert low < total < high < low + 0.1 * total
    assert run.projected_total_s == pytest.approx(total, rel=0.01)
    assert f"{1000 - done:,} step" in str(run.projected_how)


def test_a_few_steps_give_an_interval_as_wide_as_the_prediction(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write(tmp_path, steps(0, 4))
    report = report_of(tmp_path)
    step = next(row.analytic for row in report.rows if row.id == "step_seconds")
    low, total = report.run.projected_low_s, report.run.projected_total_s
    assert step is not None and low is not None and total is not None
    assert step.low / step.expected * total < low < 0.95 * total


def test_the_last_events_of_a_dead_run_are_listed(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write(tmp_path, steps(0, 112) + event("first") + event("x" * 5000, "warning"))
    last = {e.what: e for e in report_of(tmp_path, 1e6).last_events}
    assert last["step"].step == 111
    assert last["step"].text == "loss 4, 3.9 s"
    assert last["evaluation"].step == 100
    assert last["checkpoint"].text.startswith("12 steps since")
    assert len(last["told"].text) < 400
    make_finished(tmp_path / "other")
    assert build_report(tmp_path / "other", None)[0].last_events == []

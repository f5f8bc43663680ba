"""Incidents of a run: restarts, rollbacks, skipped updates, and their cost."""

import os
from pathlib import Path
from typing import Any

import pytest
from runs import encoded, end, make_finished, make_folder, prediction_of, steps, write

from nanogauge.analysis.report_model import Report, build_report
from nanogauge.report.html import render_report
from nanogauge.runlog.folder import load
from nanogauge.runlog.history import LONGEST_GAP_SECONDS
from nanogauge.runlog.lock import acquire_lock
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.schema import Event, Sensor, Start, Step

BEGAN = 1.7e9 - 1.0
"""Unix time at which the clock of the first process was zero."""


def start(folder: Path, first_step: int, began: float | None, elapsed: float, **more: Any) -> bytes:
    """Return a start line of a process whose clock was zero at `began`."""
    line = Start(
        elapsed_seconds=elapsed,
        unix_time=None if began is None else began + elapsed,
        max_steps=1000,
        first_step=first_step,
        prediction_sha256=load(folder).prediction_sha256,
        device="RTX 4070",
        **more,
    )
    return encoded(line)


def event(what: str, step: int, elapsed: float, text: str) -> bytes:
    line = Event(elapsed_seconds=elapsed, what=what, step=step, text=text, level="warning")
    return encoded(line)


def step(number: int, elapsed: float) -> bytes:
    return encoded(Step(step=number, step_seconds=3.9, elapsed_seconds=elapsed))


def eventful(folder: Path) -> None:
    """Write a run with skipped updates, a rollback, and restarts after a hang and a death."""
    make_folder(folder)
    write(folder, steps(0, 112))  # a checkpoint after 100 steps
    write(folder, event("update_skipped", 110, 480.0, "The update of step 110 was skipped."))
    write(folder, event("checkpoint_failed", 111, 481.0, "No checkpoint at step 111: full."))
    write(folder, event("update_skipped", 111, 482.0, "The update of step 111 was skipped."))
    write(folder, event("rollback", 111, 490.0, "Back to step 100, the data in another order."))
    write(folder, start(folder, 100, BEGAN, 500.0, continues=True, rollbacks=1, restart=0))
    write(folder, step(100, 504.0) + step(101, 508.0))
    write(folder, event("hung", 102, 1100.0, "No step for 10 min."))
    second = BEGAN + 1100.0 + 35.0
    write(folder, start(folder, 100, second, 2.0, rollbacks=1, restart=1) + step(100, 10.0))
    write(folder, start(folder, 100, second + 10.0 + 3600.0, 2.0, rollbacks=1))
    write(folder, step(100, 10.0) + end("stopped", 101, 11.0))


def report_of(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return report.json, and all texts by file name."""
    built = build_report(folder, None)
    return built[0].to_json(), render_report(*built)


def test_incidents_are_listed_in_order_with_time_step_and_cost(tmp_path: Path) -> None:
    eventful(tmp_path)
    report, texts = report_of(tmp_path)
    night = report["night"]
    entries = [(h["what"], h["step"], h["unix_time"], h["text"]) for h in night["happenings"]]
    skipped = "2 updates were skipped, the last at step 111: non-finite loss or gradient."
    back = "Back to step 100, the data in another order. 12 steps were repeated (46.8 s)."
    hung = "Restarted by --supervise, 35 s after the last process hung; 2 steps were repeated (7.8 s)."
    died = (
        "Restarted by hand, 60 min after the last process died without an end line: "
        "killed, crashed, or without power; 1 step was repeated (3.9 s)."
    )
    assert entries == [
        ("update_skipped", 110, BEGAN + 480, skipped),
        ("checkpoint_failed", 111, BEGAN + 481, "No checkpoint at step 111: full."),
        ("rollback", 111, BEGAN + 490, back),
        ("hung", 102, BEGAN + 1100, "No step for 10 min."),
        ("restart", 100, BEGAN + 1137, hung),
        ("restart", 100, BEGAN + 1147 + 3600, died),
    ]
    assert night["summary"] == (
        "Restarted 2 times, 1 of them by --supervise; 2 updates skipped; rolled back once; "
        "15 steps were repeated (58.5 s); no process ran for 60.6 min; hung once; a checkpoint "
        "failed once."
    )
    counted = {name: report["run"][name] for name in ("restarts", "lost_steps", "rollbacks")}
    assert counted == {"restarts": 2, "lost_steps": 15, "rollbacks": 1}
    assert report["run"]["skipped_updates"] == 2
    for name in ("report.html", "report.md"):
        text = texts[name].replace("\u00a0", " ")
        assert f" {entries[1][3]}</p>" not in text and f"> {entries[1][3]}" not in text  # not a warning
        section = text.partition("What happened in the night")[2]
        places = [section.find(one[3][:40]) for one in entries]
        assert -1 not in places and places == sorted(places)

    # The clock continues after a rollback: wall time is 1,100 s, not 490 + 1,100 s.
    ledger = report["time_ledger"]
    assert ledger["gap_s"] == pytest.approx(35 + 3600)
    assert ledger["wall_s"] == pytest.approx(1100 + 10 + 11 + 35 + 3600)
    parts = sum(value for name, value in ledger.items() if name != "wall_s")
    assert parts == pytest.approx(ledger["wall_s"])


def test_a_run_without_incidents_has_only_a_summary(tmp_path: Path) -> None:
    make_finished(tmp_path)
    report, _ = report_of(tmp_path)
    assert report["night"] == {
        "summary": "Nothing: one process, no update was skipped, and no checkpoint lost.",
        "happenings": [],
    }
    assert report["run"]["restarts"] == report["run"]["skipped_updates"] == 0
    assert report["time_ledger"]["gap_s"] == 0


def finished_after(folder: Path, began: float | None) -> Report:
    """Report on a run that died after 60 steps and finished in a process begun at `began`."""
    make_folder(folder, max_steps=100)
    write(folder, steps(0, 60))
    write(folder, start(folder, 50, began, 2.0))
    write(folder, b"".join(step(n, 10.0 + 4.0 * (n - 50)) for n in range(50, 100)))
    write(folder, end("finished", 100, 210.0))
    return build_report(folder, None)[0]


def test_the_total_excludes_the_gap_between_processes_and_names_it(tmp_path: Path) -> None:
    died = 20.0 + 60 * 3.9 + 2 * 15.0 + 1.0
    report = finished_after(tmp_path, BEGAN + died + 7200.0)
    total = next(row.measured for row in report.rows if row.id == "total_seconds")
    assert total is not None and report.attribution is not None
    assert total.value == pytest.approx(died + 210.0)
    assert "the run's 2 processes; excludes the 2 h between them, when none ran" in total.how
    assert report.time_ledger.wall_s == pytest.approx(died + 210.0 + 7200.0)
    assert report.attribution.actual_s == total.value
    difference = report.attribution.actual_s - report.attribution.predicted_s
    assert sum(part.seconds for part in report.attribution.parts) == pytest.approx(difference)


@pytest.mark.parametrize("began", [None, BEGAN + 100.0, BEGAN - 1e8, BEGAN + 2 * LONGEST_GAP_SECONDS])
def test_an_implausible_or_unlogged_gap_is_not_measured(tmp_path: Path, began: float | None) -> None:
    report = finished_after(tmp_path, began)
    assert report.time_ledger.gap_s is None
    total = next(row.measured for row in report.rows if row.id == "total_seconds")
    assert total is not None and "not known" in total.how
    assert report.time_ledger.wall_s == pytest.approx(total.value)
    assert "at an unknown time" in report.incidents.entries[0].text
    assert "no process ran" not in report.incidents.summary


def test_energy_sums_processes_even_if_the_next_clock_starts_higher(tmp_path: Path) -> None:
    spec, _ = prediction_of(100)
    make_folder(tmp_path, max_steps=100)

    def read(elapsed: float, joules: float) -> bytes:
        energy = {"energy_joules": joules, "energy_source": "counter"}
        reading = {"elapsed_seconds": elapsed, "power_watts": 200.0, **energy}
        return encoded(Sensor.model_validate(reading))

    write(tmp_path, steps(0, 2) + read(28.0, 0.9e6))
    write(tmp_path, start(tmp_path, 0, BEGAN + 100.0, 2.0))
    write(tmp_path, b"".join(step(n, 50.0 + 4.0 * n) for n in range(100)))
    write(tmp_path, read(29.0, 1.8e6) + read(450.0, 3.6e6) + end("finished", 100, 451.0))
    rows = {row.id: row for row in build_report(tmp_path, None)[0].rows}
    energy, cost = rows["energy_kwh"].measured, rows["cost"].measured
    assert energy is not None and cost is not None and spec.cost.price_per_kwh is not None
    assert energy.value == pytest.approx(1.25)
    assert cost.value == pytest.approx(1.25 * spec.cost.price_per_kwh)
    assert energy.how.endswith(
        "of all 2 processes; with 2 repeated steps; excludes what a process without an end line "
        "used after the last reading"
    )


def state(folder: Path, age: float) -> tuple[str | None, str]:
    now = 1.8e9
    os.utime(folder / LOG_NAME, (now - age, now - age))
    report, run_folder, recorded = build_report(folder, None, now_unix=now)
    render_report(report, run_folder, recorded)
    return report.run.state, report.run.headline


@pytest.mark.parametrize(("age", "word"), [(0.0, "running"), (90.0, "silent"), (1e5, "hung")])
def test_a_run_is_dead_exactly_when_its_lock_is_free(tmp_path: Path, age: float, word: str) -> None:
    make_folder(tmp_path)
    write(tmp_path, steps(0, 120))
    assert state(tmp_path, 0.0)[0] == "running"  # no lock: judged by silence
    lock = acquire_lock(tmp_path)
    found, headline = state(tmp_path, age)
    assert found == word
    assert ("its process is alive, but no line for" in headline) == (word != "running")
    lock.close()
    found, headline = state(tmp_path, age)
    assert found == "died"
    assert "its process is gone: no process on this machine holds the run's lock" in headline
    write(tmp_path, end("stopped", 120, 535.0))
    assert state(tmp_path, age)[0] is None

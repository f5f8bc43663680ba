"""The W&B mirror with a server that works, fails, or is slow."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run, wait_until
from mirrored import (
    END,
    GOLDEN,
    RUN_ID,
    STOPPED,
    all_gone,
    finish,
    lines_of_a_run,
    make_folder,
    offline_files,
    prepare,
    records_of,
    rows_in,
    start,
    start_line,
    start_sink,
    summary_in,
    write,
)
from wandb_stub import ENTITY, Mood, WandbStub

from nanogauge.analysis.report_model import build_report
from nanogauge.errors import RunFailed
from nanogauge.report.html import write_report
from nanogauge.runlog.reader import LOG_NAME
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import End, Event, Step
from nanogauge.sinks.bands import PANELS
from nanogauge.sinks.mirror import upload
from nanogauge.sinks.sink import TITLES, SinkName

folder = pytest.fixture(prepare)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield stub


def report(folder: Path) -> None:
    write_report(*build_report(folder, None))


def mirror_to_its_end(folder: Path, first_step: int, last: End, mode: str = "auto") -> None:
    mirror = start(folder, mode)
    write(folder, [*lines_of_a_run(first_step, last.steps), last])
    report(folder)
    warning = finish(mirror)
    assert warning == "", (warning, (folder / "wandb.log").read_text())


def losses(rows: list[dict[str, float]]) -> list[float]:
    """Return the steps whose loss is in the rows."""
    return [row["step"] for row in rows if "train/loss" in row]


def test_all_of_a_run_is_on_the_server_when_it_ends(folder: Path, server: WandbStub) -> None:
    mirror_to_its_end(folder, 0, END)
    seen = server.runs[RUN_ID]
    assert seen.rows == GOLDEN
    report_json = json.loads((folder / "report.json").read_text())
    assert seen.summary["final/headline"] == report_json["run"]["headline"]
    assert seen.files["report.html"] == (folder / "report.html").read_bytes()
    (table,) = (data for name, data in seen.files.items() if name.startswith("media/table/report"))
    verdicts = [row["verdict"] for row in report_json["rows"]]
    assert [row[5] for row in json.loads(table)["data"]] == verdicts
    assert {"report/verdicts", "report/page"} <= seen.all_rows[-1].keys()
    assert "System tab is empty" in seen.notes and "gpu/*" in seen.notes
    assert seen.alerts == [("slow", "WARN"), ("hot", "ERROR")]
    assert seen.exit_code == 0
    assert all_gone(folder)


def test_each_measured_curve_is_in_one_panel_with_its_predicted_band(folder: Path, server: WandbStub) -> None:
    """As a chart that needs no layout, and in a saved workspace, which a later run leaves as it is."""
    mirror_to_its_end(folder, 0, STOPPED)
    view = json.dumps(server.views).replace("nats", "changed by the user")
    mirror_to_its_end(folder, 10, END)
    seen = server.runs[RUN_ID]
    assert seen.config["_wandb"]["value"]["visualize"].keys() == {f"bands/{name}" for name in PANELS}
    charts = {
        name: json.loads(sorted(d for f, d in seen.files.items() if f.startswith(f"media/table/bands/{name}_"))[-1])
        for name in PANELS
    }
    assert [19, "measured", 3.919] not in charts["step_time"]["data"], "a step that is not mirrored"
    assert {tuple(line[1:]) for line in charts["step_time"]["data"][-6:]} == {
        ("predicted, low", 3.6),
        ("predicted, expected", 4.0),
        ("predicted, high", 4.4),
    }
    (saved,) = server.views.values()
    assert json.dumps(server.views) == view
    (section,) = json.loads(saved["spec"])["section"]["panelBankConfig"]["sections"]
    shown = [panel["config"]["metrics"] for panel in section["panels"]]
    assert ["gpu/power_watts", *(f"predicted/power_watts{end}" for end in ("_low", "", "_high"))] in shown
    assert len(shown) == len(PANELS)


def test_a_resumed_run_is_the_same_run_in_wandb(folder: Path, server: WandbStub) -> None:
    """Here W&B has no end of its first process, which was killed."""
    mirror = start(folder, "auto")
    write(folder, lines_of_a_run(last_step=10))
    finish(mirror)
    assert len(server.runs[RUN_ID].alerts) == 2
    first = server.runs[RUN_ID].rows
    mirror_to_its_end(folder, 10, END)
    (seen,) = server.runs.values()
    assert seen.rows[: len(first)] == first
    assert losses(seen.rows) == [0, 5, 8, 10, 15, 16]
    assert len(seen.alerts) == 4 and seen.exit_code == 0
    later = seen.rows[len(first) :]
    assert later[0]["hours"] > 46 / 3600, "hours continue"


def test_an_upload_sends_missing_rows_and_the_report(folder: Path, server: WandbStub) -> None:
    """At any number of uploads."""
    mirror_to_its_end(folder, 0, STOPPED)
    before = server.runs[RUN_ID].rows
    write(folder, [*lines_of_a_run(10), END])
    done = run("report.py", "--wandb", folder)
    assert done.returncode == 0, done.stderr
    place = f"{server.url}/{ENTITY}/nights/runs/{RUN_ID}"
    assert done.stdout.endswith(f"W&B has the run: {place}\n")
    assert upload(folder, "online", "nights") == place
    seen = server.runs[RUN_ID]
    assert seen.rows[: len(before)] == before
    assert losses(seen.rows) == [0, 5, 8, 10, 15, 16]
    assert len([row for row in seen.all_rows if "report/page" in row]) == 3, "a report each time"
    assert len(seen.alerts) == 2, "uploads send no alerts"
    assert seen.summary["run/status"] == "finished"


def sync(*paths: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *(str(path.parent) for path in paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wandb_sync_makes_one_run_of_two_offline_folders(folder: Path, server: WandbStub) -> None:
    mirror_to_its_end(folder, 0, STOPPED, "offline")
    mirror_to_its_end(folder, 10, END, "offline")
    sync(*offline_files(folder))
    (seen,) = server.runs.values()
    assert losses(seen.rows) == [0, 5, 8, 10, 15, 16]
    assert seen.rows == [row for path in offline_files(folder) for row in rows_in(records_of(path))]


def test_wandb_sync_sends_nothing_after_an_upload(folder: Path, server: WandbStub) -> None:
    mirror_to_its_end(folder, 0, END, "offline")
    assert upload(folder, "auto", "nights").startswith(server.url)
    (path,) = offline_files(folder)
    assert path.with_name(f"{path.name}.synced").exists()
    sync(path)
    assert losses(server.runs[RUN_ID].rows) == [0, 5, 8, 10, 15, 16]


def loop(folder: Path) -> float:
    """Write a log as the training loop does; return the seconds it took."""
    numbers, began = random.Random(1), time.perf_counter()
    with RunLog(folder) as log:
        log.write(start_line())
        for step in range(200):
            loss = sum(numbers.random() for _ in range(20_000)) / 20_000
            log.write(Step(step=step, loss=loss, step_seconds=0.25, tokens=64))
            if step == 100:
                log.write(Event(level="alarm", what="hot", text="The card is at its limit."))
        log.write(End(status="finished", steps=200))
    return time.perf_counter() - began


TOO_LATE = "had not taken all of the run after 1 s"


@pytest.mark.parametrize(
    ("mood", "late", "message"),
    [
        ("slow", False, None),
        ("errors", True, TOO_LATE),
        ("hangs", False, TOO_LATE),
        ("hangs", True, TOO_LATE),
        ("drops", False, TOO_LATE),
        ("refuses", True, "refused the run's rows"),
    ],
)
def test_no_server_slows_the_loop_or_its_end(
    folder: Path, server: WandbStub, mood: Mood, late: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start, or late: after wandb.init, which by default waits 90 s for a server.

    With a server that answers nothing of use, the other sinks run beside W&B.
    """
    plain = make_folder(folder.parent / "plain")
    alone = loop(plain)
    if not late:
        server.mood = mood
    server.turn = ("UpsertBucket", mood) if late else None
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{server.url}/?write_token=of-this-test")
    monkeypatch.setenv("NANOGAUGE_ALERTS_URL", f"{server.url}/hook")
    others: list[SinkName] = ["trackio", "webhook"] if message == TOO_LATE else []
    mirrors = [start(folder, "online"), *(start_sink(sink, folder) for sink in others)]
    if late:
        assert wait_until(lambda: server.mood == mood, 15)
    mirrored = loop(folder)
    assert mirrored < 2 * alone + 1
    assert (folder / LOG_NAME).read_bytes() == (plain / LOG_NAME).read_bytes()
    limit = 1.0 if message == TOO_LATE else 10.0
    began = time.monotonic()
    warning = finish(*mirrors, timeout_seconds=limit)
    assert time.monotonic() - began < limit + 1.5
    if message is None:
        assert warning == "", (folder / "wandb.log").read_text()
        assert len(losses(server.runs[RUN_ID].rows)) == 40
    else:
        assert message in warning and all(TITLES[sink].lower() in warning.lower() for sink in others), warning
        assert f"report.py --wandb {folder}" in warning
    assert all_gone(folder)


@pytest.mark.parametrize(
    ("turn", "message"),
    [(("Viewer", "drops"), "the run is mirrored offline: "), (("UpsertBucket", "refuses"), "refused the run's rows")],
)
def test_a_failed_upload_prints_one_sentence(
    folder: Path, server: WandbStub, turn: tuple[str, Mood], message: str
) -> None:
    """W&B itself prints two screens, and exits with 0 if its server refuses rows."""
    write(folder, [*lines_of_a_run(), END])
    server.turn = turn
    done = run("report.py", "--wandb", folder, WANDB_INIT_TIMEOUT="2")
    said = [x for x in done.stderr.splitlines() if not x.startswith("waiting for W&B")]
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert message in done.stderr
    assert (folder / "report.html").exists()


def test_an_upload_has_a_time_limit(folder: Path, server: WandbStub) -> None:
    write(folder, [*lines_of_a_run(), END])
    server.turn = ("UpsertBucket", "hangs")
    with pytest.raises(RunFailed, match="had not taken all of the run after 3 s"):
        upload(folder, "online", "nights", timeout_seconds=3.0)
    assert all_gone(folder)


def test_a_run_without_a_mirror_can_be_uploaded_later(folder: Path) -> None:
    """Its wandb.mode was disabled, and it died."""
    write(folder, list(lines_of_a_run())[:-1])
    done = run("report.py", "--wandb", folder)
    assert done.returncode == 0, done.stderr
    (path,) = offline_files(folder)
    assert f"/{path.parent.name}, which `" in done.stdout and "wandb sync` up" in done.stdout
    records = list(records_of(path))
    assert rows_in(records) == GOLDEN
    assert not [r for r in records if r.WhichOneof("record_type") == "alert"]
    summary = summary_in(records)
    assert summary["run/status"] == "unfinished" and summary["final/step_seconds"] > 3.9
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (begun.run_id, begun.project) == (RUN_ID, "nights")
    assert all_gone(folder)


def test_contradictory_upload_flags_are_refused(folder: Path) -> None:
    write(folder, lines_of_a_run())
    for flag in ("--wandb.mode=disabled", "--wandb.mode=nowhere", "--train.max-steps=3"):
        done = run("report.py", "--wandb", folder, flag)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (folder / "report.json").exists()

"""The W&B mirror against a server: one that works, one that does not, and one that comes late."""

from __future__ import annotations

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
    all_gone,
    lines_of_a_run,
    make_folder,
    offline_files,
    prepare,
    records_of,
    rows_in,
    start_line,
    summary_in,
    write,
)
from wandb_stub import ENTITY, Mood, WandbStub

from nanogauge.analysis.report_model import build_report
from nanogauge.errors import RunFailed
from nanogauge.report.html import write_report
from nanogauge.runlog.reader import FILE_NAME
from nanogauge.runlog.writer import RunLog
from nanogauge.schema import End, Step
from nanogauge.sinks.mirror import OUTPUT_NAME, Mirror, upload

STOPPED = End(elapsed_seconds=50.0, status="stopped", steps=10, wall_seconds=50.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStub]:
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield stub


def start(folder: Path, mode: str = "auto") -> Mirror:
    return Mirror.start(folder, mode, "nights", 5, RUN_ID)  # type: ignore[arg-type]


def report(folder: Path) -> None:
    write_report(*build_report(folder, None))


def mirror_to_its_end(folder: Path, first_step: int, last: End, mode: str = "auto") -> None:
    """One process's mirror, from beginning to end."""
    mirror = start(folder, mode)
    write(folder, [*lines_of_a_run(first_step, last.steps), last])
    report(folder)
    warning = mirror.finish()
    assert warning is None, (warning, (folder / OUTPUT_NAME).read_text())


def losses(rows: list[dict[str, float]]) -> list[float]:
    """The steps whose loss is among the rows."""
    return [row["step"] for row in rows if "train/loss" in row]


def test_all_of_a_run_is_on_the_server_when_it_ends(folder: Path, server: WandbStub) -> None:
    """The rows of its log, the report, its figures, and how it ended."""
    mirror_to_its_end(folder, 0, END)
    seen = server.runs[RUN_ID]
    assert seen.rows == GOLDEN
    shown = json.loads((folder / "report.json").read_text())
    values = {row["id"]: row["measured"]["value"] for row in shown["rows"] if row["measured"]}
    assert {
        f"final/{name}": value for name, value in values.items()
    }.items() <= seen.summary.items()
    assert len(values) > 12 and seen.summary["final/headline"] == shown["run"]["headline"]
    assert seen.summary["memory/allocation_retries"] == 3
    assert seen.files["report.html"] == (folder / "report.html").read_bytes()
    assert seen.files["prediction.json"] == (folder / "prediction.json").read_bytes()
    (table,) = (data for name, data in seen.files.items() if name.startswith("media/table"))
    verdicts = [row["verdict"] for row in shown["rows"]]
    assert [row[5] for row in json.loads(table)["data"]] == verdicts
    assert {"report/verdicts", "report/page"} <= seen.all_rows[-1].keys()
    assert seen.alerts == [("slow", "WARN"), ("hot", "ERROR")]
    assert seen.exit_code == 0
    assert all_gone(folder)


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(folder: Path, server: WandbStub) -> None:
    """Also where its first process was killed, and W&B has rows, but no end."""
    mirror = start(folder)
    write(folder, lines_of_a_run(last_step=10))
    mirror.finish()
    assert len(server.runs[RUN_ID].alerts) == 2
    first = server.runs[RUN_ID].rows
    mirror_to_its_end(folder, 10, END)
    (seen,) = server.runs.values()
    assert seen.rows[: len(first)] == first
    assert losses(seen.rows) == [0, 5, 8, 10, 15, 16]
    assert len(seen.alerts) == 4 and seen.exit_code == 0
    later = seen.rows[len(first) :]
    assert later[0]["hours"] > 46 / 3600, "hours go on"


def test_an_upload_sends_what_the_server_lacks_and_the_report_anew(
    folder: Path, server: WandbStub
) -> None:
    """However often: after a night that was mirrored live, only the report is sent again."""
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
    assert len(seen.all_rows) - len(seen.rows) == 3, "a report each time"
    assert len(seen.alerts) == 2, "an upload is no news"
    assert seen.summary["run/status"] == "finished"


def test_wandb_sync_makes_one_run_of_two_offline_folders(folder: Path, server: WandbStub) -> None:
    mirror_to_its_end(folder, 0, STOPPED, "offline")
    mirror_to_its_end(folder, 10, END, "offline")
    paths = [str(path.parent) for path in offline_files(folder)]
    sync = [sys.executable, "-m", "wandb", "sync", *paths]
    done = subprocess.run(sync, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (seen,) = server.runs.values()
    assert losses(seen.rows) == [0, 5, 8, 10, 15, 16]
    assert seen.rows == [row for path in offline_files(folder) for row in rows_in(records_of(path))]


def test_what_went_up_from_the_log_is_not_sent_again_from_an_offline_folder(
    folder: Path, server: WandbStub
) -> None:
    """`wandb sync` appends: an offline night whose log was uploaded since must not go up twice."""
    mirror_to_its_end(folder, 0, END, "offline")
    place = upload(folder, "auto", "nights")
    assert place.startswith(server.url)
    (path,) = offline_files(folder)
    assert path.with_name(f"{path.name}.synced").exists()
    sync = [sys.executable, "-m", "wandb", "sync", str(path.parent)]
    subprocess.run(sync, capture_output=True, check=True)
    assert losses(server.runs[RUN_ID].rows) == [0, 5, 8, 10, 15, 16]


def loop(folder: Path) -> float:
    """A loop that logs, as the training loop does, whether or not it is mirrored; its seconds."""
    numbers, began = random.Random(1), time.perf_counter()
    with RunLog(folder) as log:
        log.write(start_line())
        for step in range(200):
            loss = sum(numbers.random() for _ in range(20_000)) / 20_000
            log.write(Step(step=step, loss=loss, step_seconds=0.25, tokens=64))
        log.write(End(status="finished", steps=200))
    return time.perf_counter() - began


TOO_LATE = "had not taken all of the run after 1 s"


@pytest.mark.parametrize(
    ("mood", "late", "said"),
    [
        ("slow", False, None),
        ("errors", False, TOO_LATE),
        ("errors", True, TOO_LATE),
        ("hangs", False, TOO_LATE),
        ("hangs", True, TOO_LATE),
        ("drops", False, TOO_LATE),
        ("drops", True, TOO_LATE),
        ("refuses", True, "refused the run's rows"),
    ],
)
def test_whatever_the_server_does_the_loop_does_not_notice(
    folder: Path, server: WandbStub, mood: Mood, late: bool, said: str | None
) -> None:
    """The same losses in the same log in the same time, and an end that waits no longer than told.

    From the start or, late, once W&B has begun the run. wandb.init alone waits 90 s for a server
    that says nothing, and its exit hook for longer.
    """
    plain = make_folder(folder.parent / "plain")
    alone = loop(plain)
    if not late:
        server.mood = mood
    server.turn = ("UpsertBucket", mood) if late else None
    mirror = start(folder, "online")
    if late:
        assert wait_until(lambda: server.mood == mood, 15)
    mirrored = loop(folder)
    assert mirrored < 2 * alone + 1
    assert (folder / FILE_NAME).read_bytes() == (plain / FILE_NAME).read_bytes()
    limit = 1.0 if said == TOO_LATE else 10.0
    began = time.monotonic()
    warning = mirror.finish(limit)
    assert time.monotonic() - began < limit + 1.5
    if said is None:
        assert warning is None, (warning, (folder / OUTPUT_NAME).read_text())
        assert len(losses(server.runs[RUN_ID].rows)) == 40
    else:
        assert warning is not None and said in warning
        assert f"report.py --wandb {folder}" in warning
    assert all_gone(folder)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (("Viewer", "drops"), "mirrored offline: wandb sync"),
        (("UpsertBucket", "refuses"), "refused the run's rows"),
    ],
)
def test_an_upload_that_cannot_reach_wandb_ends_with_a_sentence(
    folder: Path, server: WandbStub, turn: tuple[str, Mood], said: str
) -> None:
    """W&B itself prints two screens, and ends well where its server refuses the rows."""
    write(folder, [*lines_of_a_run(), END])
    server.turn = turn
    done = run("report.py", "--wandb", folder, WANDB_INIT_TIMEOUT="2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert said in done.stderr
    assert (folder / "report.html").exists()


def test_an_upload_has_a_time_limit(folder: Path, server: WandbStub) -> None:
    """For a server that falls silent after it has said hello."""
    write(folder, [*lines_of_a_run(), END])
    server.turn = ("UpsertBucket", "hangs")
    with pytest.raises(RunFailed, match="had not taken all of the run after 3 s"):
        upload(folder, "online", "nights", timeout_seconds=3.0)
    assert all_gone(folder)


def test_a_run_that_was_kept_from_wandb_can_be_uploaded_later(folder: Path) -> None:
    """wandb.mode disabled was for the night; a run that died is taken up to where it came."""
    write(folder, list(lines_of_a_run())[:-1])
    done = run("report.py", "--wandb", folder)
    assert done.returncode == 0, done.stderr
    (path,) = offline_files(folder)
    assert f"/{path.parent.name}, which `wandb sync` uploads" in done.stdout
    records = list(records_of(path))
    assert rows_in(records) == GOLDEN
    assert not [r for r in records if r.WhichOneof("record_type") == "alert"]
    summary = summary_in(records)
    assert summary["run/status"] == "unfinished" and summary["final/step_seconds"] > 3.9
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (begun.run_id, begun.project) == (RUN_ID, "nights")
    assert all_gone(folder)


def test_an_upload_that_contradicts_itself_is_refused(folder: Path) -> None:
    write(folder, lines_of_a_run())
    for flag in ("--wandb.mode=disabled", "--wandb.mode=nowhere", "--train.max-steps=3"):
        done = run("report.py", "--wandb", folder, flag)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (folder / "report.json").exists()

"""trackio, the webhook, and what all sinks share."""

import json
import sqlite3
from pathlib import Path

import pytest
from commands import DEMO, run, train_tiny, wait_until
from mirrored import END, GOLDEN, RUN_ID, STOPPED, finish, lines_of_a_run, prepare, start_sink, write
from wandb_stub import WandbStub

from nanogauge.analysis.report_model import build_report
from nanogauge.report.html import write_report
from nanogauge.sinks.bands import PANELS, Bands
from nanogauge.sinks.webhook import request_of

TOPIC = "a-topic-that-nobody-guesses"


def stored(database: Path, table: str) -> list[sqlite3.Row]:
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(f"select * from {table} order by rowid").fetchall()


def test_trackio_has_the_rows_alerts_and_verdicts_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path, monkeypatch)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first_step, last in ((0, STOPPED), (10, END)):
        mirror = start_sink("trackio", folder)
        write(folder, [*lines_of_a_run(first_step, last.steps), last])
        write_report(*build_report(folder, None))
        assert finish(mirror) == "", (folder / "trackio.log").read_text()
    database = tmp_path / "trackio" / "nights.db"
    lines = stored(database, "metrics")
    assert {line["run_name"] for line in lines} == {f"night-{RUN_ID}"}
    rows = [{**json.loads(line["metrics"]), "step": line["step"]} for line in lines]
    first, last_row = (index for index, row in enumerate(rows) if "report/verdicts" in row)
    assert rows[:first] == GOLDEN[:first] and last_row == len(rows) - 1
    assert len(rows) - 2 == len(GOLDEN) + 1, "both processes compiled"
    alerts = [(alert["title"], alert["level"]) for alert in stored(database, "alerts")]
    assert alerts == [("slow", "warn"), ("hot", "error")] * 2
    report = json.loads((folder / "report.json").read_text())
    table = rows[-1]["report/verdicts"]["_value"]
    assert [line["verdict"] for line in table] == [row["verdict"] for row in report["rows"]]
    assert rows[-1]["run/status"] == "finished" and rows[-1]["final/headline"] == report["run"]["headline"]
    (config,) = stored(database, "configs")
    assert json.loads(config["config"])["prediction"]["step_seconds"]["high"] == 4.4


def test_the_end_of_a_run_is_posted_and_no_file_holds_the_address(tmp_path: Path) -> None:
    with WandbStub() as server:
        url = f"{server.url}/{TOPIC}"
        flags = ["--train.max-steps=2", "--trackio.project=nights"]
        done = train_tiny(tmp_path, *flags, f"--alerts.url={url}", TRACKIO_DIR=str(tmp_path))
        assert done.returncode == 0 and (tmp_path / "nights.db").exists(), done.stdout
        again = train_tiny(tmp_path, "--train.max-steps=2", "--resume=auto", NANOGAUGE_ALERTS_URL=url)
        assert again.returncode == 0, again.stderr
    folder = tmp_path / "demo"
    headline = json.loads((folder / "report.json").read_text())["run"]["headline"]
    assert len(server.posts) == 2 and server.posts[1] == (f"/{TOPIC}", f"demo: finished. {headline}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {folder / "webhook.log", folder / "trackio.log"} < set(files)
    assert not [path for path in files if TOPIC.encode() in path.read_bytes()]
    assert "alerts.url=***" in (folder / "machine.json").read_text()
    refused = run("train.py", DEMO, f"--alerts.url=ntfy.sh/{TOPIC}")
    assert refused.returncode == 2 and TOPIC not in refused.stderr
    assert "alerts.url: give an address that begins with http:// or https://" in refused.stderr


def test_an_alarm_is_posted_at_once_and_a_dead_run_at_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path, monkeypatch)
    with WandbStub() as server:
        monkeypatch.setenv("NANOGAUGE_ALERTS_URL", f"{server.url}/{TOPIC}")
        mirror = start_sink("webhook", folder)
        write(folder, lines_of_a_run())
        assert wait_until(lambda: bool(server.posts), 20)
        assert [text for _, text in server.posts] == ["night: The card is at its limit."]
        assert mirror._process is not None and mirror._process.stdin is not None
        mirror._process.stdin.close()  # as when the process of the run is killed
        assert mirror._process.wait(20) == 0
        mirror = start_sink("webhook", folder)
        write(folder, [END.model_copy(update={"status": "failed", "reason": "The disk is full."})])
        assert finish(mirror) == ""
    assert server.posts[1][1].startswith("night: its process died; --resume auto continues")
    assert server.posts[2:] == [(f"/{TOPIC}", "night: failed: The disk is full.")], "an alarm is posted once"
    monkeypatch.setenv("NANOGAUGE_ALERTS_URL", f"http://host:{TOPIC}")
    assert finish(start_sink("webhook", folder)) == "The webhook did not take all messages: InvalidURL."


@pytest.mark.parametrize(
    ("url", "kind", "body"),
    [
        ("https://ntfy.sh/topic", "text/plain; charset=utf-8", "hot °"),
        ("https://hooks.slack.com/services/T/B/x", "application/json", {"text": "hot °"}),
        ("https://discord.com/api/webhooks/1/x", "application/json", {"content": "hot °"}),
        ("https://api.telegram.org/bot1:x/sendMessage?chat_id=2", "application/json", {"text": "hot °"}),
    ],
)
def test_a_message_has_the_format_of_its_host(url: str, kind: str, body: object) -> None:
    request = request_of(url, "hot °")
    assert request.full_url == url and request.get_header("Content-type") == kind
    assert isinstance(request.data, bytes)
    assert (json.loads(request.data) if kind == "application/json" else request.data.decode()) == body


def test_a_chart_of_a_long_run_is_thinned_out_and_keeps_its_last_point() -> None:
    bands = Bands()
    for step in range(10_000):
        row = {"step": step, "memory/peak_process_bytes": 2.0**30 + step, "predicted/peak_process_bytes": 2.0**31}
        bands.add(row)
    (_, steps, values), predicted = bands.lines(PANELS["vram"])
    assert len(steps) <= 301 and (steps[-1], values[-1]) == (9999, 1 + 9999 / 2**30)
    assert predicted == ("predicted, expected", [0, 9999], [2.0, 2.0])
    assert bands.lines(PANELS["loss"]) == [], "nothing was measured"

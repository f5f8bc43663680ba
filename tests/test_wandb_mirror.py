"""The W&B mirror offline: what it writes, and that no failure of W&B reaches the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, wait_until
from mirrored import (
    END,
    GOLDEN,
    RUN_ID,
    STEPS,
    STOPPED,
    all_gone,
    cores_of,
    finish,
    items,
    lines_of_a_run,
    make_folder,
    offline_files,
    prepare,
    processes_of,
    recorded,
    records_of,
    rows_in,
    start,
    start_line,
    summary_in,
    write,
)

from nanogauge.analysis.report_model import build_report
from nanogauge.errors import BadInput
from nanogauge.report.html import write_report
from nanogauge.sinks.mirror import new_run_id
from nanogauge.sinks.process import main

folder = pytest.fixture(prepare)


def test_every_value_in_wandb_is_that_of_the_log(folder: Path) -> None:
    mirror = start(folder)
    write(folder, [*lines_of_a_run(), END])
    report, run_folder, log = build_report(folder, None)
    write_report(report, run_folder, log)
    assert finish(mirror) == "", (folder / "wandb.log").read_text()
    records = recorded(folder)
    assert rows_in(records) == GOLDEN

    alerts = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text, a.level) for a in alerts] == [
        ("slow", "The clock fell.", "WARN"),
        ("hot", "The card is at its limit.", "ERROR"),
    ]
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    config = items(begun.config.update)
    assert (begun.project, begun.display_name, begun.run_id) == ("nights", "night", RUN_ID)
    assert config["steps"] == STEPS
    assert config["prediction"]["step_seconds"]["high"] == 4.4

    summary = summary_in(records)
    assert summary["run/status"] == "finished" and summary["run/mode"] == "compiled"
    assert summary["memory/peak_inactive_bytes"] == END.peak_inactive_bytes
    assert summary["gpu/idle_power_watts"] == 12.5
    final = {row.id: row.measured.value for row in report.rows if row.measured is not None}
    assert {row_id: summary[f"final/{row_id}"] for row_id in final} == final
    assert summary["final/headline"] == report.run.headline
    kept = offline_files(folder)[0].parent / "files"
    names = ("spec.json", "config.toml", "prediction.json", "machine.json")
    for name in (*names, "report.html", "report.json"):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
        assert not (kept / name).is_symlink(), "an offline run may be carried elsewhere"
    (table,) = kept.glob("media/table/report/verdicts*.json")
    cells = json.loads(table.read_text())["data"]
    assert [row[0] for row in cells] == [row.quantity for row in report.rows]
    (page,) = kept.glob("media/html/report/page*.html")
    assert page.read_text() == (folder / "report.html").read_text()
    assert all_gone(folder)


def test_a_run_without_a_report_or_an_earlier_mirror_is_mirrored_whole(folder: Path) -> None:
    """Except for the alerts of its first process."""
    write(folder, [*lines_of_a_run(last_step=10), STOPPED])
    mirror = start(folder)
    write(folder, [*lines_of_a_run(first_step=10), END])
    assert finish(mirror) == "", (folder / "wandb.log").read_text()
    assert "mirrored without its report" in (folder / "wandb.log").read_text()
    records = recorded(folder)
    losses = [row["step"] for row in rows_in(records) if "train/loss" in row]
    assert losses == [0, 5, 8, 10, 15, 16]
    assert len([r for r in records if r.WhichOneof("record_type") == "alert"]) == 2


def test_without_a_key_auto_is_offline_and_online_warns(folder: Path) -> None:
    write(folder, [*lines_of_a_run(), END])
    for mode, warned in (("auto", False), ("online", True)):
        warning = finish(start(folder, mode, f"{mode:0<8}"))
        assert bool(warning) == warned, (folder / "wandb.log").read_text()
    assert "No API key" in warning and "wandb sync" in warning
    files = offline_files(folder)
    assert len(files) == 2
    for path in files:
        assert len(rows_in(records_of(path))) == len(GOLDEN)
    assert all_gone(folder)


PARENT = """
import sys, time
from pathlib import Path
from nanogauge.sinks.mirror import Mirror
mirror = Mirror("wandb", Path(sys.argv[1]), ["--mode=offline", "--log-every=5"])
print("started", flush=True)
time.sleep(60)
"""


def test_the_mirror_of_a_killed_run_ends_by_itself(folder: Path) -> None:
    """Its log has no end line to wait for."""
    write(folder, lines_of_a_run())
    (folder / "report.json").write_text("{}")
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        assert wait_until((folder / "wandb").exists, 15)
        assert wait_until(lambda: bool(cores_of(folder)), 15)
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes_of(folder), 10), processes_of(folder)
    records = recorded(folder)
    assert rows_in(records) == GOLDEN, "the whole log is mirrored"
    assert summary_in(records)["run/status"] == "unfinished"
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1]
    (kept,) = folder.glob("wandb/offline-run-*/files")
    assert not (kept / "report.json").exists(), "an earlier report is not of this run"


def test_a_resumed_run_keeps_its_id_and_repeats_no_row_and_no_alert(folder: Path) -> None:
    """Offline each process writes a folder, and `wandb sync` appends the second to the first."""
    mirror = start(folder)
    write(folder, [*lines_of_a_run(last_step=10), STOPPED])
    assert finish(mirror) == "", (folder / "wandb.log").read_text()
    mirror = start(folder)
    time.sleep(1.0)  # the old end line does not end the new mirror
    write(folder, [*lines_of_a_run(first_step=10), END])
    assert finish(mirror) == "", (folder / "wandb.log").read_text()
    old, new = (list(records_of(path)) for path in offline_files(folder))
    first, later = rows_in(old), rows_in(new)
    assert first == GOLDEN[: len(first)]
    assert len(first) + len(later) == len(GOLDEN) + 1, "both processes compiled"
    seen = [[row["step"] for row in rows if "train/loss" in row] for rows in (first, later)]
    assert seen == [[0, 5, 8], [10, 15, 16]]
    assert later[0]["hours"] == pytest.approx((50.0 + 5.0) / 3600), "hours continue"
    energy = [row["gpu/energy_kwh"] for row in later if "gpu/energy_kwh" in row]
    assert energy[0] == pytest.approx((7000 + 700) / 3.6e6), "energy continues"
    for records in (old, new):
        (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        assert begun.run_id == RUN_ID
        assert len([r for r in records if r.WhichOneof("record_type") == "alert"]) == 2


def test_a_warning_names_the_failure_of_a_mirror(folder: Path) -> None:
    """Here W&B's process is killed, as for want of memory."""
    mirror = start(folder)
    assert wait_until(lambda: bool(list((folder / "wandb").glob("*/*.wandb"))), 15)
    for pid in cores_of(folder):
        os.kill(pid, signal.SIGKILL)
    write(folder, [*lines_of_a_run(), END])
    warning = finish(mirror)
    assert warning.startswith("W&B failed before the end"), warning
    assert f"report.py --wandb {folder}" in warning
    assert all_gone(folder)


def at_start_up(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every Python process that the test starts run some code first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def mirrored(folder: Path) -> str:
    """Mirror a whole run; return the warning."""
    mirror = start(folder)
    write(folder, [*lines_of_a_run(), END])
    warning = finish(mirror)
    assert all_gone(folder)
    return warning


def test_a_missing_wandb_gives_a_warning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_start_up(tmp_path / "hook", "import sys; sys.modules['wandb'] = None", monkeypatch)
    warning = mirrored(folder)
    assert "W&B cannot be used" in warning and "the run is in its log alone" in warning, warning


def test_files_in_a_temporary_folder_give_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B writes to the system's temporary folder if it cannot write to the run's."""
    where = f"os.path.realpath(p) != {str(folder)!r}"
    code = f"import os; real = os.access; os.access = lambda p, m: {where}"
    at_start_up(tmp_path / "hook", code + " and real(p, m)", monkeypatch)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    warning = mirrored(folder)
    assert "W&B cannot write to ~/runs/night" in warning, warning
    assert "keeps its files of the run in ~/wandb" in warning


def test_a_mirror_that_cannot_start_gives_a_warning(folder: Path) -> None:
    (folder / "wandb.log").mkdir()
    assert "could not be started" in mirrored(folder)


def test_starting_a_mirror_imports_neither_wandb_nor_torch() -> None:
    code = "import sys, nanogauge.sinks.mirror; print({'wandb', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_an_id_is_valid() -> None:
    made = new_run_id()
    assert len(made) == 8 and made.isalnum() and made.isascii() and made == made.lower()


def test_a_folder_without_a_prediction_is_refused(tmp_path: Path) -> None:
    write(make_folder(tmp_path / "run"), [start_line()])
    (tmp_path / "run" / "prediction.json").unlink()
    with pytest.raises(BadInput, match="prediction.json"):
        main(["wandb", str(tmp_path / "run"), "--mode=offline"])

"""nanogauge share: one anonymous row of a run, which the validation reads back."""

import json
from pathlib import Path

import pytest
from runs import make_finished

from bench.published_runs import read_runs
from nanogauge.commands.share import main
from nanogauge.prediction.calibrated import load_calibration
from nanogauge.prediction.workload import workload_of
from nanogauge.runlog.folder import load

SECRET = "zeta"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / SECRET
    make_finished(folder, name=SECRET)
    path = folder / "machine.json"
    machine = {"device": SECRET, "torch": "2.13.0", "gpu_driver": "580.1", "command": SECRET}
    path.write_text(json.dumps(machine))
    return folder


def test_a_shared_row_is_read_as_the_run_it_came_from(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    assert main([str(made)]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert main([str(made), f"--write={table}"]) == 0
    assert main([str(made), f"--write={table}"]) == 0
    text = table.read_text()
    assert SECRET not in text
    assert str(tmp_path) not in text
    assert text.count("nanogauge share") == 2
    (run, again), _, skipped = read_runs(table)
    assert not skipped
    assert run == again
    spec = load(made).spec
    assert run.work == workload_of(spec.resolved("bfloat16", 1), on_gpu=True)
    assert run.step_seconds == pytest.approx(3.9)
    assert run.complete
    assert run.hardware.name == "RTX 4070"


def test_a_shared_run_calibrates_this_machine(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main([str(made), "--calibrate"]) == 0
    stored, _ = load_calibration("RTX 4070", "2.13.0", None)
    assert stored is not None
    assert [run.step_seconds for run in stored.runs] == [pytest.approx(3.9)]

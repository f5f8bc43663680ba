"""Import of a run on a CPU: measured, and predicted only for a CPU that is known."""

import json
from pathlib import Path

import pytest
from commands import rows_of, run_here

CONFIG = """
[run]
name = "small"
device = "cpu"
compile = false

[model]
n_layer = 2
n_head = 2
n_embd = 64
block_size = 32
vocab_size = 103

[data]
path = "data/none"

[train]
micro_batch = 4
max_steps = 5
eval_every = 3
"""
LOG = """\
Overriding: device = {device}
Overriding: dtype = float16
Overriding: compile = False
step 0: train loss 4.7000, val loss 4.7000
iter 0: loss 4.7000, time 900.00ms, mfu -100.00%
iter 1: loss 4.6000, time 50.00ms, mfu 0.00%
iter 2: loss 4.6000, time 50.00ms, mfu 0.00%
step 3: train loss 4.5000, val loss 4.5000
iter 3: loss 4.5000, time 350.00ms, mfu 0.00%
iter 4: loss 4.5000, time 50.00ms, mfu 0.00%
"""
TIMED = ("step_seconds", "first_step_seconds", "total_seconds", "mfu_palm", "mfu_6n")


def imported(folder: Path, *flags: str, device: str = "cpu") -> tuple[int, str]:
    config, log = folder / "config.toml", folder / "train.log"
    config.write_text(CONFIG)
    log.write_text(LOG.format(device=device))
    arguments = [f"--nanogpt-log={log}", f"--config={config}", f"--out={folder / 'out'}"]
    done = run_here("report.py", *arguments, *flags)
    return done.returncode, done.stderr


def test_the_time_on_an_unnamed_cpu_is_measured_and_not_predicted(tmp_path: Path) -> None:
    assert imported(tmp_path) == (0, "")
    rows = rows_of(tmp_path / "out")
    assert rows["step_seconds"]["measured"]["value"] == pytest.approx(0.05)
    assert rows["parameters"]["verdict"] == "no claim"
    assert rows["parameters"]["analytic"]["expected"] == rows["parameters"]["measured"]["value"]
    for row in TIMED:
        assert rows[row]["analytic"] is None, row
    assert "the log does not name its processor" in rows["mfu_palm"]["why"]
    assert rows["mfu_palm"]["measured"] is None
    machine = json.loads((tmp_path / "out" / "machine.json").read_text())
    assert machine["device"] == "CPU"
    assert "gpu" not in machine
    # Without compilation the first step is 0.9 s less 0.3 s of evaluation.
    assert rows["first_step_seconds"]["measured"]["value"] == pytest.approx(0.6)
    ledger = json.loads((tmp_path / "out" / "report.json").read_text())["time_ledger"]
    assert ledger["compile_s"] is None
    assert ledger["wall_s"] == pytest.approx(0.9 + 3 * 0.05 + 0.35)


@pytest.mark.parametrize(
    ("device", "flags", "words"),
    [
        ("cpu", ["--gpu=RTX 4070"], "--gpu names a card"),
        ("cpu", ["--run.device=cuda"], "{log}: line 1 has device = cpu, not cuda"),
        ("cpu", ["--run.device=auto", "--gpu=RTX 4070"], "{log}: line 1 has device = cpu"),
        ("cuda:1", [], "{log}: line 1 has device = cuda:1"),
    ],
)
def test_a_log_is_not_imported_for_another_kind_of_device(
    tmp_path: Path, device: str, flags: list[str], words: str
) -> None:
    status, message = imported(tmp_path, *flags, device=device)
    assert status == 2
    assert words.format(log=tmp_path / "train.log") in message
    assert not (tmp_path / "out").exists()

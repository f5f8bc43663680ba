"""Broken inputs from seeds, and cases that once failed."""

from pathlib import Path

import numpy as np
import pytest
from broken_inputs import broken_inputs
from commands import ROOT, run
from runs import imported

from nanogauge.analysis.report_model import build_report
from nanogauge.config import load_config
from nanogauge.errors import BadInput
from trainer.data.dataset import open_folder

CONFIG = ROOT / "configs" / "demo.toml"


def test_broken_inputs_of_every_kind_end_with_a_report_or_one_sentence(tmp_path: Path) -> None:
    ends, failures = broken_inputs(tmp_path, range(6, 246))
    assert not failures, "\n".join(failures)
    assert set(ends) == {"exit 0", "exit 2"} and ends.total() == 240
    assert min(ends.values()) > 20, "some are valid enough to be read"


@pytest.mark.parametrize(
    ("value", "words"), [("[" * 3000, "nested too deeply"), ("9" * 5000, "not valid TOML"), ("{a=" * 999, "nested")]
)
def test_a_value_that_is_too_deep_or_too_long_is_refused(tmp_path: Path, value: str, words: str) -> None:
    """The TOML reader recurses, and int() refuses 5,000 digits."""
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.read_text().replace("n_layer = ", f"n_layer = {value}", 1))
    with pytest.raises(BadInput, match=words):
        load_config(path)


@pytest.mark.parametrize("data", [b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00{'descr': ('a'" + b" " * 106 + b"\n"])
def test_an_invalid_array_file_is_refused(tmp_path: Path, data: bytes) -> None:
    """NumPy takes the first for an archive; the header of the second is no Python."""
    np.save(tmp_path / "val_0.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "train_0.npy").write_bytes(data)
    with pytest.raises(BadInput, match="cannot read"):
        open_folder(tmp_path)


def test_a_log_without_a_steady_step_has_no_total_with_a_reason() -> None:
    logged = [(0, 9.0), (40, 7.0), (20, 8.0), (30, 7.5), (10, 8.5)]
    lines = [f"iter {step}: loss {loss:.4f}, time 3900.00ms, mfu 12.50%" for step, loss in logged]
    begin = "step 0: train loss 9.0000, val loss 9.1000"
    finish = "step 50: train loss 6.5000, val loss 9.1000"
    last = "iter 50: loss 6.5000, time 3900.00ms, mfu 12.50%"
    _, measured = imported("\n".join([begin, *lines, finish, last, ""]), max_steps=50)
    assert "total_seconds" not in measured.values
    assert "no steady step" in measured.missing["total_seconds"]


def test_a_step_that_timed_only_some_of_its_parts_is_reported(tmp_path: Path) -> None:
    """A line without optimizer_seconds made the median of all NaN."""
    folder = tmp_path / "run"
    made = run("bench/make_run.py", 60, folder, "--sensors", 2, PYTHONPATH=str(ROOT))
    assert made.returncode == 0, made.stderr
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text.replace('"optimizer_seconds": 0.01', '"x": 1', 1))
    report, _, _ = build_report(folder, None)
    assert {"forward_seconds", "backward_seconds"} <= {one.id for one in report.instruments}

"""What tests/test_chaos.py checks on a few cases, on many more."""

from __future__ import annotations

from pathlib import Path

from slow.broken_inputs import broken_inputs
from slow.failing_writes import let_writes_fail


def test_ten_thousand_broken_inputs_end_with_a_report_or_one_sentence(tmp_path: Path) -> None:
    _, failures = broken_inputs(tmp_path, range(1, 10_001))
    assert not failures, "\n".join(failures)


def test_a_hundred_runs_with_failing_writes_resume_to_the_same_weights(tmp_path: Path) -> None:
    _, _, problems = let_writes_fail(tmp_path, 100, seed=1)
    assert not problems, "\n".join(problems)

"""Logs of the field: each of tests/logs.toml is imported as it says there."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import run_here
from examples import ROOT

TABLE = tomllib.loads((ROOT / "tests" / "logs.toml").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in TABLE["case"]}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_log_gives_what_the_table_says(tmp_path: Path, case: dict[str, Any]) -> None:
    log, config, out = tmp_path / f"log{case.get('suffix', '.log')}", tmp_path / "c.toml", "out"
    log.write_bytes(case["log"].encode(case.get("encoding", "utf-8")))
    config.write_text(TABLE["config"])
    flags = [f"--log={log}", f"--out={tmp_path / out}", *shlex.split(case["flags"])]
    if case.get("config", True):
        flags.append(f"--config={config}")
    done = run_here("report.py", *flags)
    if "refused" in case:
        assert done.returncode == 2
        for words in (case["refused"], *case.get("also", [])):
            assert words in done.stderr
        assert not (tmp_path / out).exists()
        return
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / out / "report.json").read_text())
    rows = {row["id"]: row for row in report["rows"]}
    expected = dict(case.get("values", {}))
    if "n" in expected:
        assert rows["step_seconds"]["measured"]["n"] == expected.pop("n")
    measured = {row: (rows[row]["measured"] or {}).get("value") for row in expected}
    assert measured == pytest.approx(expected, rel=1e-6)
    for row, words in case.get("missing", {}).items():
        assert rows[row]["measured"] is None
        assert words in rows[row]["why"]
    for row in case.get("predicted", []):
        assert rows[row]["analytic"] is not None, row
    for row in case.get("unpredicted", []):
        assert rows[row]["analytic"] is None, row
    warnings = "\n".join(report["warnings"])
    assert all(words in warnings for words in case.get("warnings", [])), warnings
    assert not any(words in warnings for words in case.get("silent", [])), warnings
    assert report["run"]["headline"].startswith(case.get("headline", ""))
    assert report["run"]["device"] == case.get("device", report["run"]["device"])
    spec = json.loads((tmp_path / out / "spec.json").read_text())
    assert spec["world_size"] == case.get("world", 1)
    lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
    steps = sum(json.loads(line)["kind"] == "step" for line in lines)
    assert steps == case.get("steps", steps)

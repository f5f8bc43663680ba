"""Reports of the documented run and of small imported logs."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import log_lines, run
from examples import SEED_CLAIMS, SHARED, needs_shared
from runs import documented_log, make_finished, nanogpt_log


def import_log(log: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Run the command of the README on this log and folder."""
    return run(
        "report.py",
        *("--nanogpt-log", log),
        *("--config", "configs/rtx4070_fineweb.toml"),
        *("--gpu", "RTX 4070"),
        *("--claims", "predictions/seed_zh.toml"),
        *("--out", out),
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the documented run, with its report."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "log.txt").write_text(documented_log(), encoding="utf-8")
    done = import_log(folder / "log.txt", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    report = folder / "run" / "report.json"
    assert json.loads(done.stdout) == json.loads(report.read_text(encoding="utf-8"))
    return folder / "run"


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def measured(report: dict[str, Any], row_id: str) -> float:
    values = {r["measured"]["value"] for r in report["rows"] if r["id"] == row_id and r["measured"]}
    assert len(values) == 1, row_id
    return values.pop()


def test_the_documented_run_has_its_known_values(folder: Path, report: dict[str, Any]) -> None:
    """69 % of the GPU's peak; the log printed 12.5 % of an A100's."""
    assert measured(report, "step_seconds") == pytest.approx(3.9098, rel=1e-3)
    assert measured(report, "first_step_seconds") == pytest.approx(32.025, rel=1e-3)
    assert measured(report, "total_seconds") == pytest.approx(21.9 * 3600, rel=2e-3)
    assert measured(report, "mfu_palm") == pytest.approx(0.690, abs=0.001)
    assert measured(report, "mfu_6n") == pytest.approx(0.560, abs=0.001)
    assert measured(report, "val_loss") == pytest.approx(3.6286, abs=1e-4)
    evals = [line for line in log_lines(folder) if line["kind"] == "eval"]
    assert len(evals) == 41
    evaluations = [line["seconds"] for line in evals if "seconds" in line]
    assert len(evaluations) == 20  # those within a printed iteration
    assert evaluations == pytest.approx([15.27] * 20, abs=0.01)


VERDICTS = {
    "tokens_per_step": "held",
    "tokens_total": "held",
    "setting.iterations": "held",
    "setting.width": "held",
    "tokens_total.rounded": "held",
    "tokens_total.against_gpt2": "contradicted",
    "tokens_total.subset": "held",
    "data_epochs": "likely",
    "data_epochs.sum": "held",
    "parameters": "held",
    "parameters.a_little_smaller": "contradicted",
    "parameters.range": "held",
    "flops_total_6n.pflop": "held",
    "flops_total_6n.scientific": "contradicted",
    "flops_total_6n.summary": "contradicted",
    "flops_total_6n.normal": "held",
    "first_step_seconds": "held",
    "compile_share": "missed",
    "step_seconds.range": "held",
    "step_seconds.usual": "missed",
    "total_seconds.expected": "missed",
    "total_seconds.reported": "unlikely",
    "total_seconds.overnight": "missed",
    "total_seconds.at_2_5_s": "held",
    "total_seconds.at_3_0_s": "held",
    "total_seconds.at_3_5_s": "held",
    "total_seconds.at_4_0_s": "held",
    "mfu_palm": "missed",
    "mfu_palm.typical": "unlikely",
    "speedup_after_warmup": "held",
    "weights_bytes": "held",
    "peak_allocated_bytes.detail": "likely",
    "peak_allocated_bytes.summary": "unlikely",
    "peak_process_bytes": "likely",
    "peak_process_bytes.ample": "likely",
    "peak_process_bytes.no_oom": "held",
    "power_watts": "likely",
    "energy_kwh": "likely",
    "energy_kwh.arithmetic": "held",
    "cost": "likely",
    "dataset": "missed",
    "quality_vs_gpt2": "unlikely",
}


def test_every_claim_of_the_document_gets_its_verdict(report: dict[str, Any]) -> None:
    found = {row["claim"]: row["verdict"] for row in report["rows"] if row["claim"]}
    assert found == VERDICTS
    assert report["run"]["verdicts"]["contradicted"] == report["run"]["sums"]["contradicted"] == 4
    for words in ("21.9 h, not 15–20 h", "inside the claimed 2.5–4.5 s", "4 held, 6 missed"):
        assert words in report["run"]["headline"]
    assert "served" not in report["run"]["prediction_made"]
    assert report["run"]["prediction_made"].startswith("after the run")


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("flops_total_6n.scientific", ["2.552e18", "1,001 times"]),
        ("step_seconds.usual", ["12 %", "upper end"]),
        ("total_seconds.expected", ["9.5 % above the upper end"]),
        ("total_seconds.reported", ["our 4", "at least 2"]),
        ("mfu_palm", ["312", "1.97 times"]),
        ("power_watts", ["170–200 W"]),
        ("quality_vs_gpt2", ["train-split loss 3.629 on FineWeb", "3.425", "0.2945"]),
        ("dataset", ["FineWeb"]),
    ],
)
def test_the_reason_of_a_verdict_has_its_numbers(report: dict[str, Any], claim: str, words: list[str]) -> None:
    (why,) = (row["why"] for row in report["rows"] if row["claim"] == claim)
    for word in words:
        assert word in why.replace("\u00a0", " "), why


def test_the_first_step_is_predicted_without_its_evaluation(report: dict[str, Any]) -> None:
    (row,) = (row for row in report["rows"] if row["id"] == "first_step_seconds")
    assert row["measured"]["predicted_part"] == pytest.approx(16.7, abs=0.1)
    assert "with an evaluation of about 15.3 s" in row["measured"]["how"]


def test_report_json_has_the_keys_of_its_contract(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    keys = {
        "claimed": {"low", "high", "quote"},
        "analytic": {"low", "expected", "high", "formula"},
        "measured": {"value", "p10", "p90", "n", "how"},
    }
    for row in report["rows"]:
        rest = ("id", "claim", "quantity", "unit", "calibrated", "verdict", "factor", "why")
        assert {*keys, *rest} <= set(row)
        assert (row["claim"] is None) == (row["claimed"] is None)
        assert all(row[key] is None or inner <= set(row[key]) for key, inner in keys.items())
    assert {row["id"] for row in report["rows"] if row["claim"] is None} >= {
        *("parameters_total", "flops_total_palm", "mfu_6n", "val_loss")
    }


def test_the_page_is_one_file_that_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_500_000
    loaded = re.findall(r"""(?:src|href|url|@import)\s*[=( ]\s*["']?([^"'\s)>]*)""", page)
    assert [target for target in loaded if not target.startswith(("#", "data:"))] == []
    assert "<script" not in page.lower()
    assert page.count("<svg") >= 4
    assert "3.91" in page
    assert "524,288（16 個序列" in page  # the document's own words


def test_the_text_report_has_every_verdict_and_figure(folder: Path, report: dict[str, Any]) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    _, _, verdicts = text.partition("## Verdicts")
    found = Counter(re.findall(r"^- [✓✕‼≈≉○] ([a-z ]+?)(?: [\d.,]+×)?:", verdicts, re.MULTILINE))
    assert found == report["run"]["verdicts"]
    for figure in ("3.91 s", "21.9 h", "69 %", "1,001 times", "每次迭代"):
        assert figure in text.replace("\u00a0", " ")
    assert len(text.split()) <= 2305


def test_the_run_folder_is_whole_and_reports_again_by_itself(folder: Path, report: dict[str, Any]) -> None:
    """It contains the claims."""
    assert (folder / "claims.toml").read_bytes() == SEED_CLAIMS.read_bytes()
    names = ("spec.json", "machine.json", "prediction.json", "log.jsonl", "report.html")
    assert all((folder / name).stat().st_size > 0 for name in names)
    assert not list(folder.glob("*.tmp"))
    done = run("report.py", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report


def small_log(path: Path, step_ms: float) -> Path:
    text = nanogpt_log(400, 100, 200, lambda _: step_ms, 9000.0, 20_000.0)
    path.write_text(text, encoding="utf-8")
    return path


def test_an_import_replaces_the_earlier_one_and_its_prediction_cannot_be_changed(tmp_path: Path) -> None:
    """Its hash is in the log."""
    out = tmp_path / "run"
    for step_ms in (4000.0, 3000.0):
        done = import_log(small_log(tmp_path / "log.txt", step_ms), out, "--json")
        assert done.returncode == 0, done.stderr
        assert measured(json.loads(done.stdout), "step_seconds") == step_ms / 1e3
    assert [line["kind"] for line in log_lines(out)].count("start") == 1
    prediction = json.loads((out / "prediction.json").read_text())
    prediction["quantities"]["step_seconds"]["expected"] = 4.0
    (out / "prediction.json").write_text(json.dumps(prediction, indent=1))
    done = run("report.py", out)
    assert done.returncode == 2
    assert "prediction.json was changed after the run began" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_importing_over_a_trained_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make_finished(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = import_log(small_log(tmp_path / "log.txt", 4000.0), out)
    assert done.returncode == 2
    assert "trained here" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@needs_shared("data/rtx4070_fineweb_train_log.txt")
@needs_shared("check_report.py")
def test_the_real_log_gives_the_same_report(tmp_path: Path, report: dict[str, Any]) -> None:
    out = tmp_path / "run"
    done = import_log(SHARED / "data" / "rtx4070_fineweb_train_log.txt", out, "--json")
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout)
    assert {row["claim"]: row["verdict"] for row in real["rows"] if row["claim"]} == VERDICTS
    for row_id in ("step_seconds", "first_step_seconds", "total_seconds", "mfu_palm"):
        expected = measured(report, row_id)
        assert measured(real, row_id) == pytest.approx(expected, rel=1e-3), row_id
    assert measured(real, "val_loss") == pytest.approx(3.52, abs=0.005)
    for kind in ("document", "document2"):
        command = [sys.executable, SHARED / "check_report.py", kind, out / "report.json"]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout

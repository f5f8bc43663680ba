"""train.py from the command line to the report, on the CPU."""

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import DEMO, ROOT, TINY, log_lines, rows_of, run, run_in_copy, small_disk, steps_of, succeed, train_tiny
from examples import GPT2_ORIGIN, write_document

from trainer.data.shards import ShardWriter


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in steps_of(folder)}


def test_a_run_folder_has_the_documented_files_and_lines(tiny_run: Path) -> None:
    files = ("spec.json", "config.toml", "machine.json", "prediction.json", "log.jsonl")
    made = (*files, "checkpoints", "report.html", "report.md", "report.json")
    assert {path.name for path in tiny_run.iterdir()} >= set(made)
    text = (tiny_run / "log.jsonl").read_text()
    assert all(line.startswith('{"kind": "') for line in text.splitlines())
    lines = log_lines(tiny_run)
    assert (lines[0]["kind"], lines[-1]["kind"]) == ("start", "end")
    assert [line["step"] for line in steps_of(tiny_run)] == list(range(12))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 5, 10, 12]
    saved = [line["path"] for line in lines if line["kind"] == "checkpoint"]
    assert saved == [f"checkpoints/step_{n:08d}" for n in (4, 8, 12)]
    frozen = hashlib.sha256((tiny_run / "prediction.json").read_bytes()).hexdigest()
    assert lines[0]["prediction_sha256"] == frozen, "the prediction was made before step 0"


def test_the_ledger_adds_up_to_the_wall_time(tiny_run: Path) -> None:
    """Every second counts once; evaluations and checkpoints are not part of a step."""
    report = json.loads((tiny_run / "report.json").read_text())
    ledger = report["time_ledger"]
    parts = sum(v for k, v in ledger.items() if k != "wall_s" and v is not None)
    assert parts == pytest.approx(ledger["wall_s"], rel=1e-9)
    assert ledger["other_s"] >= 0
    lines = log_lines(tiny_run)
    assert ledger["step_s"] + ledger["data_wait_s"] == pytest.approx(
        sum(line["step_seconds"] for line in lines if line["kind"] == "step")
    )
    assert ledger["wall_s"] == pytest.approx(lines[-1]["wall_seconds"], abs=0.01)


def test_a_report_without_a_gpu_measures_time_and_not_power(tiny_run: Path) -> None:
    rows = rows_of(tiny_run)
    for row in ("step_seconds", "total_seconds", "mfu_palm", "peak_process_bytes", "val_loss"):
        assert rows[row]["measured"]["value"] > 0, row
        assert rows[row]["analytic"] is not None or row == "val_loss", row
    for row in ("power_watts", "energy_kwh", "cost", "peak_allocated_bytes"):
        assert rows[row]["measured"] is None
        assert rows[row]["why"] == "not measured: no GPU"
    assert rows["step_seconds"]["analytic"]["low"] < rows["step_seconds"]["analytic"]["high"]
    assert rows["mfu_palm"]["measured"]["value"] < 1
    attribution = json.loads((tiny_run / "report.json").read_text())["attribution"]
    difference = attribution["actual_s"] - attribution["predicted_s"]
    assert sum(p["seconds"] for p in attribution["parts"]) == pytest.approx(difference, abs=1e-6)


def test_a_killed_run_is_reported_and_resumes_exactly(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    flags = [str(DEMO), f"--run.out={tmp_path}", *TINY]
    killed = run_in_copy("faulty_train.py", ["kill:22", *flags], tmp_path / "out")
    assert killed.returncode == -signal.SIGKILL
    succeed(run("report.py", folder))
    report = json.loads((folder / "report.json").read_text())
    assert report["run"]["status"] == "unfinished"
    assert report["run"]["steps_done"] == 10
    assert report["run"]["projected_total_s"] > report["time_ledger"]["wall_s"]
    assert "of 12" in report["run"]["headline"]

    succeed(train_tiny(tmp_path, "--resume=auto"))
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[1]["first_step"] in (4, 8)
    assert losses(folder) == losses(tiny_run)


def test_a_resumed_run_logs_every_step_once(tmp_path: Path) -> None:
    succeed(train_tiny(tmp_path, "--rehearse=3"))
    assert steps_of(tmp_path / "demo")[-1]["step"] == 3
    succeed(train_tiny(tmp_path, "--resume=auto"))
    assert [line["step"] for line in steps_of(tmp_path / "demo")] == list(range(12))
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["run"]["status"] == "finished"
    wall = sum(line["wall_seconds"] for line in log_lines(tmp_path / "demo") if "status" in line)
    ledger = report["time_ledger"]
    assert ledger["wall_s"] - ledger["gap_s"] == pytest.approx(wall, abs=0.05)
    assert 0 < ledger["gap_s"] < 120
    assert [one["what"] for one in report["night"]["happenings"]] == ["restart"]


def test_a_damaged_checkpoint_is_skipped(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    subprocess.run(["cp", "-r", str(tiny_run), str(folder)], check=True)
    damaged = folder / "checkpoints" / "step_00000012" / "state.pt"
    os.truncate(damaged, damaged.stat().st_size // 2)
    succeed(train_tiny(tmp_path, "--resume=auto"))
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[1]["first_step"] == 8
    warnings = [line["text"] for line in log_lines(folder) if line.get("level") == "warning"]
    assert any("step_00000012 is damaged" in text for text in warnings)


def test_without_a_compiler_training_falls_back_to_eager_mode_with_a_warning(tmp_path: Path) -> None:
    environment = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    succeed(train_tiny(tmp_path, "--run.compile=true", "--train.max-steps=2", **environment))
    lines = log_lines(tmp_path / "demo")
    assert [line["mode"] for line in lines if line["kind"] == "compile"] == ["eager"]
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert any("torch.compile failed" in text for text in report["warnings"])


def test_the_documented_configuration_trains_on_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data", GPT2_ORIGIN, shard_tokens=3000) as writer:
        for split, count in (("val", 3), ("train", 12)):
            for _ in range(count):
                document = generator.integers(0, 500, 1000, dtype=np.uint16)
                document[0] = 50256
                write_document(writer, split, document)  # type: ignore[arg-type]
    flags = [f"--run.out={tmp_path}", "--run.device=cpu", "--run.dtype=float32", *TINY]
    flags += [f"--data.path={tmp_path / 'data'}", "--train.max-steps=3", "--wandb.mode=offline"]
    offline = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    offline["TIKTOKEN_CACHE_DIR"] = str(tmp_path / "no-vocabulary")
    config = ROOT / "configs" / "rtx4070_fineweb.toml"
    succeed(run("train.py", config, *flags, "--optimizer.warmup-steps=1", **offline))
    folder = tmp_path / "rtx4070_fineweb"
    assert len(steps_of(folder)) == 3
    assert rows_of(folder)["data_epochs"]["measured"]["value"] == pytest.approx(768 / 12000)
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    report = json.loads((folder / "report.json").read_text())
    warned = "holds 12,000 training tokens, not the 3,680,000,000"
    assert any(warned in text for text in report["warnings"])
    events = [line["what"] for line in log_lines(folder) if line["kind"] == "event"]
    assert "no_sample" in events  # the vocabulary is not available here


def test_claims_passed_to_a_run_are_in_its_report(tmp_path: Path) -> None:
    claims = tmp_path / "claims.toml"
    claims.write_text(
        '[document]\ntitle = "a colleague"\n[[claim]]\nkey = "step_seconds"\nunit = "h"\n'
        'low = 1\nhigh = 2\nquote = "an hour or two"\nenglish = "an hour or two"\n'
    )
    succeed(train_tiny(tmp_path, "--train.max-steps=3", f"--claims={claims}"))
    row = rows_of(tmp_path / "demo")["step_seconds"]
    assert row["verdict"] == "missed"
    assert row["claimed"]["quote"] == "an hour or two"
    assert row["factor"] < 1e-3


def test_a_full_disk_loses_checkpoints_but_not_the_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "360k") as small:
        done = train_tiny(small, "--force")  # past the doctor
        assert done.returncode in (0, 2), done.stderr  # 2: no room is left for the report
        assert "Traceback" not in done.stderr
        folder = small / "demo"
        texts = [line["text"] for line in log_lines(folder) if line["kind"] == "event"]
        assert any(text.startswith("No checkpoint at step") for text in texts), texts
        assert [line["step"] for line in steps_of(folder)] == list(range(12))
        (whole,) = (folder / "checkpoints").iterdir()
        files = ["meta.json", "model.safetensors", "state.pt"]
        assert sorted(p.name for p in whole.iterdir()) == files


def test_the_demo_learns(tmp_path: Path) -> None:
    """A sixth of `make demo`: the loss falls from 5.5."""
    steps = ["--train.max-steps=200", "--train.eval-every=200", "--train.checkpoint-every=200", "--run.compile=false"]
    succeed(run("train.py", DEMO, f"--run.out={tmp_path}", *steps, timeout=900))
    rows = rows_of(tmp_path / "demo")
    assert rows["val_loss"]["measured"]["value"] < 2.7
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert len(report["samples"][0]) > 100


def test_reading_steps_one_step_late_changes_no_result(tiny_run: Path, tmp_path: Path) -> None:
    """As on a GPU, whose steps are logged after the next one has been queued."""
    arguments = ["read_late:", str(DEMO), f"--run.out={tmp_path}", *TINY]
    succeed(run_in_copy("faulty_train.py", arguments, tmp_path))
    logs = [log_lines(folder) for folder in (tiny_run, tmp_path / "demo")]
    keys = ("kind", "step", "loss", "grad_norm")
    for kinds in (("step", "eval"), ("checkpoint",)):
        now, late_lines = ([[line.get(key) for key in keys] for line in log if line["kind"] in kinds] for log in logs)
        assert now == late_lines

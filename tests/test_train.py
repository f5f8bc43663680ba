"""train.py from the command line to the report, on the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import (
    DEMO,
    ROOT,
    TINY,
    log_lines,
    rows_of,
    run,
    start_run,
    steps_of,
    train_tiny,
    wait_for_step,
)
from examples import GPT2_ORIGIN

from trainer.data.shards import ShardWriter
from trainer.step.compile import CACHE, persist_compile_cache


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in steps_of(folder)}


def test_a_run_folder_holds_what_the_contract_says(tiny_run: Path) -> None:
    """Other tools read the run folder: its files and the kinds of its lines are a contract."""
    names = {path.name for path in tiny_run.iterdir()}
    assert names >= {
        "spec.json",
        "config.toml",
        "machine.json",
        "prediction.json",
        "log.jsonl",
        "checkpoints",
        "report.html",
        "report.md",
        "report.json",
    }
    text = (tiny_run / "log.jsonl").read_text()
    assert all(line.startswith('{"kind": "') for line in text.splitlines())
    kinds = [line["kind"] for line in log_lines(tiny_run)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert [line["step"] for line in steps_of(tiny_run)] == list(range(12))
    evaluated = [line["step"] for line in log_lines(tiny_run) if line["kind"] == "eval"]
    assert evaluated == [0, 5, 10, 12]
    saved = [line["path"] for line in log_lines(tiny_run) if line["kind"] == "checkpoint"]
    assert saved == [f"checkpoints/step_{n:08d}" for n in (4, 8, 12)]


def test_the_prediction_is_frozen_before_step_0(tiny_run: Path) -> None:
    """A prediction made after the fact is worth nothing: its hash stands in the first log line."""
    frozen = hashlib.sha256((tiny_run / "prediction.json").read_bytes()).hexdigest()
    assert log_lines(tiny_run)[0]["prediction_sha256"] == frozen


def test_the_ledger_adds_up_to_the_wall_time(tiny_run: Path) -> None:
    """Every second is booked once: evaluation and checkpoints never stand inside a step."""
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
    """What was not measured is absent with its reason, never 0."""
    rows = rows_of(tiny_run)
    for row in ("step_seconds", "total_seconds", "mfu_palm", "peak_process_bytes", "val_loss"):
        assert rows[row]["measured"]["value"] > 0, row
    for row in ("power_watts", "energy_kwh", "cost", "peak_allocated_bytes"):
        assert rows[row]["measured"] is None
        assert rows[row]["why"] == "not measured: no GPU"
    assert rows["step_seconds"]["analytic"]["low"] < rows["step_seconds"]["analytic"]["high"]
    assert rows["mfu_palm"]["measured"]["value"] < 1
    attribution = json.loads((tiny_run / "report.json").read_text())["attribution"]
    difference = attribution["actual_s"] - attribution["predicted_s"]
    assert sum(p["seconds"] for p in attribution["parts"]) == pytest.approx(difference, abs=1e-6)


def test_a_killed_run_is_reported_and_resumed_exactly(tiny_run: Path, tmp_path: Path) -> None:
    """kill -9 at any moment: a report says how far it got; resumed, every loss is the same bits.

    Before, nanoGPT-like loops replayed the first batches after a resume.
    """
    folder = tmp_path / "demo"
    with start_run(tmp_path, "--optimizer.decay-steps=12") as process:
        wait_for_step(folder, 6)
        process.kill()
    done = run("report.py", folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["run"]["status"] == "unfinished"
    assert report["run"]["steps_done"] >= 7
    assert report["run"]["projected_total_s"] > report["time_ledger"]["wall_s"]
    assert "of 20,000" in report["run"]["headline"]

    with start_run(tmp_path, "--optimizer.decay-steps=12", "--resume=auto") as process:
        wait_for_step(folder, 11, process=2)
        process.send_signal(signal.SIGTERM)
    assert run("report.py", folder).returncode == 0
    assert json.loads((folder / "report.json").read_text())["run"]["status"] == "stopped"
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[1]["first_step"] in (4, 8)
    again, undisturbed = losses(folder), losses(tiny_run)
    assert [again[step] for step in range(12)] == [undisturbed[step] for step in range(12)]


def test_a_resumed_run_counts_on_to_its_end(tmp_path: Path) -> None:
    """A rehearsal stops early; the run that resumes it ends with every step there once."""
    rehearsed = train_tiny(tmp_path, "--rehearse=3")
    assert rehearsed.returncode == 0, rehearsed.stderr
    assert steps_of(tmp_path / "demo")[-1]["step"] == 3
    resumed = train_tiny(tmp_path, "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in steps_of(tmp_path / "demo")] == list(range(12))
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["run"]["status"] == "finished"
    wall = sum(line["wall_seconds"] for line in log_lines(tmp_path / "demo") if "status" in line)
    ledger = report["time_ledger"]
    assert ledger["wall_s"] - ledger["gap_s"] == pytest.approx(wall, abs=0.05)
    assert 0 < ledger["gap_s"] < 120
    assert [one["what"] for one in report["night"]["happenings"]] == ["restart"]


def test_a_stopped_run_saves_a_checkpoint_first(tmp_path: Path) -> None:
    """Ctrl-C costs at most the step it falls into."""
    number = signal.SIGINT
    folder = tmp_path / "demo"
    with start_run(tmp_path, "--train.checkpoint-every=10000") as process:
        wait_for_step(folder, 3)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    end = log_lines(folder)[-1]
    assert end["status"] == "stopped"
    assert end["reason"] == f"{number.name} was received"
    assert (folder / "checkpoints" / f"step_{end['steps']:08d}" / "model.safetensors").exists()
    assert (folder / "report.html").exists()


def test_a_damaged_checkpoint_is_passed_over(tiny_run: Path, tmp_path: Path) -> None:
    """A file cut by a crash is never loaded: the checkpoint before it is, and the log says so."""
    folder = tmp_path / "demo"
    subprocess.run(["cp", "-r", str(tiny_run), str(folder)], check=True)
    damaged = folder / "checkpoints" / "step_00000012" / "state.pt"
    os.truncate(damaged, damaged.stat().st_size // 2)
    done = train_tiny(tmp_path, "--resume=auto")
    assert done.returncode == 0, done.stderr
    starts = [line for line in log_lines(folder) if line["kind"] == "start"]
    assert starts[1]["first_step"] == 8
    warnings = [line["text"] for line in log_lines(folder) if line.get("level") == "warning"]
    assert any("step_00000012 is damaged" in text for text in warnings)


def test_what_is_compiled_outlives_temporary_files_unless_a_folder_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user's cache folder cannot be made, torch's own place does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(CACHE, "chosen")
    persist_compile_cache()
    assert os.environ[CACHE] == "chosen"
    monkeypatch.delenv(CACHE)
    (tmp_path / "cache").write_text("no folder")
    persist_compile_cache()
    assert CACHE not in os.environ
    (tmp_path / "cache").unlink()
    persist_compile_cache()
    assert os.environ[CACHE] == str(tmp_path / "cache" / "nanogauge" / "compiled")


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path: Path) -> None:
    """A fresh machine may have no C++ compiler: eager is slower, a dead run is worse."""
    cache = tmp_path / "cache"
    done = train_tiny(
        tmp_path,
        "--run.compile=true",
        "--train.max-steps=2",
        CXX="/nonexistent/c++",
        TORCHINDUCTOR_CACHE_DIR=str(cache),
    )
    assert done.returncode == 0, done.stderr
    lines = log_lines(tmp_path / "demo")
    assert [line["mode"] for line in lines if line["kind"] == "compile"] == ["eager"]
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert any("torch.compile failed" in text for text in report["warnings"])


def test_shards_of_tokens_are_trained_on(tmp_path: Path) -> None:
    """The documented configuration reads shards: a few of them train on the CPU."""
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data", GPT2_ORIGIN, shard_tokens=3000) as writer:
        for split, count in (("val", 3), ("train", 12)):
            for _ in range(count):
                document = generator.integers(0, 500, 1000, dtype=np.uint16)
                document[0] = 50256
                writer.write(split, document)  # type: ignore[arg-type]
    done = run(
        "train.py",
        ROOT / "configs" / "rtx4070_fineweb.toml",
        f"--run.out={tmp_path}",
        "--run.device=cpu",
        "--run.dtype=float32",
        f"--data.path={tmp_path / 'data'}",
        *TINY,
        "--train.max-steps=3",
        "--optimizer.warmup-steps=1",
        "--wandb.mode=offline",
        TIKTOKEN_CACHE_DIR=str(tmp_path / "no-vocabulary"),
        HTTPS_PROXY="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "rtx4070_fineweb"
    assert len(steps_of(folder)) == 3
    assert rows_of(folder)["data_epochs"]["measured"]["value"] == pytest.approx(768 / 12000)
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    report = json.loads((folder / "report.json").read_text())
    assert any(
        "holds 12,000 training tokens, not the 3,680,000,000" in w for w in report["warnings"]
    )
    events = [line["what"] for line in log_lines(folder) if line["kind"] == "event"]
    assert "no_sample" in events  # no vocabulary can be had here: the run goes on without a sample


def test_claims_given_to_a_run_are_in_its_report(tmp_path: Path) -> None:
    """A document's claims are held against one's own run without a second command."""
    claims = tmp_path / "claims.toml"
    claims.write_text(
        '[document]\ntitle = "a colleague"\n[[claim]]\nkey = "step_seconds"\nunit = "h"\n'
        'low = 1\nhigh = 2\nquote = "an hour or two"\nenglish = "an hour or two"\n'
    )
    done = train_tiny(tmp_path, "--train.max-steps=3", f"--claims={claims}")
    assert done.returncode == 0, done.stderr
    row = rows_of(tmp_path / "demo")["step_seconds"]
    assert row["verdict"] == "missed"
    assert row["claimed"]["quote"] == "an hour or two"
    assert row["factor"] < 1e-3


def test_a_run_that_diverged_ends_before_a_checkpoint_could_hold_it(tmp_path: Path) -> None:
    """A run that diverged at midnight must not overwrite its good checkpoints until morning."""
    done = train_tiny(
        tmp_path, "--optimizer.learning-rate=1e30", "--optimizer.warmup-steps=0", "--run.seed=1"
    )
    assert done.returncode == 1
    assert "whose updates were skipped, and there is no checkpoint to roll back to" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    end: dict[str, Any] = log_lines(tmp_path / "demo")[-1]
    assert end["status"] == "failed"
    assert (tmp_path / "demo" / "report.html").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path: Path) -> None:
    """A disk that fills up at night: the last good checkpoint stays, training goes on, the log says
    so; the writers of weights and optimizer state each have an error of their own for it.
    """
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        done = train_tiny(small, "--force")  # the doctor would not let it begin
        assert done.returncode in (0, 2), done.stderr  # 2: no room is left for the report
        assert "Traceback" not in done.stderr
        folder = small / "demo"
        texts = [line["text"] for line in log_lines(folder) if line["kind"] == "event"]
        assert any(text.startswith("No checkpoint at step") for text in texts), texts
        assert [line["step"] for line in steps_of(folder)] == list(range(12))
        whole = list((folder / "checkpoints").glob("step_*"))
        assert [sorted(p.name for p in path.iterdir()) for path in whole] == [
            ["meta.json", "model.safetensors", "state.pt"]
        ]
        assert not list((folder / "checkpoints").glob(".step_*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_demo_learns_and_its_report_is_whole(tmp_path: Path) -> None:
    """make demo's promise: below 2.0 nats per byte, with its own prediction beside the figures."""
    done = run("train.py", DEMO, f"--run.out={tmp_path}", timeout=900)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "demo")
    assert rows["val_loss"]["measured"]["value"] < 2.0
    for row in ("step_seconds", "total_seconds", "mfu_palm", "peak_process_bytes"):
        assert rows[row]["analytic"] is not None, row
        assert rows[row]["measured"] is not None, row
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert len(report["samples"][0]) > 100
    checker = ROOT.parent / "shared" / "check_report.py"
    if checker.exists():
        path = tmp_path / "demo" / "report.json"
        checked = subprocess.run(
            ["python3", str(checker), "demo", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout

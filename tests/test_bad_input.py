"""Bad input: one sentence on stderr that says what to do, exit status 2, nothing overwritten."""

import os
import subprocess
from pathlib import Path

import pytest
from commands import DEMO, ROOT, TINY, run, run_here, run_main, train_tiny

from nanogauge.__main__ import main

DOCUMENTED = ROOT / "configs" / "rtx4070_fineweb.toml"
SEED = ROOT / "predictions" / "seed_zh.toml"
LOG = "step 0: train loss 10.9000, val loss 10.9000\n"
LOG += "iter 0: loss 10.9000, time 32000.00ms, mfu -100.00%\n"
LOG += "iter 200: loss 6.3000, time 3900.00ms, mfu 12.87%\n"


def refused(script: str, *arguments: object, words: str) -> None:
    """Check that the command exits with 2 and one sentence containing `words`."""
    check_refusal(run_here(script, *arguments), words)


def process_refused(script: str, *arguments: object, words: str) -> None:
    """Check the same in a process of its own, with its imports and exit handlers."""
    check_refusal(run(script, *arguments), words)


def check_refusal(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr


def import_arguments(log: Path, out: Path) -> list[object]:
    return ["--nanogpt-log", log, "--config", DOCUMENTED, "--gpu", "RTX 4070", "--out", out]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.n-embdd=5"], "did you mean --model.n-embd 5 (model.n_embd)?"),
        (["--model.n-embd=385"], "not a multiple of n_head"),
        (["--model.n-layer=twelve"], "model.n_layer"),
        (["--run.dtype=int8"], "run.dtype"),
        (["--gpu", "RTX 4070 Max-Q"], "nearest: RTX 4070"),
        (["--gpu", "T4"], "no bfloat16 matrix units"),
        (["--free-vram-gib=0"], "must be above 0"),
        (["--free-vram-gib=inf"], "must be above 0"),
        (["--train.max-steps=1e308"], "train.max_steps"),
        (["--claims", "no/such/file.toml"], "there is no claims file"),
    ],
)
def test_a_plan_refuses_what_it_cannot_plan(flags: list[str], words: str) -> None:
    gpu = [] if "--gpu" in flags else ["--gpu", "RTX 4070"]
    refused("plan.py", DOCUMENTED, *gpu, *flags, words=words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nn_embdd = 4\n", "did you mean"),
        ('[run]\nname = "x"\n', "the key model is missing"),
        ("[run\n", "not valid TOML"),
        ("[run]\nname = 5\n[model]\n", "run.name: input should be a valid string"),
        ('[run]\nname = "../x"\n', "run.name"),
    ],
)
def test_a_wrong_configuration_is_named_by_its_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    refused("plan.py", path, "--gpu", "RTX 4070", words=words)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    words = "there is no configuration file"
    process_refused("train.py", path, words=words)
    process_refused("plan.py", path, "--gpu", "RTX 4070", words=words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('key = "mfu_palm"', 'key = "mfu_plam"'), "did you mean mfu_palm?"),
        (('unit = "W"', 'unit = "horses"'), "unknown unit 'horses' for power_watts"),
        (("low = 15\nhigh = 20", "low = 20\nhigh = 15"), "low is above high"),
        (('"6 * parameters * tokens_total"', '"__import__(1)"'), "is not arithmetic"),
        (('"2 * parameters_total"', '"2 * parametres"'), "unknown name parametres"),
        (('key = "cost"', 'key = "power_watts"'), "unknown unit"),
        (('key = "total_seconds.reported"', 'key = "total_seconds.expected"'), "duplicate key total_seconds.expected"),
    ],
)
def test_a_wrong_claim_is_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = SEED.read_text()
    assert change[0] in text
    path = tmp_path / "claims.toml"
    path.write_text(text.replace(*change))
    refused("plan.py", DOCUMENTED, "--gpu", "RTX 4070", "--claims", path, words=words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello\n", "is no log of a known program"),
        ("", "is no log of a known program"),
        (LOG + "iter 90000: loss 6.3000, time 3900.00ms, mfu 12.87%\n", "train.max_steps = 20,000"),
    ],
)
def test_a_log_that_cannot_be_read_makes_no_folder(tmp_path: Path, text: str, words: str) -> None:
    log, out = tmp_path / "log.txt", tmp_path / "out"
    log.write_text(text)
    refused("report.py", *import_arguments(log, out), words=words)
    assert not out.exists()


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    words = "there is no log"
    process_refused("report.py", *import_arguments(tmp_path / "no", tmp_path / "out"), words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the folder of a run"),
        (["runs/no-such-run"], "there is no run folder"),
        (["nanogauge"], "it has no log.jsonl"),
        (["nanogauge", "--gpu", "RTX 4070"], "belongs to --log"),
        (["--nanogpt-log", "x"], "also needs --out"),
        (["--nonsense"], "unknown argument --nonsense"),
    ],
)
def test_a_report_without_a_run_is_refused(arguments: list[str], words: str) -> None:
    refused("report.py", *arguments, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plann"], "nanogauge: unknown command plann; did you mean plan?"),
        (["import", "x"], "nanogauge import: an imported log also needs --out"),
        (["plan", DEMO, "--gpuu", "T4"], "nanogauge plan: unknown argument --gpuu; did you mean"),
    ],
)
def test_the_installed_command_names_itself_in_a_refusal(arguments: list[object], words: str) -> None:
    check_refusal(run_main(main, "nanogauge", *arguments), words)


def test_training_without_its_data_says_how_to_get_it(tmp_path: Path) -> None:
    flags = [f"--run.out={tmp_path}", "--run.device=cpu", f"--data.path={tmp_path / 'none'}"]
    process_refused("train.py", DOCUMENTED, *flags, words="python prepare_fineweb.py")
    assert not (tmp_path / "rtx4070_fineweb").exists()


def test_training_on_a_gpu_that_is_not_there_says_so(tmp_path: Path) -> None:
    done = run("train.py", DOCUMENTED, f"--run.out={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA GPU is visible to torch" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    assert train_tiny(tmp_path, "--train.max-steps=2").returncode == 0
    before = (tmp_path / "demo" / "log.jsonl").read_bytes()
    flags = [f"--run.out={tmp_path}", *TINY]
    process_refused("train.py", DEMO, *flags, words="already holds a run")
    assert (tmp_path / "demo" / "log.jsonl").read_bytes() == before
    flags += ["--train.micro-batch=2", "--train.grad-accum=4", "--model.dropout=0"]
    changed = "cannot resume with another model.dropout: the run has 0.1, this command 0.0; another"
    process_refused("train.py", DEMO, *flags, "--resume=auto", words=changed)
    names = "model.dropout train.micro_batch train.grad_accum train.max_steps"
    allowed = f"take all changes with --allow-change {names}"
    more = ["--resume=auto", "--allow-change", "train.max_steps"]
    process_refused("train.py", DEMO, *flags, *more, words="another model.dropout")
    process_refused("train.py", DEMO, *flags, "--resume=auto", words=allowed)
    assert (tmp_path / "demo" / "log.jsonl").read_bytes() == before
    done = run("train.py", DEMO, *flags, "--resume=auto", "--allow-change", *names.split())
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    process_refused("train.py", DEMO, f"--run.out={tmp_path}", *TINY, words="cannot make the folder")
    tmp_path.chmod(0o700)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    flags = [f"--run.out={tmp_path / 'file'}", *TINY]
    process_refused("train.py", DEMO, *flags, words="cannot make the folder")
    log = tmp_path / "log.txt"
    log.write_text(LOG)
    out = tmp_path / "file" / "out"
    refused("report.py", *import_arguments(log, out), words="cannot make the folder")

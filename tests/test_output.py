"""Output on streams of any kind, and the commands that messages name."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from commands import DEMO, ROOT, command, run, train_tiny

import plan
from nanogauge.cli import run_command
from nanogauge.shell import pip_install, python_command

PLAN = [ROOT / "configs" / "rtx4070_fineweb.toml", "--gpu", "RTX 4070"]
CLAIMS = ["--claims", ROOT / "predictions" / "seed_zh.toml"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis"])
def test_no_character_ends_a_command(encoding: str) -> None:
    assert "17.2-24.5 h" in printed_plan(encoding).replace("\N{EN DASH}", "-")
    (row, *_) = json.loads(printed_plan(encoding, "--json"))["rows"]
    assert "每次迭代" in row["claimed"]["quote"], "JSON keeps every character"


def printed_plan(encoding: str, *flags: str) -> str:
    """Return what plan.py prints on a stream of this encoding."""
    stream, errors = io.TextIOWrapper(io.BytesIO(), encoding=encoding), io.StringIO()
    given = ["plan.py", *map(str, (*PLAN, *CLAIMS, *flags))]
    with (
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", given),
        pytest.raises(SystemExit, match="^0$"),
    ):
        run_command(plan.main)
    assert errors.getvalue() == ""
    stream.seek(0)
    return stream.read()


def test_a_run_ends_well_on_a_stream_that_cannot_hold_its_characters(tmp_path: Path) -> None:
    done = train_tiny(tmp_path, "--train.max-steps=2", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


LASTING = "from nanogauge.cli import outlive_terminal; outlive_terminal(); "
PRINTS = f"{LASTING}[print('x' * 99, flush=True) for _ in range(999)]; open('done', 'w').close()"


@pytest.mark.parametrize("full", [True, False])
def test_a_closed_pipe_and_a_full_disk_do_not_end_a_run(tmp_path: Path, full: bool) -> None:
    if full:
        with Path("/dev/full").open("wb") as output:
            subprocess.run([sys.executable, "-c", PRINTS], cwd=tmp_path, stdout=output, check=True)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        subprocess.run([sys.executable, "-c", PRINTS], cwd=tmp_path, stdout=writing, check=True)
        os.close(writing)
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [(">&-", 0, ""), ("| head -c 1 >/dev/null", 1, ""), ("> /dev/full", 1, "no space is left")],
)
def test_a_command_ends_in_silence_where_nobody_reads(redirection: str, status: int, words: str) -> None:
    line = f"set -o pipefail; {shlex.join(command('plan.py', *PLAN))} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    "arguments", [("plan.py", *PLAN), ("prepare_fineweb.py", "--tokens", "1e3"), ("-m", "nanogauge", "report")]
)
def test_a_python_without_the_packages_is_told_in_a_sentence(arguments: tuple[object, ...]) -> None:
    """-S leaves the packages of the environment out."""
    given = [sys.executable, "-S", *map(str, arguments)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "this Python has no package" in done.stderr
    assert shlex.join(given[1:]) in done.stderr, "the command to type is complete"


def test_commands_in_messages_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, with any name, by the interpreter that prints them."""
    name = "it's my a$b"
    monkeypatch.chdir(tmp_path)
    line = python_command("plan.py", DEMO, "--gpu", "T4", "--run.name", "x", "--claims", name)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert f"there is no claims file {name};" in done.stderr
    install = shlex.split(pip_install("nanogauge[wandb]"))
    assert Path(install[0]).samefile(sys.executable) and install[-1] == "nanogauge[wandb]"
    monkeypatch.chdir(ROOT)
    missing = run("train.py", PLAN[0], f"--data.path={name}", "--run.device=cpu")
    assert f"prepare_fineweb.py --out {shlex.quote(name)}" in missing.stderr


@pytest.mark.parametrize("typed", ["plan.py --train.micro-batch", "train.py --resume"])
def test_bash_completes_flags_and_keys(typed: str) -> None:
    words = shlex.join([sys.executable, *typed[:-3].split()])
    line = f"source nanogauge/completion.bash; COMP_CWORD=2 COMP_WORDS=({words}); _nanogauge"
    shell = ["bash", "-c", f'{line}; echo "${{COMPREPLY[@]}}"']
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    assert typed.split()[1] in done.stdout.split()

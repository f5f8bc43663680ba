"""sample.py continues prompts with the model of a run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run
from examples import GPT2_ORIGIN, write_document

from nanogauge.config import DataSection
from nanogauge.errors import BadInput
from sample import main
from trainer.data.shards import ShardWriter
from trainer.evaluation.load import tokenizer_of


def sample(folder: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    done = run("sample.py", folder, "--device=cpu", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_the_same_seed_continues_a_prompt_with_the_same_text(tiny_run: Path) -> None:
    once, errors = sample(tiny_run, "--prompt=The import ", "--tokens=40", "--seed=2")
    assert once.startswith("The import ")
    assert re.search(r"^step 12, \d+ tokens in .* tokens/s$", errors.strip())
    assert sample(tiny_run, "--prompt=The import ", "--tokens=40", "--seed=2")[0] == once
    assert sample(tiny_run, "--prompt=The import ", "--tokens=40", "--seed=3")[0] != once


def test_each_line_of_a_file_is_a_prompt(tiny_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\n\nZwei äöü\n", encoding="utf-8")
    out, errors = sample(tiny_run, f"--prompts={prompts}", "--tokens=5", "--temperature=0")
    first, second = out.split("\n---\n")
    assert first.startswith("One")
    assert second.startswith("Zwei äöü")
    assert "10 tokens" in errors


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(tiny_run, copy)
    with (copy / "checkpoints" / "step_00000012" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    _, errors = sample(copy, "--tokens=3")
    assert "step_00000012 is damaged and was skipped" in errors
    assert "\nstep 8, " in errors
    _, errors = sample(copy, "--tokens=3", "--checkpoint=12", code=2)
    assert "has no intact checkpoint: the checkpoint" in errors


def test_wrong_arguments_are_refused(tiny_run: Path) -> None:
    for argument, sentence in (
        ("--checkpoint=5", "no checkpoint of step 5; there are: 8, 12."),
        ("--checkpoint=latest", "--checkpoint takes newest, best or a step, not 'latest'."),
        ("--top-p=1.5", "--top-p takes a number above 0 and up to 1, not 1.5."),
        ("--prompts=/nowhere.txt", "cannot read the prompts /nowhere.txt"),
    ):
        with pytest.raises(BadInput, match=re.escape(sentence)):
            main([str(tiny_run), "--device=cpu", argument])


def test_the_tokenizer_is_read_from_data_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_tokenizer: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data", GPT2_ORIGIN, shard_tokens=5) as writer:
        for split in ("val", "train"):
            write_document(writer, split, np.array([50256, 1, 2], np.uint16))
    assert tokenizer_of(DataSection(path="~/data"), None).name == "gpt2"

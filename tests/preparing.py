"""Texts, a hub that serves them, and the command, for the tests of prepare_fineweb.py."""

import contextlib
import io
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hub import Hub

from nanogauge.errors import BadInput
from prepare_fineweb import main
from trainer.data.shards import open_split

ROOT = Path(__file__).parent.parent
REPOSITORY = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
END_OF_TEXT = 50256
CARD = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: {CONFIG}
  data_files:
  - split: train
    path: sample/10BT/*
---
# A dataset of educational web pages
"""
# Retries do not wait in a test.
IMPATIENT = (
    "import runpy, sys, time; time.sleep = lambda seconds: None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)

# Killed when the first shard is renamed, before the manifest lists it.
KILLED_AT_A_SHARD = (
    """import os, pathlib
rename = pathlib.Path.replace
def replace(path, target):
    rename(path, target)
    if target.suffix == ".bin":
        os.kill(os.getpid(), 9)
pathlib.Path.replace = replace
"""
    + IMPATIENT
)


def documents() -> list[list[str]]:
    """Return the texts of three files: of many lengths and scripts, some of them equal."""
    chance = random.Random(7)
    words = ["the", "cell", " wall", "Energie", "\u80fd\u91cf", "\n\n", "don't", "1,024"]
    words += ["\U0001f30d", "\u00e9", "<|x|>"]
    files = []
    for file in range(3):
        lengths = [1, 2, *(chance.randrange(1, 200) for _ in range(38))]
        files.append([f"{file} " + " ".join(chance.choices(words, k=n)) for n in lengths])
        files[-1].append("the same text")
    return files


DOCUMENTS = documents()
TEXTS = [text for file in DOCUMENTS for text in file]


def parquet(texts: list[str]) -> bytes:
    """Return a file with some of FineWeb-Edu's columns, in row groups of ten documents."""
    rows = [{"text": text, "id": f"<urn:uuid:{index}>", "score": 3.1} for index, text in enumerate(texts)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=10)
    return buffer.getvalue()


def hub_of(documents: list[list[str]] = DOCUMENTS, dies_at: str | None = None, faults: Sequence[str] = ()) -> Hub:
    files = {"README.md": CARD.encode(), "data/CC-MAIN-2013-20/000.parquet": parquet(["other"])}
    for number, texts in enumerate(documents):
        files[f"sample/10BT/{number:03d}_00000.parquet"] = parquet(texts)
    return Hub(REPOSITORY, files, dies_at, faults)


def prepare(hub: Hub | None, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process; without a hub, no server answers."""
    return subprocess.run(
        command(*arguments),
        check=False,
        env=environment(hub, home) | more,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )


def prepare_here(home: Path, *arguments: object) -> None:
    """Run the command in this process, which is faster; local datasets only."""
    with contextlib.chdir(home):
        assert main([str(argument) for argument in arguments]) == 0


def refused(home: Path, *arguments: object) -> str:
    """Return the sentence with which the command refuses its arguments."""
    with pytest.raises(BadInput) as error:
        prepare_here(home, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def prepare_until_a_shard(hub: Hub | None, home: Path, *arguments: object) -> None:
    """Run the command in a process that is killed at its first shard."""
    killed = command(*arguments)
    killed[2] = KILLED_AT_A_SHARD
    done = subprocess.run(killed, check=False, env=environment(hub, home), cwd=home)
    assert done.returncode == -9


def command(*arguments: object) -> list[str]:
    script = str(ROOT / "prepare_fineweb.py")
    return [sys.executable, "-c", IMPATIENT, script, *map(str, arguments)]


def environment(hub: Hub | None, home: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "PYTHONPATH": str(ROOT),
    }


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line on stderr, the command's own; there is no traceback before it."""
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("prepare_fineweb.py: "), done.stderr
    return last


def texts_of(tokens: np.ndarray) -> list[str]:
    """Decode a stream of tokens document by document."""
    encoding = tiktoken.get_encoding("gpt2")
    starts = np.flatnonzero(tokens == END_OF_TEXT)
    assert starts[0] == 0
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def texts_in(folder: Path) -> list[str]:
    """Decode the documents of a folder of shards, validation first."""
    splits = [np.concatenate(open_split(folder, split)) for split in ("val", "train")]
    return [text for split in splits for text in texts_of(split)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}

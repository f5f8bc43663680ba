"""Workers that begin anew, as on macOS and Windows, write the shards that forked ones write."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import ROOT, TEXTS, environment

# The command, in a process where the crew was imported on another system.
RUN = """
import multiprocessing.process, runpy, sys
import trainer.data.workers
here, sys.platform = sys.platform, sys.argv[1]
from nanogauge.prepare import crew
sys.platform = here
sys.argv = sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(crew.START_METHOD)
"""


def prepare_on(
    system: str, home: Path, vocabulary: Path | None, *flags: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, system, str(ROOT / "prepare_fineweb.py"), *flags],
        check=False,
        env=environment(None, vocabulary, home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_spawned_workers_write_the_same_bytes(
    tmp_path: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """They inherit nothing: what they need must travel. Their lock was gone before they looked for
    it by its name, so that no preparation began on macOS.
    """
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines)
    flags = ["--dataset", "texts.jsonl", "--val-tokens", "1500", "--shard-tokens", "5000"]
    made = []
    for system, method in (("linux", "fork"), ("darwin", "spawn")):
        more = ["--workers", "2", "--out", method]
        done = prepare_on(system, tmp_path, gpt2_vocabulary, *flags, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == method
        files = sorted((tmp_path / method).iterdir())
        made.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert made[0] == made[1] and len(made[0]) > 3


def test_what_a_spawned_worker_cannot_load_is_told(tmp_path: Path) -> None:
    """The worker's sentence comes back through the pipe, as that of a forked one does."""
    (tmp_path / "texts.txt").write_text("a text")
    flags = ["--dataset", "texts.txt", "--out", "out", "--tokenizer", "none.tiktoken"]
    done = prepare_on("darwin", tmp_path, None, *flags)
    assert done.returncode == 2
    assert "cannot read the tokenizer none.tiktoken" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

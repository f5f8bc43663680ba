"""datatrove's executors start the ranks of a preparation, as docs/preparing.md has it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import ROOT, TEXTS, environment, prepare

pytest.importorskip("datatrove", reason="needs datatrove: pip install 'nanogauge[cluster]'")


def recipe(changes: dict[str, str]) -> str:
    """The documented script, with some of its strings and numbers replaced."""
    text = (ROOT / "docs" / "preparing.md").read_text()
    found = re.search(
        r"^    import subprocess, sys\n.*?\)\.run\(\)\n", text, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    script = textwrap.dedent(found[0])
    for old, new in changes.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return script


def test_the_documented_recipe_writes_what_ranks_started_by_hand_write(
    tmp_path: Path,
    gpt2_vocabulary: Path,  # noqa: F811
) -> None:
    """Byte by byte, the merged manifest too; a second call does only what did not end well."""
    (tmp_path / "source").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number::3]]
        (tmp_path / "source" / f"{number}.jsonl").write_text("".join(lines))
    flags = ["--dataset", "source", "--tokens", "1e6", "--val-tokens", "500"]
    flags += ["--shard-tokens", "2000", "--workers", "1"]
    for rank in range(2):
        more = ["--rank", rank, "--world", 2, "--out", "by_hand"]
        done = prepare(None, gpt2_vocabulary, tmp_path, *flags, *more)
        assert done.returncode == 0, done.stderr

    changes = {
        '["--tokens", "1e10", "--out", "data/fineweb_edu"]': repr([*flags, "--out", "out"]),
        '"prepare_fineweb.py"': repr(str(ROOT / "prepare_fineweb.py")),
        "tasks=14": "tasks=2",
    }
    (tmp_path / "recipe.py").write_text(recipe(changes))

    def run() -> None:
        subprocess.run(
            [sys.executable, "recipe.py"],
            check=True,
            env=environment(None, gpt2_vocabulary, tmp_path),
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
        )

    run()
    made = contents(tmp_path / "out")
    assert made == contents(tmp_path / "by_hand")
    assert sum(name.endswith(".bin") for name in made) > 3
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}

    (tmp_path / "logs" / "prepare" / "completions" / "00001").unlink()
    run()
    assert contents(tmp_path / "out") == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == written


def contents(folder: Path) -> dict[str, bytes]:
    """What every file below a folder holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

"""Parts prepared with datatrove's executors, as docs/preparing.md documents, and joined."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from preparing import ROOT, TEXTS, environment, prepare_here, texts_in
from test_untrusted_files import shards

from nanogauge.errors import BadInput
from trainer.data.prepare import join_parts
from trainer.data.shards import read_manifest


def recipe(changes: dict[str, str]) -> str:
    """Return the documented script with some of its strings and numbers replaced."""
    text = (ROOT / "docs" / "preparing.md").read_text()
    begin = r"^    import subprocess, sys\n.*?join_parts\(OUT\)\n"
    found = re.search(begin, text, re.DOTALL | re.MULTILINE)
    assert found is not None
    script = textwrap.dedent(found[0])
    for old, new in changes.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return script


@pytest.mark.usefixtures("gpt2_tokenizer")
def test_the_documented_recipe_prepares_each_document_once_and_repeats_failed_parts(
    tmp_path: Path,
) -> None:
    pytest.importorskip("datatrove", reason="needs datatrove: pip install 'nanogauge[cluster]'")
    (tmp_path / "source").mkdir()
    for number in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number::2]]
        (tmp_path / "source" / f"{number}.jsonl").write_text("".join(lines))
    flags = ["--tokens", "1e6", "--val-tokens", "500", "--shard-tokens", "2000", "--workers", "1"]
    changes = {
        '["--tokens", "1e9", "--val-tokens", "1e6"]': repr(flags),
        '"data/fineweb_edu"': '"out"',
        '"data/texts"': '"source"',
        "*.parquet": "*.jsonl",
        '"prepare_fineweb.py"': repr(str(ROOT / "prepare_fineweb.py")),
        "tasks=14": "tasks=2",
    }
    (tmp_path / "recipe.py").write_text(recipe(changes))

    def run() -> dict[Path, bytes]:
        """Return the contents of all files."""
        subprocess.run(
            [sys.executable, "recipe.py"],
            check=True,
            env=environment(None, tmp_path),
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
        )
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    out = tmp_path / "out"
    made = run()
    manifest = read_manifest(out)
    assert [file.name for file in manifest.source_files] == ["0.jsonl", "1.jsonl"]
    assert manifest.dataset == "source" and manifest.tokens("val") >= 2 * 500
    assert sorted(texts_in(out)) == sorted(TEXTS)
    prepare_here(tmp_path, "--verify", "out")

    (tmp_path / "logs" / "prepare" / "completions" / "00001").unlink()
    assert run() == made


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('"end_of_text":50256', '"end_of_text":7', "do not belong together: their end_of_text"),
        ('"complete":true', '"complete":false', "is not complete"),
    ],
)
def test_parts_of_another_tokenizer_and_unfinished_parts_are_not_joined(
    tmp_path: Path, was: str, now: str, message: str
) -> None:
    with pytest.raises(BadInput, match="no prepared folders"):
        join_parts(tmp_path)
    for name in ("a", "b"):
        shards(tmp_path / name)
    path = tmp_path / "b" / "manifest.json"
    text = path.read_text().replace(": ", ":")
    assert was in text
    path.write_text(text.replace(was, now))
    with pytest.raises(BadInput, match=message):
        join_parts(tmp_path)

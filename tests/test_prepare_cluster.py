"""Prepare parts with datatrove's executors, as docs/preparing.md documents, and join them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from preparing import ROOT, TEXTS, environment, prepare, texts_of
from test_handed_over import shards

from nanogauge.errors import BadInput
from trainer.data.prepare import join_parts
from trainer.data.shards import open_split, read_manifest

pytest.importorskip("datatrove", reason="needs datatrove: pip install 'nanogauge[cluster]'")


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


def test_the_documented_recipe_prepares_each_document_once_and_repeats_what_failed(
    tmp_path: Path,
    gpt2_vocabulary: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    (tmp_path / "source").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number::3]]
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
    out = tmp_path / "out"
    manifest = read_manifest(out)
    assert [file.name for file in manifest.source_files] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert manifest.dataset == "source" and manifest.tokens("val") >= 3 * 500
    splits = [np.concatenate(open_split(out, split)) for split in ("val", "train")]
    assert sorted(t for split in splits for t in texts_of(split)) == sorted(TEXTS)
    checked = prepare(None, gpt2_vocabulary, tmp_path, "--verify", "out")
    assert checked.returncode == 0, checked.stderr

    made = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "logs" / "prepare" / "completions" / "00001").unlink()
    run()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == made


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
    text = path.read_text()
    assert was in text.replace(": ", ":")
    path.write_text(text.replace(": ", ":").replace(was, now))
    with pytest.raises(BadInput, match=message):
        join_parts(tmp_path)


def test_a_manifest_written_by_a_rank_is_still_read(tmp_path: Path) -> None:
    """Manifests once recorded the rank and world size of a shared preparation."""
    settings = {"tokens": 4, "val_tokens": 4, "shard_tokens": 5, "text_column": "text"}
    folder = shards(tmp_path / "data")
    values = json.loads((folder / "manifest.json").read_text())
    values["settings"] = settings | {"unit_bytes": 1, "rank": 1, "world": 2}
    (folder / "manifest.json").write_text(json.dumps(values))
    read = read_manifest(folder).settings
    assert read is not None and read.tokens == 4

"""prepare_fineweb.py, the real command with the real client: what is on disk is the dataset."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from hub import REVISION, Hub

from nanogauge.errors import RunFailed
from nanogauge.prepare import fineweb
from nanogauge.prepare.shards import MANIFEST_NAME, open_split, read_manifest

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
# The client waits between its tries, for minutes in all; a test does not.
IMPATIENT = (
    "import runpy, sys, time; time.sleep = lambda seconds: None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def _documents() -> list[list[str]]:
    """The texts of three files: of many lengths, in several scripts, some of them equal."""
    chance = random.Random(7)
    words = [
        "the",
        "cell",
        " wall",
        "Energie",
        "\u80fd\u91cf",
        "\n\n",
        "don't",
        "1,024",
        "\U0001f30d",
        "\u00e9",
        "<|x|>",
    ]
    files = []
    for file in range(3):
        lengths = [1, 2, *(chance.randrange(1, 200) for _ in range(38))]
        files.append([f"{file} " + " ".join(chance.choices(words, k=n)) for n in lengths])
        files[-1].append("the same text")
    return files


DOCUMENTS = _documents()
TEXTS = [text for file in DOCUMENTS for text in file]


def _parquet(texts: list[str]) -> bytes:
    """A file with FineWeb-Edu's columns, in row groups of ten documents."""
    rows = [
        {
            "text": text,
            "id": f"<urn:uuid:{index}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{index}",
            "file_path": "s3://crawl/segment.warc.gz",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(text) // 4,
            "score": 3.1,
            "int_score": 3,
        }
        for index, text in enumerate(texts)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=10)
    return buffer.getvalue()


def _hub(documents: list[list[str]] = DOCUMENTS, dies_at: str | None = None) -> Hub:
    files = {"README.md": CARD.encode(), "data/CC-MAIN-2013-20/000.parquet": _parquet(["other"])}
    for number, texts in enumerate(documents):
        files[f"sample/10BT/{number:03d}_00000.parquet"] = _parquet(texts)
    return Hub(REPOSITORY, files, dies_at)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with _hub() as running:
        yield running


def _prepare(
    hub: Hub | None, vocabulary: Path | None, home: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run the real command; without a hub, at an address where nothing answers."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TIKTOKEN_CACHE_DIR": str(vocabulary or home / "no vocabulary"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(ROOT / "prepare_fineweb.py"), *map(str, arguments)],
        check=False,
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr, which is the command's own; no traceback is before it."""
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("prepare_fineweb.py: "), done.stderr
    return last


def _texts_of(tokens: np.ndarray) -> list[str]:
    """Decode a stream of tokens document by document."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    starts = np.flatnonzero(tokens == END_OF_TEXT)
    assert starts[0] == 0
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize(("tokens", "ended"), [(9_000, False), (1_000_000, True)])
def test_the_shards_decode_to_the_documents_in_order_and_no_document_is_in_both_splits(
    hub: Hub,
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    ended: bool,
) -> None:
    """What is trained on is the dataset: each document once, whole, in its order, in one split."""
    out = tmp_path / "data" / "shards"
    sizes = ["--val-tokens", 1500, "--shard-tokens", "2e3", "--workers", 2]
    done = _prepare(hub, gpt2_vocabulary, tmp_path, "--tokens", tokens, "--out", out, *sizes)
    assert done.returncode == 0, done.stderr
    assert f"--data.path {out}" in done.stdout
    assert ("dataset ended before" in done.stdout) is ended
    assert "tokens/s" in done.stderr

    manifest = read_manifest(out)
    assert (manifest.tokenizer, manifest.vocab_size) == ("gpt2", 50257)
    assert (manifest.dataset, manifest.dataset_config) == (REPOSITORY, CONFIG)
    assert manifest.revision == REVISION
    on_disk = sorted(path.name for path in out.iterdir())
    assert on_disk == sorted([MANIFEST_NAME, *(shard.file for shard in manifest.shards)])
    for shard in manifest.shards:
        assert hashlib.sha256((out / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert [s.tokens for s in manifest.shards[1:-1]] == [2000] * (len(manifest.shards) - 2)
    assert manifest.shards[0].file == "fineweb_val_000000.bin"
    assert manifest.shards[1].file == "fineweb_train_000001.bin"

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    val, train = (np.concatenate(open_split(out, split)) for split in ("val", "train"))
    assert manifest.total_tokens == val.size + train.size
    val_texts, train_texts = _texts_of(val), _texts_of(train)
    assert len(val_texts) == manifest.documents("val")
    assert len(train_texts) == manifest.documents("train")
    whole = val_texts + train_texts[:-1]
    assert whole == TEXTS[: len(whole)]
    cut = TEXTS[len(whole)]
    if ended:
        assert len(whole) + 1 == len(TEXTS) and train_texts[-1] == cut
    else:
        assert train.size == tokens and cut.startswith(train_texts[-1].rstrip("\ufffd"))
    last_of_val = np.flatnonzero(val == END_OF_TEXT)[-1]
    assert last_of_val < 1500 <= val.size


def test_a_filled_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Hours of preparation are not overwritten by a second call."""
    out = tmp_path / "shards"
    out.mkdir()
    (out / MANIFEST_NAME).write_text("the work of hours")
    (out / "fineweb_val_000000.bin").write_bytes(b"more of it")
    before = {path: path.read_bytes() for path in out.iterdir()}
    done = _prepare(None, None, tmp_path, "--out", out)
    assert done.returncode == 2
    assert "delete that folder" in _sentence(done)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "1e15"], r"need 2,000,0\d\d\.\d GB, and .* GB free"),
        (["--tokens", "1.5"], "'1.5' is no whole number"),
        (["--tokens", "many"], "'many' is no whole number"),
        (["--tokens", "0"], "'0' is no whole number"),
        (["--tokens", "inf"], "'inf' is no whole number"),
        (["--token", "1e6"], "did you mean --tokens"),
        (["--tokens", "1e3", "--out", "/dev/null/x"], "cannot write to /dev/null/x: Not a dir"),
    ],
)
def test_a_bad_argument_ends_before_anything_is_downloaded(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    """Exit status 2, one sentence, nothing on disk; no network is needed to say so."""
    done = _prepare(None, None, tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(said, _sentence(done)), done.stderr
    assert not list(tmp_path.rglob("*.bin")) and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "nobody/nothing"], "nobody/nothing' doesn't exist on the Hub"),
        (["--name", "sample-11BT"], "'sample-11BT' not found. Available: .*'sample-10BT'"),
        (["--val-tokens", "1e6"], "give a smaller --val-tokens"),
    ],
)
def test_a_dataset_that_is_not_there_or_too_small_is_the_callers_mistake(
    hub: Hub,
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    """Exit status 2 and one sentence that names what the hub has instead."""
    done = _prepare(hub, gpt2_vocabulary, tmp_path, "--tokens", "1e6", "--out", "out", *arguments)
    assert done.returncode == 2, done.stderr
    assert re.search(said, _sentence(done)), done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_hub_that_dies_midway_leaves_the_finished_shards(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Exit status 1, one sentence that says what stays, and it can be trained on."""
    documents = [[f"{file} {n} and so on" for n in range(700)] for file in range(3)]
    with _hub(documents, dies_at="002_00000.parquet") as hub:
        sizes = ["--val-tokens", 500, "--shard-tokens", 1000, "--tokens", "1e6"]
        done = _prepare(hub, gpt2_vocabulary, tmp_path, "--out", "out", *sizes)
    assert hub.dead.is_set()
    assert done.returncode == 1, done.stderr
    manifest = read_manifest(tmp_path / "out")
    said = _sentence(done)
    assert f"{len(manifest.shards)} finished shards" in said and "broke off" in said
    assert "stay in out" in said
    assert len(manifest.shards) >= 3
    assert not list((tmp_path / "out").glob("*.tmp"))
    tokens = open_split(tmp_path / "out", "train")
    assert [shard.size for shard in tokens] == [1000] * (len(manifest.shards) - 1)


def test_a_disk_that_fills_up_leaves_the_finished_shards(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit on a file's size stands in for the disk: writing fails in the same place."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    texts = iter([["a few words"] * 1000] * 9)
    monkeypatch.setattr(fineweb, "_open_dataset", lambda dataset, config: (texts, None))
    order = fineweb.Order(
        out=tmp_path / "out",
        tokens=1_000_000,
        val_tokens=500,
        shard_tokens=6_000,
        dataset="some/texts",
        config="all",
        workers=1,
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
    try:
        with pytest.raises(RunFailed, match="cannot write to .* no training shard was finished"):
            fineweb.prepare(order, lambda documents, tokens: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.concatenate(open_split(order.out, "val")).size == 500
    assert sorted(p.name for p in order.out.iterdir()) == ["fineweb_val_000000.bin", MANIFEST_NAME]


def test_no_network_is_a_failed_run_that_wrote_nothing(
    gpt2_vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Exit status 1: the command was right, and the same command works later."""
    done = _prepare(None, gpt2_vocabulary, tmp_path, "--tokens", "1e6", "--out", "out")
    assert done.returncode == 1, done.stderr
    assert "check the network" in _sentence(done)
    assert not list((tmp_path / "out").iterdir())

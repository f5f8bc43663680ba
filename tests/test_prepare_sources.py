"""Sources of every format, and the shards that are made of them."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import END_OF_TEXT, TEXTS, contents, parquet, prepare_here, refused, texts_in

from trainer.data import sources, workers
from trainer.data.shards import open_split, read_manifest

pytestmark = pytest.mark.usefixtures("gpt2_tokenizer")

# The file of each format that holds some documents.
FILES = {
    "texts.parquet": parquet,
    "texts.jsonl": lambda texts: "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode(),
    "texts.ndjson.gz": lambda texts: gzip.compress(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    ),
    "texts.json.zst": lambda texts: pa.Codec("zstd").compress(
        "\n".join(json.dumps({"text": t}) for t in texts).encode(), asbytes=True
    ),
    "texts.txt": lambda texts: "<|endoftext|>\n".join(texts).encode(),
}


def prepare_all(dataset: Path, out: Path, *flags: object) -> None:
    sizes = ["--tokens", "1e9", "--val-tokens", 1500, "--shard-tokens", 2000]
    prepare_here(out.parent, "--dataset", dataset, "--out", out, *sizes, *flags)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_its_documents_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Units and chunks cut through the file."""
    monkeypatch.setattr(sources.LocalSource, "unit_bytes", 700)
    (tmp_path / name).write_bytes(FILES[name](TEXTS))
    prepare_all(tmp_path / name, tmp_path / "out", "--workers", 2)
    assert texts_in(tmp_path / "out") == TEXTS
    manifest = read_manifest(tmp_path / "out")
    assert [file.name for file in manifest.source_files] == [name]
    assert sum(shard.documents for shard in manifest.shards) == len(TEXTS)


def test_the_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.LocalSource, "unit_bytes", 900)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jsonl").write_bytes(FILES["texts.jsonl"](TEXTS[number::3]))
    made = []
    for count in (1, 2, 5):
        out = tmp_path / f"out{count}"
        prepare_all(source, out, "--workers", count, "--tokens", 9000)
        made.append(contents(out))
    assert made[0] == made[1] == made[2]


def test_spawned_workers_write_the_same_bytes_and_report_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    (tmp_path / "texts.jsonl").write_bytes(FILES["texts.jsonl"](TEXTS))
    for method in ("fork", "spawn"):
        monkeypatch.setattr(workers, "START_METHOD", method)
        prepare_all(tmp_path / "texts.jsonl", tmp_path / method, "--workers", 2)
    assert contents(tmp_path / "fork") == contents(tmp_path / "spawn")
    flags = ["--dataset", "texts.jsonl", "--workers", 1, "--tokenizer", "gpt5"]
    assert "there is no tokenizer" in refused(tmp_path, *flags)


@settings(max_examples=4, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=12), unit=st.integers(1, 60), shard=st.integers(3, 40))
def test_any_documents_come_back_from_units_and_shards_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit: int, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(FILES["texts.jsonl"](["first", "second", *texts]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.LocalSource, "unit_bytes", unit)
        sizes = ["--val-tokens", 1, "--shard-tokens", shard, "--workers", 1]
        prepare_all(folder / "a.jsonl", folder / "out", *sizes)
    encoding = tiktoken.get_encoding("gpt2")
    expected: list[int] = []
    for text in ["first", "second", *filter(None, texts)]:
        expected += [END_OF_TEXT, *encoding.encode_ordinary(text)]
    splits = [np.concatenate(open_split(folder / "out", s)) for s in ("val", "train")]
    assert np.concatenate(splits).tolist() == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl has no text 'text' .* only body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl holds no JSON in the line at byte 14"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl has no text 'text'"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz is damaged"),
        ("a.txt", b"some \xff bytes", "a.txt is damaged or cannot be read .*utf-8"),
        ("a.csv", b"text\nx\n", "a.csv has no supported format"),
    ],
)
def test_an_unreadable_source_is_named_and_nothing_stays(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert re.search(message, refused(tmp_path, "--dataset", name, "--out", "out"))
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_column_is_refused_with_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["x"]))
    flags = ["--dataset", "a.parquet", "--out", "out", "--text-column"]
    assert "has no column 'body', only text, id" in refused(tmp_path, *flags, "body")
    assert "holds double, not text" in refused(tmp_path, *flags, "score")

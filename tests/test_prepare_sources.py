"""Every kind of source gives the same shards, whoever reads it, in bounded memory."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from commands import run_here
from gpt2_vocabulary import gpt2_vocabulary  # noqa: F401  (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import END_OF_TEXT, TEXTS, parquet, prepare, sentence, texts_of

from trainer.data import documents as texts
from trainer.data import sources as inputs
from trainer.data.manifest import Manifest
from trainer.data.prepare import Order, crew_of
from trainer.data.prepare import prepare as prepare_with
from trainer.data.shards import MANIFEST_NAME, open_split, read_manifest

# Written where strings and bytes meet: what a file of each kind holds for the same documents.
KINDS = {
    "texts.parquet": parquet,
    "texts.jsonl": lambda documents: "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)
    ).encode(),
    "texts.ndjson.gz": lambda documents: gzip.compress(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents).encode()
    ),
    "texts.json.zst": lambda documents: pa.Codec("zstd").compress(
        "\n".join(json.dumps({"text": t}) for t in documents).encode(), asbytes=True
    ),
    "texts.txt": lambda documents: "<|endoftext|>\n".join(documents).encode(),
}


@pytest.fixture
def vocabulary(gpt2_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_vocabulary))
    return gpt2_vocabulary


def order(dataset: Path, out: Path, **more: object) -> Order:
    sizes = {"tokens": 10**9, "val_tokens": 1500, "shard_tokens": 2000}
    return Order(**{"out": out, "dataset": str(dataset), **sizes, **more})  # type: ignore[arg-type]


def prepare_here(ordered: Order) -> Manifest:
    with crew_of(ordered) as crew:
        return prepare_with(ordered, lambda _: None, crew)


def shards_in(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.bin")}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_documents(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each document once, whole and in order, also where units and chunks cut through the file."""
    monkeypatch.setattr(inputs.LocalInputs, "unit_bytes", 700)
    source = tmp_path / name
    source.write_bytes(KINDS[name](TEXTS))
    manifest = prepare_here(order(source, tmp_path / "out", workers=2))
    splits = [np.concatenate(open_split(tmp_path / "out", s)) for s in ("val", "train")]
    assert [text for split in splits for text in texts_of(split)] == TEXTS
    assert [file.name for file in manifest.source_files] == [name]
    assert sum(span.documents for shard in manifest.shards for span in shard.sources) == len(TEXTS)


def test_the_shards_do_not_depend_on_the_number_of_workers(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are of the files, not of who reads them: the manifest is the same as well."""
    monkeypatch.setattr(inputs.LocalInputs, "unit_bytes", 900)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jsonl").write_bytes(KINDS["texts.jsonl"](TEXTS[number::3]))
    made = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        prepare_here(order(source, out, workers=workers, tokens=9000))
        made.append((shards_in(out), (out / MANIFEST_NAME).read_bytes()))
    assert made[0] == made[1] == made[2]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    unit=st.integers(1, 60),
    shard=st.integers(3, 40),
)
def test_any_documents_come_back(
    vocabulary: Path,
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    unit: int,
    shard: int,
) -> None:
    """Any texts, in JSON lines cut at any place, in shards of any size."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(KINDS["texts.jsonl"](["first", "second", *documents]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs.LocalInputs, "unit_bytes", unit)
        ordered = order(folder / "a.jsonl", folder / "out", val_tokens=1, shard_tokens=shard)
        prepare_here(ordered)
    encoding = tiktoken.get_encoding("gpt2")
    expected: list[int] = []
    for text in ["first", "second", *filter(None, documents)]:
        expected += [END_OF_TEXT, *encoding.encode_ordinary(text)]
    splits = [np.concatenate(open_split(folder / "out", s)) for s in ("val", "train")]
    assert np.concatenate(splits).tolist() == expected


def test_long_documents_take_the_careful_way_and_give_the_same(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too long for one string is read as bytes, and a huge one by one worker at a time."""
    monkeypatch.setattr(texts, "LONG", 100)
    monkeypatch.setattr(texts, "HUGE", 300)
    for name in ("texts.parquet", "texts.jsonl"):
        source = tmp_path / name
        source.write_bytes(KINDS[name](TEXTS))
        out = tmp_path / f"{name} out"
        prepare_here(order(source, out, workers=2))
        splits = [np.concatenate(open_split(out, s)) for s in ("val", "train")]
        assert [text for split in splits for text in texts_of(split)] == TEXTS


def test_a_large_vocabulary_takes_four_bytes_and_a_local_file_of_ranks_will_do(
    vocabulary: Path, tmp_path: Path
) -> None:
    """uint32 in llm.c's layout for Llama 3, which the reader knows; the hash tells vocabularies."""
    ranks = {bytes([i]): i for i in range(256)} | {b"the": 70_000, b"th": 69_999}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (tmp_path / "wide.tiktoken").write_text("\n".join(lines))
    (tmp_path / "texts.txt").write_text("the one<|endoftext|>the other")
    done = prepare(
        *(None, None, tmp_path, "--dataset", "texts.txt", "--tokenizer", "wide.tiktoken"),
        *("--val-tokens", 1, "--tokens", 100, "--out", "out", "--pattern", "cl100k_base"),
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.vocab_size == 70_002 and manifest.end_of_text == 70_001
    (train,) = open_split(tmp_path / "out", "train")
    assert train.dtype == np.uint32
    assert train.tolist() == [70_001, 70_000, *b" o", 70_000, *b"r"]
    header = np.frombuffer((tmp_path / "out" / manifest.shards[1].file).read_bytes()[:12], "<i4")
    assert header.tolist() == [20240801, 7, 6]
    checked = prepare(None, None, tmp_path, "--verify", "out")
    assert checked.returncode == 0 and "vocabulary of wide.tiktoken is the one" in checked.stdout

    (tmp_path / "wide.tiktoken").write_text("\n".join(lines).replace(" 70000", " 70003"))
    other = prepare(None, None, tmp_path, "--verify", "out")
    assert other.returncode == 2 and "is of another tokenizer" in sentence(other)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl has no text 'text' .* only body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl holds no JSON in the line at byte 14"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl has no text 'text'"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is no Parquet file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz is damaged",
        ),
        ("a.txt", b"some \xff bytes", "a.txt is damaged or cannot be read .*utf-8"),
        ("a.csv", b"text\nx\n", "a.csv is not of a kind that can be read"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    vocabulary: Path, tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    """Exit status 2 and one sentence, and nothing is left in the folder."""
    (tmp_path / name).write_bytes(data)
    done = prepare(None, vocabulary, tmp_path, "--dataset", name, "--out", "out")
    assert done.returncode == 2, done.stderr
    assert re.search(said, sentence(done)), done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_column_that_is_not_there_names_those_that_are(vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["x"]))
    flags = ["--dataset", "a.parquet", "--out", "out", "--text-column"]
    missing = prepare(None, vocabulary, tmp_path, *flags, "body")
    assert missing.returncode == 2
    assert "has no column 'body', only text, id" in sentence(missing)
    number = prepare(None, vocabulary, tmp_path, *flags, "score")
    assert number.returncode == 2 and "holds double, not text" in sentence(number)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--val-tokens", "1", "--val-share", "0.1"], "not both"),
        (["--val-share", "2"], "no share between 0 and 1"),
        (["--memory", "much"], "'much' is no size"),
        (["--shard-tokens", "3e9"], "a shard holds at most 2,147,483,647 tokens"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "a.txt").write_text("x")
    flags = ["--dataset", "a.txt", "--out", "out", *flags]
    done = run_here("prepare_fineweb.py", *flags, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.search(said, sentence(done)), done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokenizer", "gpt5"], "there is no tokenizer 'gpt5'; give one of .*gpt2"),
        (["--tokenizer", "no.tiktoken"], "cannot read the tokenizer no.tiktoken"),
        (["--tokenizer", "hf:any"], "pip install 'nanogauge.tokenizers.'|cannot load"),
    ],
)
def test_what_the_workers_or_the_source_refuse_is_one_sentence_too(
    vocabulary: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "a.txt").write_text("x")
    done = prepare(None, vocabulary, tmp_path, "--dataset", "a.txt", "--out", "out", *flags)
    assert done.returncode == 2, done.stderr
    assert re.search(said, sentence(done)), done.stderr


def test_statistics_tell_what_is_there(vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(KINDS["texts.jsonl"](TEXTS))
    prepare_here(order(tmp_path / "a.jsonl", tmp_path / "out"))
    done = prepare(None, vocabulary, tmp_path, "--stats", "out")
    assert done.returncode == 0, done.stderr
    size = sum(len(text.encode()) for text in TEXTS)
    assert f"{size:,} bytes" in done.stdout
    assert done.stdout.count("--- a document") == 3
    bins = [line.split() for line in done.stdout.splitlines() if line.startswith("  up to")]
    assert sum(int(line[-2].replace(",", "")) for line in bins) == len(TEXTS)

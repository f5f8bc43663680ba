"""Datasets of other programs and our own, their fingerprints, and training on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import DEMO, TINY, log_lines, run, train_tiny
from examples import write_document

from nanogauge.errors import BadInput
from trainer.data.dataset import Dataset, open_folder
from trainer.data.manifest import Origin
from trainer.data.shards import ShardWriter

TRAIN = np.arange(500, dtype=np.uint16)
VAL = np.arange(100, 160, dtype=np.uint16)
SECOND = "fineweb_train_000002.bin"
OFFLINE = {"TIKTOKEN_CACHE_DIR": "/nonexistent", "HTTPS_PROXY": "http://127.0.0.1:9"}


def shard(tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> bytes:
    """Return a file as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens.size
    return header.tobytes() + tokens.tobytes()


def nanogpt(folder: Path) -> None:
    TRAIN.tofile(folder / "train.bin")
    VAL.tofile(folder / "val.bin")


def build_nanogpt(folder: Path) -> None:
    np.save(folder / "edufineweb_val_000000", VAL)
    np.save(folder / "edufineweb_train_000001", TRAIN[:300])
    np.save(folder / "edufineweb_train_000002", TRAIN[300:])


def modded_nanogpt(folder: Path) -> None:
    (folder / "fineweb_val_000000.bin").write_bytes(shard(VAL))
    (folder / "fineweb_train_000001.bin").write_bytes(shard(TRAIN[:300]))
    (folder / "fineweb_train_000002.bin").write_bytes(shard(TRAIN[300:]))


def llama_3(folder: Path, magic: int = 20240801, version: int = 7) -> None:
    for split, tokens in (("train", TRAIN), ("val", VAL)):
        data = shard(tokens.astype(np.uint32), magic, version)
        (folder / f"tiny_shakespeare_{split}.bin").write_bytes(data)


def characters(folder: Path) -> None:
    nanogpt(folder)
    (folder / "meta.pkl").write_bytes(b"not read")


FORMS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "nanoGPT": (nanogpt, "nanoGPT's raw uint16", "gpt2"),
    "nanoGPT, characters": (characters, "nanoGPT's raw uint16", None),
    "build-nanogpt": (build_nanogpt, "build-nanogpt's NumPy arrays", "gpt2"),
    "modded-nanogpt": (modded_nanogpt, "llm.c's shards", "gpt2"),
    "llm.c, Llama 3": (llama_3, "llm.c's shards", None),
    "uint32 of version 2": (lambda f: llama_3(f, 20240520, 2), "llm.c's shards", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_files_of_other_programs_are_memory_mapped(tmp_path: Path, name: str) -> None:
    write, form, tokenizer = FORMS[name]
    write(tmp_path)
    opened = open_folder(tmp_path)
    assert np.concatenate(opened.splits["train"]).tolist() == TRAIN.tolist()
    assert np.concatenate(opened.splits["val"]).tolist() == VAL.tolist()
    assert all(isinstance(s, np.memmap) for shards in opened.splits.values() for s in shards)
    assert (opened.tokenizer, opened.vocab_size) == (tokenizer, None)
    assert opened.assumed is not None
    for fact in (form, "no manifest", "500 train", "60 val", "no hashes"):
        assert fact in opened.assumed
    assert ("GPT-2 tokenizer assumed" in opened.assumed) == (tokenizer is not None)
    if tokenizer is None:
        with pytest.raises(BadInput, match="nothing in the data names its tokenizer"):
            opened.load_tokenizer()


def test_a_file_without_a_split_in_its_name_is_ignored_and_named(tmp_path: Path) -> None:
    modded_nanogpt(tmp_path)
    (tmp_path / "hellaswag_test.bin").write_bytes(b"anything")
    opened = open_folder(tmp_path)
    assert opened.tokens("train") == 500
    assert opened.assumed is not None and "ignored" in opened.assumed
    assert "hellaswag_test.bin" in opened.assumed


REFUSED: dict[str, tuple[Callable[[Path], None], str, bytes | np.ndarray | None, str]] = {
    "no validation set": (nanogpt, "val.bin", None, "no file with val"),
    "half a token": (nanogpt, "train.bin", b"123", "3 bytes"),
    "an empty file": (nanogpt, "val.bin", b"", "0 bytes"),
    "a damaged header": (modded_nanogpt, SECOND, shard(TRAIN, 20240521), "mixes"),
    "an unknown version": (modded_nanogpt, SECOND, shard(TRAIN, version=3), "version 3"),
    "a truncated shard": (modded_nanogpt, SECOND, shard(TRAIN)[:1100], "damaged"),
    "floats": (build_nanogpt, "val.npy", np.ones(9), "float64"),
    "two dimensions": (build_nanogpt, "val.npy", VAL.reshape(2, 30), "shape"),
    "pickled objects": (build_nanogpt, "val.npy", np.array([{"a": 1}]), "cannot read"),
    "no array": (build_nanogpt, "val.npy", b"PK", "cannot read"),
    "nothing": (lambda folder: None, "val.bin", None, "no token shards"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_files_are_refused_without_advice_to_delete_them(tmp_path: Path, name: str) -> None:
    write, file, data, message = REFUSED[name]
    write(tmp_path)
    path = tmp_path / file
    if isinstance(data, np.ndarray):
        np.save(path, data, allow_pickle=True)
    elif data is not None:
        path.write_bytes(data)
    else:
        path.unlink(missing_ok=True)
    with pytest.raises(BadInput, match=message) as refused:
        open_folder(tmp_path)
    sentence = str(refused.value)
    assert "\n" not in sentence and "delete" not in sentence
    assert str(tmp_path) in sentence


def test_the_fingerprint_identifies_the_data_wherever_it_is(tmp_path: Path) -> None:
    prints = []
    for name, (write, _, _) in FORMS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        prints.append(open_folder(tmp_path / name).fingerprint)
    assert len(set(prints)) == len(prints) - 2  # neither meta.pkl nor a header is a token
    shutil.copytree(tmp_path / "nanoGPT", tmp_path / "moved")
    assert open_folder(tmp_path / "moved").fingerprint == prints[0]
    TRAIN[::-1].tofile(tmp_path / "moved" / "train.bin")
    assert open_folder(tmp_path / "moved").fingerprint != prints[0]
    assert write_ours(tmp_path / "a", 0).fingerprint == write_ours(tmp_path / "b", 0).fingerprint
    assert write_ours(tmp_path / "a", 0).fingerprint != write_ours(tmp_path / "c", 1).fingerprint
    assert write_ours(tmp_path / "a", 0).assumed is None


def test_a_run_takes_the_name_of_its_data_from_the_manifest(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_ours(data, 0)
    (data / "manifest.json").write_text(
        (data / "manifest.json").read_text().replace("made by the test", "HuggingFaceFW/fineweb-edu")
    )
    flags = ["--data.embedded=false", f"--data.path={data}", "--train.max-steps=1"]
    for name, warned in ((None, False), ("FineWeb", True)):
        given = [f"--data.dataset={name}", "--run.name=other"] if name else []
        done = train_tiny(tmp_path, *flags, *given, **OFFLINE)
        assert done.returncode == 0, done.stderr
        assert ("The data is FineWeb-Edu by its manifest, not FineWeb" in done.stdout) == warned
        spec = json.loads((tmp_path / ("other" if name else "demo") / "spec.json").read_text())
        assert (spec["dataset"], spec["validation_tokens"]) == (name or "FineWeb-Edu", 300)


def write_ours(folder: Path, first: int) -> Dataset:
    """Write a validation shard and 2,000 training tokens, and open the folder."""
    if not folder.exists():
        folder.mkdir()
        origin = Origin(
            tokenizer="gpt2", vocab_size=264, end_of_text=256, dataset="made by the test", dataset_config="none"
        )
        with ShardWriter(folder, origin, shard_tokens=1500) as writer:
            write_document(writer, "val", np.full(300, 7, dtype=np.uint16))
            write_document(writer, "train", np.full(2000, first, dtype=np.uint16))
    return open_folder(folder)


def test_a_run_on_nanogpts_files_logs_what_it_assumed_and_resumes_on_no_others(tmp_path: Path) -> None:
    data = tmp_path / "shakespeare"
    data.mkdir()
    (np.arange(4000) % 250).astype(np.uint16).tofile(data / "train.bin")
    (np.arange(1000) % 250).astype(np.uint16).tofile(data / "val.bin")
    flags = ["--data.embedded=false", f"--data.path={data}", "--train.max-steps=2"]
    done = train_tiny(tmp_path, *flags, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "nanoGPT's raw uint16" in done.stdout
    events = {line["what"]: line for line in log_lines(tmp_path / "demo") if "what" in line}
    assert "GPT-2 tokenizer assumed" in events["data_assumed"]["text"]
    assert "32 tokens of 124 windows, once each" in events["data_order"]["text"]
    assert "32 of the 4,000 training tokens" in events["data_order"]["text"]

    (np.arange(4000) % 249).astype(np.uint16).tofile(data / "train.bin")
    more = [*flags, "--resume=auto", "--run.compile=false"]
    refused = run("train.py", DEMO, f"--run.out={tmp_path}", *TINY, *more, **OFFLINE)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cannot resume with another data: the run was trained on" in refused.stderr

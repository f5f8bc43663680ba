"""Untrusted files cannot lead out of their folder, block the reader or run code."""

import ast
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DEMO, ROOT, TINY, run
from examples import write_document
from hypothesis import example, given
from hypothesis import strategies as st
from test_shards import ORIGIN

from nanogauge.errors import BadInput
from nanogauge.files import stays_below, write_atomic
from nanogauge.runlog.folder import load_with_log
from trainer.checkpoints.checkpoint import meta_bytes, newest_checkpoint
from trainer.data.hub import fetch_file
from trainer.data.shards import ShardWriter, open_split, read_manifest

SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]
SOURCES += [path for name in ("nanogauge", "trainer") for path in (ROOT / name).rglob("*.py")]
RUNS_CODE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


def test_nothing_that_is_read_can_run_code() -> None:
    """Pickle and similar formats run code from a file."""
    loads = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                tops = {name.partition(".")[0] for name in modules if name}
                assert not tops & RUNS_CODE, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system"), path
            assert keywords.get("shell") != "True", path
            if called == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", path
            if called in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", path
            assert keywords.get("allow_pickle") != "True", path
    assert loads == 3, "checkpoints, messages between ranks, a bench"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\x00", "C:\\x", "..\\x", "\\\\h\\s"]
)
def test_a_name_that_leads_out_of_its_folder_is_recognised(name: str) -> None:
    assert not stays_below(name)


@given(st.lists(st.text("ab.~ -\\/", min_size=1), min_size=1))
@example(["~", "x"])
def test_an_accepted_name_stays_below_its_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    if stays_below(name):
        assert os.path.normpath(f"/folder/{name}").startswith("/folder/")


def shards(folder: Path) -> Path:
    folder.mkdir()
    with ShardWriter(folder, ORIGIN, shard_tokens=5) as writer:
        for split in ("val", "train"):
            write_document(writer, split, np.arange(4, dtype=np.uint16))
        writer.complete()
    return folder


def test_a_manifest_names_no_file_of_another_folder(tmp_path: Path) -> None:
    folder, outside = shards(tmp_path / "data"), tmp_path / "outside.bin"
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.move(folder / manifest["shards"][1]["file"], outside)
    manifest["shards"][1]["file"] = "../outside.bin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = outside.read_bytes()
    with pytest.raises(BadInput, match="leads out of the folder"):
        open_split(folder, "train")
    assert outside.read_bytes() == before


def test_a_mirror_of_the_hub_names_no_file_outside_of_its_folder() -> None:
    """The hub's client writes a file wherever its name leads."""
    with pytest.raises(BadInput, match="leads out"):
        fetch_file("some/texts", "../../x.bin", "0" * 40, None)


FOLDER = ["spec.json", "config.toml", "machine.json", "prediction.json", "log.jsonl"]


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "demo"))


@pytest.mark.parametrize("name", FOLDER)
def test_a_link_out_of_a_run_folder_or_a_pipe_is_refused(copy: Path, name: str) -> None:
    """A link to a file with passwords was shown on the page; reading a pipe blocked."""
    shutil.move(copy / name, copy.parent / name)
    (copy / name).symlink_to(copy.parent / name)
    with pytest.raises(BadInput, match="leads out of its folder"):
        load_with_log(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(BadInput, match="no regular file"):
        load_with_log(copy)


def test_a_report_overwrites_no_file_outside_the_run_folder(copy: Path) -> None:
    """The target of a link named like a temporary file was overwritten."""
    precious = copy.parent / "precious"
    precious.write_text("precious")
    for name in ("report.html", "report.html.tmp", "report.json.tmp"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(precious)
    assert run("report.py", copy).returncode == 0
    assert precious.read_text() == "precious"
    assert not (copy / "report.html").is_symlink() and not list(copy.glob("*.tmp"))


def test_a_resumed_run_writes_to_no_log_outside_the_run_folder(copy: Path) -> None:
    shutil.move(copy / "log.jsonl", copy.parent / "log.jsonl")
    (copy / "log.jsonl").symlink_to(copy.parent / "log.jsonl")
    before = (copy.parent / "log.jsonl").read_bytes()
    flags = [f"--run.out={copy.parent}", *TINY, "--resume=auto"]
    assert run("train.py", DEMO, *flags, "--wandb.mode=disabled").returncode == 2
    assert (copy.parent / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["manifest.json", "shard"])
def test_a_pipe_among_shards_is_refused(tmp_path: Path, name: str) -> None:
    folder = shards(tmp_path / "data")
    path = folder / (read_manifest(folder).shards[0].file if name == "shard" else name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match="no regular file"):
        open_split(folder, "val")


def checkpoint_with(copy: Path, hashes: dict[str, Any]) -> Path | None:
    (newest,) = sorted((copy / "checkpoints").glob("step_*"))[-1:]
    meta = json.loads((newest / "meta.json").read_text())
    meta.popitem()  # its digest of itself
    (newest / "meta.json").write_bytes(meta_bytes(meta | {"sha256": hashes}))
    shutil.rmtree(copy / "checkpoints" / "aside", ignore_errors=True)
    for other in (copy / "checkpoints").glob("step_*"):
        if other != newest:
            shutil.rmtree(other)
    return newest_checkpoint(copy / "checkpoints")[0]


def test_a_checkpoint_without_hashes_or_with_other_files_is_not_intact(copy: Path) -> None:
    """A device without an end was read forever."""
    assert checkpoint_with(copy, {}) is None
    assert checkpoint_with(copy, {"/dev/zero": "0"}) is None


def test_an_atomic_write_replaces_a_link_under_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "other")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "other").read_text() == "kept"

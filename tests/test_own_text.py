"""A text of one's own: cut, kept, refused, trained on, sampled and exported."""

import pickle
import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run, succeed
from hub import Hub
from preparing import command, contents, environment, parquet, prepare, prepare_here, refused, sentence

from nanogauge.errors import BadInput
from nanogauge.waiting import SILENT_SECONDS
from trainer.data.dataset import open_folder
from trainer.data.shards import open_split, read_manifest
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation.generation import stream_text

ONE = "The café's miller carried eleven lamps before noon. " * 80
SHORT, LONG = "A short one.", ONE * 3


def written(home: Path, *flags: object, tokenizer: str = "chars") -> list[np.ndarray]:
    """Prepare texts.txt into out; return the tokens of both splits."""
    prepare_here(home, "--dataset", "texts.txt", "--out", "out", "--tokenizer", tokenizer, *flags)
    return [np.concatenate(open_split(home / "out", split)) for split in ("val", "train")]


@pytest.mark.parametrize("tokenizer", ["chars", "bytes"])
@pytest.mark.parametrize(
    ("texts", "flags", "val_tokens"),
    [
        ([ONE], [], len(ONE) // 10),  # nanoGPT's 90 %
        ([ONE], ["--val-tokens", 1], len(ONE) // 10),
        ([ONE], ["--val-tokens", 1500], 1500),
        ([SHORT, LONG], ["--val-tokens", 1500], 1500),
        ([LONG], ["--val-tokens", 1], 1025),
        ([SHORT] * 400, ["--val-tokens", 100], 8 * (len(SHORT) + 1)),  # whole documents
    ],
)
def test_a_document_longer_than_the_validation_tokens_is_cut(
    tmp_path: Path,
    texts: list[str],
    flags: list[object],
    val_tokens: int,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(texts), "utf-8-sig")
    val, train = written(tmp_path, *flags, "--shard-tokens", 700, tokenizer=tokenizer)
    loaded = load_tokenizer(tokenizer, characters=read_manifest(tmp_path / "out").characters or "")
    assert np.concatenate([val, train]).tolist() == np.concatenate([*map(loaded.encode, texts)]).tolist()
    assert val.size == pytest.approx(val_tokens, rel=0.03)
    assert ("A document was cut" in capsys.readouterr().out) == (ONE in texts[-1])
    before = contents(tmp_path / "out")
    written(tmp_path, *flags, "--shard-tokens", 700, tokenizer=tokenizer)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "name", ["./no.txt", "my_texts/", "inptu.txt", "D/t.JSONL.gz", "texts", "a/b/c", "C:\\t", "here/no"]
)
def test_a_name_that_is_no_datasets_is_never_asked_of_the_hub(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("trainer.data.sources._list_training_files", lambda *_: 1 / 0)
    assert "there is no file or folder" in refused(tmp_path, "--dataset", name, "--out", "out")
    assert not (tmp_path / "out").exists()


EDITS: dict[str, Callable[[Path], object]] = {
    "appended": lambda texts: (texts / "b.txt").open("a").write("<|endoftext|>One more."),
    "of the same size": lambda texts: (texts / "b.txt").write_text(ONE.swapcase()),
    "shorter": lambda texts: (texts / "b.txt").write_text(ONE[:-1]),
    "another file before": lambda texts: (texts / "a.txt").write_text(SHORT),
    "a file less": lambda texts: (texts / "b.txt").rename(texts / "_b.txt"),
}


@pytest.mark.parametrize("tokens", [2000, 2500, 10**6])
@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_text_is_refused_and_the_shards_stay(tmp_path: Path, edit: str, tokens: int) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "c.txt"):
        (tmp_path / "texts" / name).write_text(ONE)
    flags = ["--dataset", "texts", "--tokenizer", "chars", "--out", "out", "--tokens"]
    prepare_here(tmp_path, *flags, 2000)
    before = contents(tmp_path / "out")
    EDITS[edit](tmp_path / "texts")
    assert "that these shards were made of" in refused(tmp_path, *flags, tokens)
    assert contents(tmp_path / "out") == before
    assert sum(map(len, open_split(tmp_path / "out", "train"))) == 2000


def test_a_file_after_the_end_of_the_source_is_added(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(ONE)
    flags = ["--dataset", "texts", "--tokenizer", "bytes", "--val-tokens", 1500, "--out"]
    prepare_here(tmp_path, *flags, "out")
    (tmp_path / "texts" / "b.txt").write_text(ONE)
    for out in ("out", "at_once"):
        prepare_here(tmp_path, *flags, out)
    assert contents(tmp_path / "out") == contents(tmp_path / "at_once")


def test_the_shards_stay_listed_until_longer_ones_replace_them(tmp_path: Path) -> None:
    """The second file cannot be read."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(ONE)
    (tmp_path / "texts" / "b.txt").write_bytes(ONE.encode("utf-16"))
    flags = ["--dataset", "texts", "--tokenizer", "bytes", "--val-tokens", 1500, "--out", "out"]
    prepare_here(tmp_path, *flags, "--tokens", 2000)
    before = contents(tmp_path / "out")
    assert "b.txt is UTF-16; save it as UTF-8" in refused(tmp_path, *flags, "--tokens", 10**6)
    assert contents(tmp_path / "out") == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of configs/own_text.toml, made short, on characters."""
    home = tmp_path_factory.mktemp("own")
    (home / "texts.txt").write_text(ONE + "日本 ö", "utf-8")
    written(home)
    steps = ["--train.max-steps=4", "--train.eval-every=2", "--train.eval-batches=2"]
    flags = [f"--data.path={home / 'out'}", f"--run.out={home}", "--run.compile=false", *steps]
    done = succeed(run("train.py", ROOT / "configs/own_text.toml", *flags))
    assert '"sample"' in (home / "own_text" / "log.jsonl").read_text()
    assert "own_text" in done.stdout
    return home / "own_text"


def test_a_run_on_characters_is_sampled_and_exported(trained: Path, tmp_path: Path) -> None:
    done = succeed(run("sample.py", trained, "--prompt=The café", "--tokens=30", "--device=cpu"))
    assert done.stdout.startswith("The café") and len(done.stdout) > 9
    done = run("sample.py", trained, "--prompt=Ärger?", "--device=cpu")
    assert done.returncode == 2 and "has no ?, g, Ä" in done.stderr
    transformers = pytest.importorskip("transformers")
    succeed(run("export.py", trained, f"--out={tmp_path / 'model'}"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("The café 日本")["input_ids"]
    assert tokens == open_folder(trained.parent / "out").load_tokenizer().prompt("The café 日本")
    assert tokenizer.decode(tokens) == "The café 日本"


def test_the_characters_of_nanogpts_data_are_read_and_no_code_is_run(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        np.arange(200, dtype=np.uint16).tofile(tmp_path / name)
    itos = dict(enumerate("\n !abc"))
    stoi = {character: token for token, character in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = open_folder(tmp_path).load_tokenizer()
    assert (tokenizer.prompt("a cab!"), tokenizer.prompt("")) == ([3, 1, 5, 3, 4, 2], [0])
    assert tokenizer.decode([5, 3, 4, 300]) == "cab"
    for harmful in (b"cposix\nsystem\n(S'touch harm'\ntR.", pickle.dumps({"itos": {1: "a"}}), b"x"):
        (tmp_path / "meta.pkl").write_bytes(harmful)
        with pytest.raises(BadInput, match="names its tokenizer"):
            open_folder(tmp_path).load_tokenizer()
    assert not Path("harm").exists()


@pytest.mark.parametrize("name", ["bytes", "gpt2", "hf"])
def test_a_text_is_streamed_character_by_character(name: str, tmp_path: Path, gpt2_tokenizer: None) -> None:
    if name == "hf":
        tokenizers = pytest.importorskip("tokenizers")
        words = {"<|endoftext|>": 0, "<unk>": 30, **{f"▁w{n}": n for n in range(1, 30)}}
        model = tokenizers.models.WordLevel(words, unk_token="<unk>")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        made.decoder = tokenizers.decoders.Metaspace()
        made.add_special_tokens(["<|endoftext|>"])
        made.save(str(tmp_path / "words.json"))
        name = f"hf:{tmp_path / 'words.json'}"
    text = " ".join(f"w{n}" for n in range(1, 30)) if name.startswith("hf") else "a 🌍 日本é" * 9
    tokenizer = load_tokenizer(name)
    pieces = [piece for piece, _ in stream_text(tokenizer.encode_text(text).tolist(), tokenizer)]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) >= 29


def hub_with(split: str, names: Sequence[str], **more: Any) -> Hub:
    """Return a hub with one dataset: a file of texts for each configuration."""
    lines, files = ["---", "configs:"], {}
    for name in names:
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {name}/*"]
        files[f"{name}/0.parquet"] = parquet([SHORT] * 300)
    return Hub("some/texts", files | {"README.md": "\n".join([*lines, "---"]).encode()}, **more)


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (hub_with("train", ["default"], gated=True), "accept the conditions .*hf auth login`"),
        (hub_with("train", ["fra_Latn", "deu_Latn"]), "with --name: fra_Latn, deu_Latn"),
        (hub_with("train", [f"c{n}" for n in range(25)]), "c19 and 5 more"),
        (hub_with("test", ["default"]), "has no train split, only test"),
        (hub_with("train", ["default"], former="old/texts"), ""),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_answered_with_what_to_do(tmp_path: Path, hub: Hub, message: str) -> None:
    sizes = ["--tokens", 500, "--val-tokens", 300, "--tokenizer", "bytes", "--out", "out"]
    with hub:
        done = prepare(hub, tmp_path, "--dataset", hub.former or hub.repository, *sizes, HF_TOKEN="")
    assert done.returncode == (2 if message else 0), done.stderr
    assert re.search(message, sentence(done) if message else done.stdout)


@pytest.mark.parametrize("variable", ["HF_HOME", "TIKTOKEN_CACHE_DIR"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, variable: str) -> None:
    sizes = ["--tokens", 500, "--val-tokens", 300, "--out", "out"]
    flags = ["--tokenizer", "bytes"] if variable == "HF_HOME" else []
    with hub_with("train", ["default"]) as hub:
        places = {variable: "/proc/nothere", "HTTPS_PROXY": "http://127.0.0.1:9"}
        done = prepare(hub, tmp_path, "--dataset", hub.repository, *sizes, *flags, **places)
    assert done.returncode == 2 and "/proc/nothere" in sentence(done) and variable in sentence(done)


def test_a_hub_that_does_not_answer_is_named_after_three_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        given = command("--dataset", "some/texts", "--tokenizer", "bytes", "--out", "out")
        began = time.monotonic()
        process = subprocess.Popen(
            given, cwd=tmp_path, env=environment(None, tmp_path) | variables, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()
    assert re.match(r"waiting for some/texts.*, until about \d\d:\d\d:\d\d$", line.strip())
    assert SILENT_SECONDS <= time.monotonic() - began < 20

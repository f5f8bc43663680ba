"""Make broken inputs of every kind that a command reads, each from a seed.

A kind is a function that fills a folder and returns the command line for it. It damages valid
inputs (`make_originals`), so that most of the input stays valid.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from commands import ROOT, run

from trainer.data.manifest import Origin, Split
from trainer.data.shards import ShardWriter

GPU = "RTX 4070"
SECRET = "secret.json"
"""name of a file outside the given folders; links point to it"""
CONFIG = (ROOT / "configs" / "rtx4070_fineweb.toml").read_text(encoding="utf-8")
CLAIMS = (ROOT / "predictions" / "seed_zh.toml").read_text(encoding="utf-8")
RUN_STEPS = 60
VOCABULARY = 257  # the bytes and the end-of-text token

OPEN_DATA = "open_data"
"""what train.py does before it builds a model"""

Command = tuple[str, list[str]]
"""a script, or OPEN_DATA, and its arguments"""
Kind = Callable[[random.Random, Path, Path], Command]
"""takes a random source, the folder of the originals and an empty folder to fill"""

# Python writes NaN and Infinity to JSON, although JSON does not allow them.
WORDS = [
    *("0", "-1", "1e308", "-1e400", "nan", "inf", "NaN", "-Infinity", "9" * 30, "9" * 5000),
    *("9007199254740993", "0.1e-320", "true", "null", '""', '"../../etc/passwd"', '"\\u0000"'),
    *('"\\ud800"', '"\u202e\u2066\U0001f4a9"', "[]", "{}", "[[1], {}]", "1979-05-27T07:32:00Z"),
    *("[" * 3000, "{a=" * 500, '{"a":' * 3000, "\x00", "'''"),
]
"""replacements of a value in TOML and JSON"""
PIECES = [
    *(b"\x00" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x1b[2J", b"9" * 400, b"-", b"1e999"),
    *(b"nan", b"[" * 2000, b'"', b"\xed\xa0\x80", b"<script>alert(1)</script>"),
    *("\u2028\u202e".encode(), b"=HYPERLINK(1)"),
]
"""bytes to insert anywhere"""


def make_originals(folder: Path) -> None:
    """Write a valid run, shards of ours with their vocabulary, and shards of other tools."""
    path = folder / "run"
    made = run("bench/make_run.py", RUN_STEPS, path, "--sensors", 12, PYTHONPATH=str(ROOT))
    assert made.returncode == 0, made.stderr
    ranks = folder / "bytes.tiktoken"
    lines = (f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    ranks.write_text("".join(lines), encoding="ascii")
    _make_shards(folder / "shards", ranks)
    foreign = folder / "foreign"
    foreign.mkdir()
    np.arange(3000, dtype="<u2").tofile(foreign / "train.bin")
    np.arange(2000, dtype="<u2").tofile(foreign / "val.bin")
    arrays = folder / "arrays"
    arrays.mkdir()
    for split in ("train", "val"):
        np.save(arrays / f"edufineweb_{split}_000000.npy", np.arange(2000, dtype=np.uint16))


def _make_shards(folder: Path, ranks: Path) -> None:
    origin = Origin(
        tokenizer=str(ranks),
        vocab_size=VOCABULARY,
        end_of_text=VOCABULARY - 1,
        dataset="texts",
        dataset_config="local",
    )
    folder.mkdir()
    chance = np.random.default_rng(1)
    splits: tuple[tuple[Split, int], ...] = (("val", 1), ("train", 4))
    with ShardWriter(folder, origin, shard_tokens=2000) as writer:
        for split, documents in splits:
            for _ in range(documents):
                tokens = chance.integers(32, 127, 1500).astype(np.uint16)
                tokens[0] = VOCABULARY - 1
                writer.write(split, tokens)
        writer.complete()


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Cut, repeat, insert or move bytes; change digits; drop, repeat or swap lines."""
    for _ in range(chance.randint(1, 4)):
        begin, end = sorted(chance.randint(0, len(data)) for _ in range(2))
        lines = data.split(b"\n")
        first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
        long = (lines[first] or b"x") * (2**20 // (len(lines[first]) + 1))
        match chance.randrange(11):
            case 0:
                data = data[:begin]
            case 1:
                data = data[:begin] + data[min(end, begin + 200) :]
            case 2:
                data = data[:end] + data[begin:]
            case 3:
                data = data[:begin] + chance.choice(PIECES) + data[begin:]
            case 4:
                data = data[:begin] + bytes([chance.randrange(256)]) + data[begin + 1 :]
            case 5:
                lines[first], lines[second] = lines[second], lines[first]
                data = b"\n".join(lines)
            case 6 | 7 | 8 as case:
                more = {6: [], 7: [lines[second], lines[first]], 8: [long, lines[first]]}[case]
                data = b"\n".join([*lines[:first], *more, *lines[first + 1 :]])
            case _:
                places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
                for place in sorted(chance.sample(places, min(3, len(places))), reverse=True):
                    digit = chance.choice([b"0", b"9", b"99999999", b"", b"-", b"e5"])
                    data = data[:place] + digit + data[place + 1 :]
    return data


def _damaged_toml(chance: random.Random, text: str) -> bytes:
    """Replace a value, or drop, repeat or invent keys and tables; else damage bytes."""
    if chance.random() < 0.3:
        return damaged(chance, text.encode())
    lines = text.split("\n")
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(lines))
        key, given, _ = lines[place].partition("=")
        match chance.randrange(6):
            case 0:
                del lines[place]
            case 1:
                lines.insert(chance.randrange(len(lines) + 1), lines[place])
            case 2:
                made_up = chance.choice(["[a.b]", "[[run]]", "x = 1", '"\\u0000" = 1', "a.b.c = 2"])
                lines.insert(place, made_up)
            case _ if given:
                lines[place] = f"{key}= {chance.choice(WORDS)}"
    return "\n".join(lines).encode(errors="surrogatepass")


def _damaged_json(chance: random.Random, data: bytes) -> bytes:
    """Replace a value, or drop or invent a field; else damage bytes."""
    if chance.random() < 0.3:
        return damaged(chance, data)
    value: Any = json.loads(data)
    inside = value
    while isinstance(inside, dict | list) and inside:
        keys: list[Any] = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = chance.choice(keys)
        if isinstance(inside[key], dict | list) and inside[key] and chance.random() < 0.9:
            inside = inside[key]
            continue
        match chance.randrange(5):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside["made up"] = inside[key]
            case _:
                inside[key] = "@HERE@"
        break
    return json.dumps(value).replace('"@HERE@"', chance.choice(WORDS)).encode()


def configuration(chance: random.Random, originals: Path, folder: Path) -> Command:
    path = folder / "run.toml"
    path.write_bytes(_damaged_toml(chance, CONFIG))
    if chance.random() < 0.5:
        return "plan.py", [str(path), "--gpu", GPU, *(["--json"] if chance.random() < 0.5 else [])]
    return OPEN_DATA, [str(path), f"--data.path={originals / 'shards'}", "--run.device=cpu"]


def _config(folder: Path) -> str:
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    return str(folder / "run.toml")


def claims(chance: random.Random, originals: Path, folder: Path) -> Command:
    path = folder / "claims.toml"
    path.write_bytes(_damaged_toml(chance, CLAIMS))
    return "plan.py", [_config(folder), "--gpu", GPU, "--claims", str(path)]


def run_log(chance: random.Random, originals: Path, folder: Path) -> Command:
    run = Path(shutil.copytree(originals / "run", folder / "run"))
    path = run / "log.jsonl"
    lines = path.read_bytes().split(b"\n")
    if chance.random() < 0.5:
        for place in chance.sample(range(len(lines) - 1), chance.randint(1, 3)):
            lines[place] = _damaged_json(chance, lines[place])
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(damaged(chance, path.read_bytes()))
    return "report.py", [str(run), *(["--json"] if chance.random() < 0.5 else [])]


def run_folder(chance: random.Random, originals: Path, folder: Path) -> Command:
    run = Path(shutil.copytree(originals / "run", folder / "run"))
    if chance.random() < 0.5:
        (run / "claims.toml").write_text(CLAIMS, encoding="utf-8")
    names = sorted(path.name for path in run.iterdir())
    for _ in range(chance.randint(1, 2)):
        _spoil(chance, run / chance.choice(names), run / chance.choice(names))
    match chance.randrange(4):
        case 0:
            return "report.py", ["--index", str(folder)]
        case 1:
            return "report.py", [str(run), str(originals / "run"), "--out", str(folder / "out")]
        case _:
            return "report.py", [str(run)]


def _spoil(chance: random.Random, path: Path, other: Path) -> None:
    """Replace a file by nothing, a folder, a pipe, a link or another file, or damage it."""
    what = chance.randrange(7 if path.is_symlink() else 8)  # a link is not written through
    if what < 7:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(True)
    match what:
        case 0:
            pass
        case 1:
            path.write_bytes(b"")
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.symlink_to(path.parent.parent / SECRET)
        case 6 if other.is_file():
            shutil.copyfile(other, path)
        case 6:
            path.symlink_to("/dev/zero")
        case _ if path.suffix == ".json" and path.is_file():
            try:
                path.write_bytes(_damaged_json(chance, path.read_bytes()))
            except (ValueError, RecursionError):
                path.write_bytes(damaged(chance, path.read_bytes()))
        case _ if path.is_file():
            path.write_bytes(damaged(chance, path.read_bytes()))


def shards(chance: random.Random, originals: Path, folder: Path) -> Command:
    data = Path(shutil.copytree(originals / "shards", folder / "data"))
    manifest = data / "manifest.json"
    for _ in range(chance.randint(1, 2)):
        if chance.random() < 0.5 and manifest.is_file() and not manifest.is_symlink():
            manifest.write_bytes(_damaged_manifest(chance, manifest.read_bytes()))
        else:
            path = chance.choice(sorted(data.glob("*.bin")) or [manifest])
            _spoil_shard(chance, path)
    return _reader_of(chance, folder, data)


def _damaged_manifest(chance: random.Random, data: bytes) -> bytes:
    names = ["../run.toml", "/etc/hostname", "a/../../x", "manifest.json", "", ".", "\0", "C:\\x"]
    try:
        if chance.random() < 0.3:
            value = json.loads(data)
            chance.choice(value["shards"])["file"] = chance.choice(names)
            return json.dumps(value).encode()
        return _damaged_json(chance, data)
    except (ValueError, LookupError, TypeError, RecursionError):
        return damaged(chance, data)


def _spoil_shard(chance: random.Random, path: Path) -> None:
    if chance.random() < 0.4 or not path.is_file() or path.is_symlink():
        _spoil(chance, path, path)
        return
    data = bytearray(path.read_bytes())
    place = 4 * chance.randrange(4) if chance.random() < 0.5 else chance.randrange(len(data) or 1)
    data[place : place + 4] = chance.randbytes(4)
    path.write_bytes(data[: chance.choice([len(data), len(data) - 1, 1024, 10])])


def _reader_of(chance: random.Random, folder: Path, data: Path) -> Command:
    if chance.random() < 0.6:
        return "prepare_fineweb.py", [chance.choice(["--verify", "--stats"]), str(data)]
    return OPEN_DATA, [_config(folder), f"--data.path={data}", "--run.device=cpu"]


def foreign_shards(chance: random.Random, originals: Path, folder: Path) -> Command:
    data = Path(shutil.copytree(originals / chance.choice(["foreign", "arrays"]), folder / "data"))
    path = chance.choice(sorted(data.iterdir()))
    if chance.random() < 0.5:
        _spoil(chance, path, path)
    else:
        content = damaged(chance, path.read_bytes())
        path.write_bytes(chance.choice([b"", b"PK\x03\x04", b"\x80\x04", b"\x93NUMPY"]) + content)
    return OPEN_DATA, [_config(folder), f"--data.path={data}", "--run.device=cpu"]


def other_logs(chance: random.Random, originals: Path, folder: Path) -> Command:
    flag = chance.choice(sorted(LOGS))
    path = folder / "log.csv"
    path.write_bytes(damaged(chance, LOGS[flag].encode()))
    if chance.random() < 0.05:
        _spoil(chance, path, path)
    more = ["--config", _config(folder), "--gpu", GPU, "--out", str(folder / "out")]
    return "report.py", [flag, str(path), *more, f"--train.max-steps={LOG_STEPS}"]


LOG_STEPS = 50
_NANOCHAT = "step {n:05d}/00050 ({p:.2f}%) | loss: {loss:.6f} | lrm: 1.00 | dt: 1500.00ms | "
_NANOCHAT += "tok/sec: 349,525 | bf16_mfu: 41.20 | epoch: 1 pq: 9 rg: 772 | total time: 0.50m"
_BUILD = "step {n:5d} | loss: {loss:.6f} | lr 6.0000e-04 | norm: 1.2345 | dt: 2000.00ms | "
_BUILD += "tok/sec: 262144.00"
_FORMS = {
    "--nanogpt-log": (
        "iter {n}: loss {loss:.4f}, time 3900.00ms, mfu 12.50%",
        "step {n}: train loss {loss:.4f}, val loss 9.1000",
    ),
    "--nanochat-log": (_NANOCHAT, "Step {n:05d} | Validation bpb: {loss:.4f}"),
    "--build-nanogpt-log": (_BUILD, "validation loss: {loss:.4f}"),
    "--wandb-history": ("{n},{p},{time},{n},{loss},9.5,0.001,12.5", None),
}
"""a step's line in each log that report.py imports, and the line of an evaluation before it"""


def _log(step: str, evaluation: str | None) -> str:
    lines = []
    for n in range(0, LOG_STEPS + 1, 5):
        values = {"n": n, "p": 2 * n, "loss": 9 - n / 20, "time": 1.7e9 + 4 * n}
        if evaluation is not None and n % 25 == 0:
            lines.append(evaluation.format(**values))
        lines.append(step.format(**values))
    return "\n".join(lines) + "\n"


LOGS = {flag: _log(*forms) for flag, forms in _FORMS.items()}
"""a valid log by the flag that imports it"""
LOGS["--wandb-history"] = (
    "_step,_runtime,_timestamp,iter,train/loss,val/loss,lr,mfu\n" + LOGS["--wandb-history"]
)
KINDS: dict[str, Kind] = {
    "configuration": configuration,
    "claims": claims,
    "run log": run_log,
    "run folder": run_folder,
    "shards": shards,
    "shards of other tools": foreign_shards,
    "logs of other programs": other_logs,
}

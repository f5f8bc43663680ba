"""Give broken inputs of every kind to the commands that read them; check how each ends.

A command must end in time, with exit status 0 and nothing on stderr, or with 2 and one sentence, and must not change
the files it was given. Each input comes from a seed and is mostly valid. A kind is a function that fills a folder and
returns a script, or OPEN_DATA, and its arguments.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import ROOT, run, run_main
from examples import write_document

from nanogauge.cli import Parser
from nanogauge.config import add_config_flags, config_overrides, load_config
from trainer.data.manifest import Origin
from trainer.data.shards import ShardWriter
from trainer.run.resources import open_data
from trainer.step.distributed import Ranks

MAX_SECONDS = 10
WRITTEN = ("report.html", "report.md", "report.json", "index.html")
"""what a command may write beside the given files; --out is the other place"""
GPU = "RTX 4070"
SECRET = "secret.json"
"""a file outside the given folders; links point to it"""
CONFIG = (ROOT / "configs" / "rtx4070_fineweb.toml").read_text(encoding="utf-8")
CLAIMS = (ROOT / "predictions" / "seed_zh.toml").read_text(encoding="utf-8")
END = 256  # the end-of-text token after the bytes
OPEN_DATA = "open_data"
"""what train.py does before it builds a model"""
Command = tuple[str, list[str]]

# Python writes NaN and Infinity to JSON, although JSON does not allow them.
WORDS = [
    *("0", "-1", "1e308", "-1e400", "nan", "inf", "NaN", "-Infinity", "9" * 30, "9" * 5000),
    *("9007199254740993", "0.1e-320", "true", "null", '""', '"../../etc/passwd"', '"\\u0000"'),
    *('"\\ud800"', '"\u202e\u2066\U0001f4a9"', "[]", "{}", "[[1], {}]", "1979-05-27T07:32:00Z"),
    *("[" * 3000, "{a=" * 500, '{"a":' * 3000, "\x00", "'''"),
]
PIECES = [
    *(b"\x00" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x1b[2J", b"9" * 400, b"-", b"1e999"),
    *(b"nan", b"[" * 2000, b'"', b"\xed\xa0\x80", b"<script>alert(1)</script>"),
    *("\u2028\u202e".encode(), b"=HYPERLINK(1)"),
]


def make_originals(folder: Path) -> None:
    """Write a valid run, shards of ours, and shards of other tools."""
    made = run("bench/make_run.py", 60, folder / "run", "--sensors", 12, PYTHONPATH=str(ROOT))
    assert made.returncode == 0, made.stderr
    for name in ("shards", "foreign", "arrays"):
        (folder / name).mkdir()
    chance = np.random.default_rng(1)
    origin = Origin(tokenizer="bytes", vocab_size=END + 1, end_of_text=END, dataset="texts", dataset_config="local")
    with ShardWriter(folder / "shards", origin, shard_tokens=2000) as writer:
        for split in ("val", "train", "train", "train", "train"):
            text = chance.integers(32, 127, 1499)
            write_document(writer, split, np.array([END, *text], np.uint16))  # type: ignore[arg-type]
        writer.complete()
    for split in ("train", "val"):
        tokens = np.arange(2000, dtype="<u2")
        tokens.tofile(folder / "foreign" / f"{split}.bin")
        np.save(folder / "arrays" / f"edufineweb_{split}_000000.npy", tokens)


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Cut, repeat, insert or change bytes, digits and lines."""
    for _ in range(chance.randint(1, 4)):
        begin, end = sorted(chance.randint(0, len(data)) for _ in range(2))
        lines = data.split(b"\n")
        first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
        long = (lines[first] or b"x") * (2**20 // (len(lines[first]) + 1))
        match chance.randrange(11):
            case 0 | 1 | 2 | 3 | 4 as case:
                cut, repeated = data[min(end, begin + 200) :], data[begin - min(begin, 200) :]
                inserted = chance.choice(PIECES) + data[begin:]
                changed = bytes([chance.randrange(256)]) + data[begin + 1 :]
                data = data[:begin] + (b"", cut, repeated, inserted, changed)[case]
            case 5 | 6 | 7 | 8 as case:
                new = ([lines[second]], [], [lines[second], lines[first]], [long, lines[first]])
                data = b"\n".join([*lines[:first], *new[case - 5], *lines[first + 1 :]])
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
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return damaged(chance, data)
    if chance.random() < 0.3:
        return damaged(chance, data)
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
    compared = [str(run), str(originals / "run")]
    return "report.py", chance.choice([compared, [str(run)], [str(run)]])


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
            path.write_bytes(_damaged_json(chance, path.read_bytes()))
        case _ if path.is_file():
            path.write_bytes(damaged(chance, path.read_bytes()))


def shards(chance: random.Random, originals: Path, folder: Path) -> Command:
    data = Path(shutil.copytree(originals / "shards", folder / "data"))
    outside = ["../run.toml", "/etc/hostname", "a/../../x", "manifest.json", "", ".", "\\u0000"]
    for _ in range(chance.randint(1, 2)):
        manifest = data / "manifest.json"
        files = [manifest] if chance.random() < 0.5 else sorted(data.glob("*.bin"))
        path = chance.choice(files or [manifest])
        if not path.is_file() or path.is_symlink() or chance.random() < 0.2:
            _spoil(chance, path, path)
            continue
        content = path.read_bytes()
        if path == manifest and chance.random() < 0.3:
            named = re.split(rb'(?<="file": ")[^"]*', content)
            path.write_bytes(chance.choice(outside).encode().join(named))
        elif path == manifest:
            path.write_bytes(_damaged_json(chance, content))
        else:
            header = 4 * chance.randrange(4)
            place = header if chance.random() < 0.5 else chance.randrange(len(content) or 1)
            content = content[:place] + chance.randbytes(4) + content[place + 4 :]
            path.write_bytes(content[: chance.choice([len(content), len(content) - 1, 1024, 10])])
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


KINDS: dict[str, Callable[[random.Random, Path, Path], Command]] = {
    "configuration": configuration,
    "claims": claims,
    "run log": run_log,
    "run folder": run_folder,
    "shards": shards,
    "shards of other tools": foreign_shards,
}


class Hung(BaseException):
    """Raised at the time limit; no handler of a command catches it."""


def give_up(*_: object) -> None:
    raise Hung


def open_the_data(arguments: Sequence[str]) -> int:
    """Do what train.py does up to the first batch of each split."""
    parser = Parser(OPEN_DATA)
    parser.add_argument("config", type=Path)
    add_config_flags(parser)
    given = parser.parse(arguments)
    config = load_config(given.config, config_overrides(given))
    model = config.model.model_copy(update={"block_size": min(config.model.block_size, 128)})
    train = config.train.model_copy(update={"micro_batch": 2, "grad_accum": 1})
    small = config.model_copy(update={"model": model, "train": train})
    _, _, batches = open_data(small, torch.device("cpu"), Ranks())
    for split in ("train", "val"):
        batches.batch(split, 0, 0)
    return 0


def broken_inputs(scratch: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """Run one command per seed; return how often each exit status came, and the failures."""
    ends, failures, names = Counter[str](), [], sorted(KINDS)
    originals = scratch / "originals"
    originals.mkdir()
    make_originals(originals)
    before = signal.signal(signal.SIGALRM, give_up)
    try:
        for seed in seeds:
            kind = names[seed % len(names)]
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                end, problem = one_input(kind, seed, originals, Path(folder))
            ends[end] += 1
            failures += [f"seed {seed} ({kind}): {problem}"] if problem else []
    finally:
        signal.signal(signal.SIGALRM, before)
    return ends, failures


def one_input(kind: str, seed: int, originals: Path, folder: Path) -> tuple[str, str | None]:
    """Make one input and run its command; return how it ended and what is wrong with that."""
    script, arguments = KINDS[kind](random.Random(f"{kind} {seed}"), originals, folder)
    main = open_the_data if script == OPEN_DATA else import_module(Path(script).stem).main
    (folder / SECRET).write_text(json.dumps({"password": SECRET}))
    before = contents(folder) | contents(originals)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            # Python does not print these by default.
            for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
                warnings.simplefilter("ignore", quiet)
            warnings.simplefilter("ignore", ResourceWarning)
            signal.alarm(MAX_SECONDS)
            done = run_main(main, script, *arguments)
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
    end, said = f"exit {done.returncode}", done.stderr + "".join(str(w.message) for w in warned)
    one_sentence = said.count("\n") == 1 and said.endswith("\n") and said[:-1].isprintable()
    if not (done.returncode == 0 and not said) and not (done.returncode == 2 and one_sentence):
        return end, f"{end} with {said[:600]!r}"
    after = contents(folder) | contents(originals)
    changed = sorted(path for path, held in before.items() if after.get(path) != held)
    out = folder / "out"
    stray = sorted(p for p in after.keys() - before.keys() if not Path(p).is_relative_to(out))
    return end, f"changed {changed}, left {stray}" if changed or stray else None


def contents(folder: Path) -> dict[str, str]:
    """Return for each path below a folder its hash, the target of its link, or its mode."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        elif not path.is_file():
            found[str(path)] = f"mode {path.lstat().st_mode:o}"
        elif path.name not in WRITTEN:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found

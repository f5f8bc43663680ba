"""How fast texts become shards, beside what others do with the same texts, and in how much memory.

python bench/prepare.py [--nanogpt DIR] [--build-nanogpt DIR] [--megabytes 50] [--kills 20]

The texts are Python's own library and its documentation, repeated with variation. Every figure is a
whole process, its start among it: prepare_fineweb.py with two workers, from JSON lines to hashed
shards; one process that only calls tiktoken's encode_ordinary on each text; and the scripts of
nanoGPT and build-nanogpt, run from those repositories (bare or not) with their dataset replaced by
the same texts and two workers. Rounds are interleaved; a ratio is the median over rounds of
peer / ours. --kills adds a test of resuming.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import ROOT, Bench, Result, result

from nanogauge.errors import BadInput, RunFailed

SAMPLED_SECONDS = 0.02
PLAIN = """
import json, sys, tiktoken
encoding = tiktoken.get_encoding("gpt2")
count = 0
for line in open(sys.argv[1], "rb"):
    count += len(encoding.encode_ordinary(json.loads(line)["text"]))
print(count)
"""
# The peers' scripts load their dataset by its name: here it is the same texts, from this disk.
REPLACED = """
import datasets, os
loaded = datasets.load_dataset
def local(*_, split=None, **__):
    return loaded("json", data_files={"train": os.environ["TEXTS"]}, split=split)
datasets.load_dataset = local
"""


@dataclass
class Case:
    id: str
    peer: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)


def library_texts(megabytes: float) -> list[str]:
    """About so many megabytes of documents, of lengths as web pages have them."""
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    sources = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in str(path)]
    whole = [path.read_text(errors="ignore") for path in sources] + sorted(topics.values())
    chance = random.Random(0)
    parts: list[str] = []
    texts: list[str] = []
    size = 0
    for text in whole:
        at = 0
        while at < len(text):
            length = int(chance.lognormvariate(8, 0.8))
            parts.append(text[at : at + length])
            at += length
    while size < megabytes * 1e6:
        texts.append(f"{len(texts)} {chance.choice(parts)}")
        size += len(texts[-1].encode())
    return texts


def tree(pid: int) -> list[int]:
    """A process and those below it."""
    found = [pid]
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += tree(int(child))
    except OSError:
        pass  # it has ended
    return found


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def seconds_of(command: list[str], **environment: str) -> float:
    return measured(command, environment, sampled=False)[0]


def peak_of(command: list[str], **environment: str) -> int:
    return measured(command, environment, sampled=True)[1]


def measured(command: list[str], environment: dict[str, str], sampled: bool) -> tuple[float, int]:
    """Return a command's seconds and, if sampled, the most bytes that its processes hold together.

    Shared pages count for each.

    Raises:
        RunFailed: if it fails.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=said, stderr=said, cwd=ROOT
        )
        peak = 0
        while sampled:
            try:
                process.wait(SAMPLED_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, sum(map(resident_bytes, tree(process.pid))))
        process.wait()
        seconds = time.perf_counter() - began
        said.seek(0)
        if process.returncode:
            raise RunFailed(f"{command[:3]} failed: {said.read()[-500:].decode()}")
    return seconds, peak


def ours(texts: Path, out: Path, *more: object) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--dataset", texts, "--out", out, "--tokens", "1e9", "--val-tokens", "1e5"]
    flags += ["--shard-tokens", "1e8", "--workers", 2, *more]
    return [sys.executable, "prepare_fineweb.py", *map(str, flags)]


def source_of(repository: Path, path: str) -> tuple[str, str]:
    """A file of a repository, bare or checked out, and its commit.

    Raises:
        BadInput: if it is not there.
    """
    git = ["git", f"--git-dir={repository}"]
    if (repository / ".git").exists():
        git = ["git", "-C", str(repository)]
    try:
        shown = [["show", f"HEAD:{path}"], ["rev-parse", "--short", "HEAD"]]
        source, commit = (
            subprocess.run([*git, *each], capture_output=True, text=True, check=True).stdout
            for each in shown
        )
    except subprocess.CalledProcessError:
        raise BadInput(f"{repository} is no repository that holds {path}.") from None
    return source, commit.strip()


def peers(given: Any, folder: Path, texts: Path) -> list[Case]:
    """What we are held against: those that were given."""
    plain = folder / "plain.py"
    plain.write_text(PLAIN)
    command = [sys.executable, str(plain), str(texts)]
    cases = [Case("vs_tiktoken_one_process", "tiktoken, encode_ordinary alone", command)]
    scripts = [
        ("vs_nanogpt_prepare", "nanoGPT", given.nanogpt, "data/openwebtext/prepare.py",
         # Its 1,024 batches need as many documents, which its validation split has not here.
         {"num_proc = 8": "num_proc = 2", "= 1024": "= min(1024, len(dset))"}),
        ("vs_build_nanogpt", "build-nanogpt", given.build_nanogpt, "fineweb.py",
         {"max(1, os.cpu_count()//2)": "2"}),
    ]  # fmt: skip
    for id_, name, repository, path, changes in scripts:
        if repository is None:
            continue
        source, commit = source_of(repository, path)
        for was, now in changes.items():
            if was not in source:
                raise BadInput(f"{path} of {name} {commit} has no {was!r}, which is set here.")
            source = source.replace(was, now)
        script = folder / name / "script.py"
        script.parent.mkdir()
        script.write_text(REPLACED + source)
        case = Case(id_, f"{name} {commit}, two workers", [sys.executable, str(script)])
        case.environment = {"TEXTS": str(texts), "HF_DATASETS_CACHE": str(folder / "cache")}
        cases.append(case)
    return cases


def killed_and_resumed(texts: Path, folder: Path, kills: int) -> int:
    """Kill -9 at so many random moments, and resume; how many undisturbed ends were compared.

    Raises:
        RunFailed: if the shards differ from those of an undisturbed call.
    """
    small = ["--shard-tokens", "1e6"]
    seconds_of(ours(texts, folder / "whole", *small))
    whole = contents(folder / "whole")
    chance, landed, compared = random.Random(4), 0, 0
    command = ours(texts, folder / "killed", *small)
    while True:
        if landed < kills:
            process = subprocess.Popen(
                command, cwd=ROOT, start_new_session=True, stdout=-3, stderr=-3
            )
            time.sleep(chance.uniform(0.2, 0.7))
            os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                landed += 1
                continue
        else:
            seconds_of(command)
        if contents(folder / "killed") != whole:
            raise RunFailed("killed and resumed, the shards are not those of an undisturbed call")
        compared += 1
        if landed == kills:
            return compared
        shutil.rmtree(folder / "killed")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def measure(given: Any) -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        return measure_in(given, Path(name))


def measure_in(given: Any, folder: Path) -> list[Result]:
    texts = folder / "texts.jsonl"
    with texts.open("w") as file:
        for text in library_texts(given.megabytes):
            file.write(json.dumps({"text": text}) + "\n")
    cases = peers(given, folder, texts)
    own_seconds = []
    for number in range(given.rounds + 1):
        for case in cases:
            # Each peer has a run of ours beside it, before it in one round and behind in the next.
            pair = {}
            for who in ("ours", "peer") if number % 2 else ("peer", "ours"):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                command = ours(texts, folder / "out") if who == "ours" else case.command
                pair[who] = seconds_of(command, **case.environment)
            if number:
                case.ratios.append(pair["peer"] / pair["ours"])
                own_seconds.append(pair["ours"])
    tokens = json.loads((folder / "out" / "manifest.json").read_text())["total_tokens"]
    size = f"{given.megabytes:g} MB of text, {tokens:,} tokens"
    results = [result(case.id, size, case.ratios, case.peer) for case in cases]
    results.append(
        result("tokens_per_second", size, [tokens / each for each in own_seconds], "two workers")
    )
    peaks = {}
    for case in cases:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        peaks[case.peer] = peak_of(case.command, **case.environment)
    beside = ", ".join(f"{peer} {peak / 2**30:.2f} GiB" for peer, peak in peaks.items())
    own_peak = peak_of(ours(texts, folder / "out"))
    results.append(result("tree_peak_bytes", size, [own_peak], beside))
    if given.kills:
        compared = killed_and_resumed(texts, folder, given.kills)
        whole = f"{compared} times to the end, all files identical to an undisturbed call's"
        results.append(result("kills_survived", "kill -9", [given.kills], whole))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--nanogpt", type=Path, help="nanoGPT's repository")
    bench.add_argument("--build-nanogpt", type=Path, help="build-nanogpt's repository")
    bench.add_size("--megabytes", 50.0, 0.5, "of text (50)")
    bench.add_size("--rounds", 5, 1, "rounds that count, after one more")
    bench.add_argument("--kills", type=int, default=0, help="kills -9, then resumed")
    bench.run(measure)

"""Compare the speed and memory of data preparation with other programs on the same texts.

python bench/prepare.py [--nanogpt DIR] [--build-nanogpt DIR] [--megabytes 50] [--json]

The texts are excerpts of Python's library and documentation. Each figure is that of a whole process: prepare_fineweb.py
with two workers, from JSON lines to hashed shards; one process that only calls tiktoken's encode_ordinary; and the
scripts of nanoGPT and build-nanogpt with two workers and these texts as their dataset. Rounds are interleaved. A ratio
is peer / ours, the median over rounds.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import ROOT, Bench, Result, result

from nanogauge.errors import BadInput, RunFailed

SAMPLE_SECONDS = 0.02
PLAIN = """
import json, sys, tiktoken
encoding = tiktoken.get_encoding("gpt2")
count = 0
for line in open(sys.argv[1], "rb"):
    count += len(encoding.encode_ordinary(json.loads(line)["text"]))
print(count)
"""
# Prepended to the peers' scripts: loads the local texts instead of the named dataset.
LOCAL_DATASET = """
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
    """Return documents with log-normal lengths, like web pages, of this total size."""
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    sources = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in str(path)]
    whole = [path.read_text(errors="ignore") for path in sources] + sorted(topics.values())
    rng = random.Random(0)
    parts: list[str] = []
    texts: list[str] = []
    size = 0
    for text in whole:
        begin = 0
        while begin < len(text):
            length = int(rng.lognormvariate(8, 0.8))
            parts.append(text[begin : begin + length])
            begin += length
    while size < megabytes * 1e6:
        texts.append(f"{len(texts)} {rng.choice(parts)}")
        size += len(texts[-1].encode())
    return texts


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    pids = [pid]
    with contextlib.suppress(OSError):  # the process has ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pids += process_tree(int(child))
    return pids


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def run_measured(command: list[str], environment: dict[str, str], sample: bool = False) -> tuple[float, int]:
    """Run a command; return its seconds and, if sampled, the peak bytes of its process tree.

    Shared pages count for each process.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output, cwd=ROOT)
        peak = 0
        while sample:
            try:
                process.wait(SAMPLE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, sum(map(resident_bytes, process_tree(process.pid))))
        process.wait()
        seconds = time.perf_counter() - began
        output.seek(0)
        if process.returncode:
            raise RunFailed(f"{command[:3]} failed: {output.read()[-500:].decode()}")
    return seconds, peak


def our_command(texts: Path, out: Path) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--dataset", texts, "--out", out, "--tokens", "1e9", "--val-tokens", "1e5"]
    flags += ["--shard-tokens", "1e8", "--workers", 2]
    return [sys.executable, "prepare_fineweb.py", *map(str, flags)]


def source_of(repository: Path, path: str) -> tuple[str, str]:
    """Return a file of a repository, bare or checked out, and its commit."""
    git = ["git", f"--git-dir={repository}"]
    if (repository / ".git").exists():
        git = ["git", "-C", str(repository)]
    try:
        shown = [["show", f"HEAD:{path}"], ["rev-parse", "--short", "HEAD"]]
        source, commit = (
            subprocess.run([*git, *each], capture_output=True, text=True, check=True).stdout for each in shown
        )
    except subprocess.CalledProcessError:
        raise BadInput(f"{repository} is not a repository with {path}.") from None
    return source, commit.strip()


def peers(args: Any, folder: Path, texts: Path) -> list[Case]:
    """Return tiktoken and the peers with a repository on the command line."""
    plain = folder / "plain.py"
    plain.write_text(PLAIN)
    command = [sys.executable, str(plain), str(texts)]
    cases = [Case("vs_tiktoken_one_process", "tiktoken, encode_ordinary alone", command)]
    scripts = [
        ("vs_nanogpt_prepare", "nanoGPT", args.nanogpt, "data/openwebtext/prepare.py",
         # It cuts each split into 1,024 batches; the validation split has fewer documents here.
         {"num_proc = 8": "num_proc = 2", "= 1024": "= min(1024, len(dset))"}),
        ("vs_build_nanogpt", "build-nanogpt", args.build_nanogpt, "fineweb.py",
         {"max(1, os.cpu_count()//2)": "2"}),
    ]  # fmt: skip
    for id_, name, repository, path, changes in scripts:
        if repository is None:
            continue
        source, commit = source_of(repository, path)
        for old, new in changes.items():
            if old not in source:
                raise BadInput(f"{path} of {name} {commit} has no {old!r} to replace.")
            source = source.replace(old, new)
        script = folder / name / "script.py"
        script.parent.mkdir()
        script.write_text(LOCAL_DATASET + source)
        case = Case(id_, f"{name} {commit}, two workers", [sys.executable, str(script)])
        case.environment = {"TEXTS": str(texts), "HF_DATASETS_CACHE": str(folder / "cache")}
        cases.append(case)
    return cases


def run(args: Any) -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        return measure(args, Path(name))


def measure(args: Any, folder: Path) -> list[Result]:
    texts = folder / "texts.jsonl"
    with texts.open("w") as file:
        for text in library_texts(args.megabytes):
            file.write(json.dumps({"text": text}) + "\n")
    cases = peers(args, folder, texts)
    own_seconds = []
    for number in range(args.rounds + 1):
        for case in cases:
            # Each peer alternates with a run of ours, which is first in every other round.
            pair = {}
            for program in ("ours", "peer") if number % 2 else ("peer", "ours"):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                command = case.command if program == "peer" else our_command(texts, folder / "out")
                pair[program], _ = run_measured(command, case.environment)
            if number:
                case.ratios.append(pair["peer"] / pair["ours"])
                own_seconds.append(pair["ours"])
    tokens = json.loads((folder / "out" / "manifest.json").read_text())["total_tokens"]
    size = f"{args.megabytes:g} MB of text, {tokens:,} tokens"
    results = [result(case.id, size, case.ratios, case.peer) for case in cases]
    rates = [tokens / seconds for seconds in own_seconds]
    results.append(result("tokens_per_second", size, rates, "two workers"))
    peaks = {}
    for case in cases:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        _, peaks[case.peer] = run_measured(case.command, case.environment, sample=True)
    others = ", ".join(f"{peer} {peak / 2**30:.2f} GiB" for peer, peak in peaks.items())
    _, peak = run_measured(our_command(texts, folder / "out"), {}, sample=True)
    results.append(result("tree_peak_bytes", size, [peak], others))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--nanogpt", type=Path, help="nanoGPT's repository")
    bench.add_argument("--build-nanogpt", type=Path, help="build-nanogpt's repository")
    bench.add_size("--megabytes", 50.0, 0.5, "megabytes of text")
    bench.add_size("--rounds", 5, 1, "counted rounds, after one that warms up")
    bench.run(run)

"""How long planning and reporting take to start, relative to importing torch, which they do not do.

python bench/startup.py [--rounds 7] [--json]

Rounds are interleaved; each figure is a whole process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from results import ROOT, Bench, Result, ratios, result

PEER = "python -c 'import torch'"
CASES = {
    "plan.py, the documented run": [
        *("plan.py", "configs/rtx4070_fineweb.toml", "--gpu=RTX 4070"),
        "--claims=predictions/seed_zh.toml",
    ],
    "report.py --help": ["report.py", "--help"],
    PEER: ["-c", "import torch"],
}


def seconds_of(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def measure(given: Any) -> list[Result]:
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(given.rounds + 1):
        for case, command in CASES.items():
            took = seconds_of(command)
            if number:
                times[case].append(took)
    results = [result("startup_seconds", case, seconds, None) for case, seconds in times.items()]
    peer = times.pop(PEER)
    for case, seconds in times.items():
        results.append(result("startup_time_ratio", case, ratios(seconds, peer), PEER))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--rounds", 7, 1, "rounds that count, after one more")
    bench.run(measure)

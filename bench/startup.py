"""How long planning and reporting take to start, against importing torch, which they do not do.

python bench/startup.py [--json]

Runs are interleaved; each figure is a whole process. The ratio is the median over rounds of
command / import torch, with the lowest and highest round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from results import result

from nanogauge.cli import Parser, run_command

ROOT = Path(__file__).parents[1]
PEER = ["-c", "import torch"]
CASES = {
    "plan.py, the documented run": [
        "plan.py",
        "configs/rtx4070_fineweb.toml",
        "--gpu=RTX 4070",
        "--claims=predictions/seed_zh.toml",
    ],
    "report.py --help": ["report.py", "--help"],
}


def seconds_of(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after one more")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    times: dict[str, list[float]] = {case: [] for case in (*CASES, "import torch")}
    for _ in range(given.rounds + 1):
        for case, command in (*CASES.items(), ("import torch", PEER)):
            times[case].append(seconds_of(command))
    peer = times["import torch"][1:]
    results = []
    for case in CASES:
        counted = times[case][1:]
        ratios = [own / other for own, other in zip(counted, peer, strict=True)]
        found = result("startup_time_ratio", case, ratios, "python -c 'import torch'")
        results.append(found)
        if not given.json:
            print(
                f"{case:30} {statistics.median(counted):.2f} s, "
                f"{found['value']:.2f} of import torch ({found['low']:.2f}-{found['high']:.2f})"
            )
    if given.json:
        print(json.dumps({"bench": "startup", "results": results}))
    return 0


if __name__ == "__main__":
    run_command(main)

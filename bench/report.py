"""How long a report takes and how much memory, as a whole process, on runs of known sizes.

python bench/report.py [--rounds 5] [--json]

The folders are made in a temporary folder by make_run.py, from a seed. report_seconds is the wall
time of report.py from its start to its end; report_peak_bytes its highest resident memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from make_run import make_run
from results import result

from nanogauge.cli import Parser, run_command

ROOT = Path(__file__).parents[1]
SENSORS = 72_000
CASES = {
    "20,000 steps, 72,000 sensor lines": (20_000, 2.0, 300 * 2**20),
    "1,000,000 steps, 72,000 sensor lines": (1_000_000, 20.0, 2**30),
}
"""steps; and what a report must stay under, in seconds and bytes"""


def report(folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one report.

    The peak of a process is at least what its parent held when it forked: a small program of its
    own starts the report and tells.
    """
    program = (
        "import os, resource, subprocess, sys, time\n"
        "began = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "took = time.perf_counter() - began\n"
        "print(took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    command = [sys.executable, "report.py", str(folder)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kilobytes = done.stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    return float(seconds), int(kilobytes) * unit


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="reports that count, after one more")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    results = []
    for case, (steps, most_seconds, most_bytes) in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            make_run(folder, steps, SENSORS)
            found = [report(folder) for _ in range(given.rounds + 1)][1:]
        for name, values, limit in (
            ("report_seconds", [seconds for seconds, _ in found], most_seconds),
            ("report_peak_bytes", [peak for _, peak in found], most_bytes),
        ):
            results.append(result(name, case, values, f"the limit, {limit:g}"))
        if not given.json:
            seconds, peak = (each["value"] for each in results[-2:])
            print(
                f"{case:38} {seconds:.2f} s ({results[-2]['low']:.2f}-{results[-2]['high']:.2f}), "
                f"limit {most_seconds:g}; {float(str(peak)) / 2**20:.0f} MiB, "
                f"limit {most_bytes / 2**20:.0f}"
            )
    if given.json:
        print(json.dumps({"bench": "report", "results": results}))
    return 0


if __name__ == "__main__":
    run_command(main)

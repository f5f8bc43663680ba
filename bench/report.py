"""Measure the wall time and peak memory of report.py on generated runs of known sizes.

python bench/report.py [--rounds 5] [--json]

make_run.py generates the runs. The peer of each figure is its limit.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_run import make_run
from results import ROOT, Bench, Result, result

CASES = ((20_000, 2.0, 300 * 2**20), (1_000_000, 20.0, 2**30))
"""steps, and the limits in seconds and bytes"""
# A process inherits the peak memory of its parent, so a small program starts the report.
PROGRAM = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
took = time.perf_counter() - began
print(took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def report(folder: Path) -> tuple[float, int]:
    """Return the seconds and the peak bytes of one report."""
    command = [sys.executable, "-S", "-c", PROGRAM, sys.executable, "report.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) * (1 if sys.platform == "darwin" else 1024)


def measure(args: Any) -> list[Result]:
    results = []
    for case_steps, seconds_limit, bytes_limit in CASES:
        steps = min(case_steps, args.most_steps)
        case = f"{steps:,} steps, {args.sensors:,} sensor lines"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            make_run(folder, steps, args.sensors)
            measured = [report(folder) for _ in range(args.rounds + 1)][1:]
        seconds, peaks = zip(*measured, strict=True)
        results += [
            result("report_seconds", case, seconds, f"the limit, {seconds_limit:g}"),
            result("report_peak_bytes", case, peaks, f"the limit, {bytes_limit:g}"),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--rounds", 5, 1, "counted rounds, after one that warms up")
    bench.add_size("--most-steps", 1_000_000, 100, "steps of the longest run")
    bench.add_size("--sensors", 72_000, 100, "sensor readings of a run")
    bench.run(measure)

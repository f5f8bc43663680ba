"""The time and memory of a report, as a whole process, on runs of known sizes.

python bench/report.py [--rounds 5] [--json]

make_run.py makes the runs, from a seed. report_seconds is the wall time of report.py from start to
end, report_peak_bytes its highest resident memory; the peer is the limit of either.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_run import make_run
from results import ROOT, Bench, Result, result

CASES = ((20_000, 2.0, 300 * 2**20), (1_000_000, 20.0, 2**30))
"""steps; and what a report must stay under, in seconds and bytes"""
# The peak of a process is at least what its parent held when it forked: a small program of its own
# starts the report and measures it.
PROGRAM = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
took = time.perf_counter() - began
print(took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def report(folder: Path) -> tuple[float, int]:
    """Return seconds and peak bytes of one report."""
    command = [sys.executable, "-S", "-c", PROGRAM, sys.executable, "report.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) * (1 if sys.platform == "darwin" else 1024)


def measure(given: Any) -> list[Result]:
    results = []
    for case_steps, most_seconds, most_bytes in CASES:
        steps = min(case_steps, given.most_steps)
        case = f"{steps:,} steps, {given.sensors:,} sensor lines"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            make_run(folder, steps, given.sensors)
            found = [report(folder) for _ in range(given.rounds + 1)][1:]
        seconds, peaks = zip(*found, strict=True)
        results += [
            result("report_seconds", case, seconds, f"the limit, {most_seconds:g}"),
            result("report_peak_bytes", case, peaks, f"the limit, {most_bytes:g}"),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_size("--rounds", 5, 1, "reports that count, after one more")
    bench.add_size("--most-steps", 1_000_000, 100, "steps of the longest run")
    bench.add_size("--sensors", 72_000, 100, "readings of the sensors of a run")
    bench.run(measure)

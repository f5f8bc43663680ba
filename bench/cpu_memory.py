"""The resident memory of train.py on this CPU, predicted against measured, over random GPTs.

python bench/cpu_memory.py [--seed 2] [--shapes 6] [--json]

Each shape is trained for 20 steps, eager and compiled: width 64-512, depth 1-12, context 64-512,
batch 1-16, vocabulary 264-50,304 (the demo's text needs 264), all drawn evenly on a logarithmic
scale. The error is of the frozen prediction's expected peak against the kernel's VmHWM.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nanogauge.cli import Parser, run_command
from nanogauge.runlog.folder import load_with_log

ROOT = Path(__file__).parents[1]
STEPS = 20


def draw_shape(source: random.Random) -> dict[str, int]:
    def evenly(low: int, high: int) -> int:
        return round(math.exp(source.uniform(math.log(low), math.log(high))))

    width = 64 * evenly(1, 8)
    return {
        "model.n-embd": width,
        "model.n-head": width // 64,
        "model.n-layer": evenly(1, 12),
        "model.block-size": evenly(64, 512),
        "model.vocab-size": evenly(264, 50304),
        "train.micro-batch": evenly(1, 16),
    }


def train(shape: dict[str, int], compiled: bool) -> tuple[float, float, float, float]:
    """Low, expected and high of the prediction, and the peak of the run, in bytes."""
    settings = shape | {"train.max-steps": STEPS, "train.eval-batches": 2}
    settings |= {"train.eval-every": 1000, "train.checkpoint-every": 1000}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "configs/demo.toml", f"--run.out={out}", *flags]
        command.append(f"--run.compile={str(compiled).lower()}")
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        folder, recorded = load_with_log(Path(out) / "demo")
    told = folder.prediction.quantities["peak_process_bytes"]
    assert recorded.end is not None and recorded.end.peak_process_bytes is not None
    return told.low, told.expected, told.high, recorded.end.peak_process_bytes


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=2, help="of the shapes")
    parser.add_argument("--shapes", type=int, default=6, help="how many")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    source = random.Random(given.seed)
    errors: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(given.shapes):
        shape = draw_shape(source)
        for mode, found in errors.items():
            low, expected, high, measured = train(shape, mode == "compiled")
            found.append(abs(expected / measured - 1))
            if not given.json:
                sizes = " ".join(f"{k.split('.')[1]} {v:<6}" for k, v in shape.items())
                print(
                    f"{sizes} {mode:8} {expected / 1e6:6.0f} MB predicted "
                    f"({low / 1e6:.0f}-{high / 1e6:.0f}), {measured / 1e6:6.0f} measured, "
                    f"{expected / measured - 1:+.1%}{'' if low <= measured <= high else ' OUTSIDE'}"
                )
    results = [
        {
            "id": "cpu_process_memory_median_error",
            "case": f"train.py, {mode}, {STEPS} steps, seed {given.seed}",
            "value": statistics.median(found),
            "low": min(found),
            "high": max(found),
            "n": len(found),
            "peer": "train.py",
        }
        for mode, found in errors.items()
    ]
    if given.json:
        print(json.dumps({"bench": "cpu_memory", "results": results}))
    else:
        for result in results:
            print(
                f"{result['case']}: median error {result['value']:.1%}, worst {result['high']:.1%}"
            )
    return 0


if __name__ == "__main__":
    run_command(main)

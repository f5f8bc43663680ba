"""The resident memory of train.py on this CPU, predicted against measured, over random GPTs.

python bench/cpu_memory.py [--seed 2] [--shapes 6] [--json]

Each shape is trained for 20 steps, eager and compiled: width 64-512, depth 1-12, context 64-512,
batch 1-16, vocabulary 264-50,304 (the demo's text needs 264), all drawn evenly on a logarithmic
scale. The error is of the frozen prediction's expected peak against the kernel's VmHWM.
"""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

from results import Bench, Result, flags_of, result, run_script

from nanogauge.runlog.folder import load_with_log

SMALLEST = {"model.n-layer": 1, "model.n-head": 2, "model.n-embd": 32, "model.block-size": 32}


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


def train(shape: dict[str, int], compiled: bool, steps: int) -> tuple[float, float]:
    """Return the expected peak of the prediction and the peak of the run, in bytes."""
    settings = shape | {"train.max-steps": steps, "train.eval-batches": 2}
    settings |= {"train.eval-every": 1000, "train.checkpoint-every": 1000}
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--run.compile={str(compiled).lower()}", *flags_of(settings)]
        run_script("train.py", "configs/demo.toml", *flags)
        folder, recorded = load_with_log(Path(out) / "demo")
    predicted = folder.prediction.quantities["peak_process_bytes"]
    assert recorded.end is not None and recorded.end.peak_process_bytes is not None
    return predicted.expected, recorded.end.peak_process_bytes


def measure(given: Any) -> list[Result]:
    source = random.Random(given.seed)
    results = []
    errors: dict[str, list[float]] = {"eager": [], "compiled": []}
    if given.smallest:
        del errors["compiled"]
    for _ in range(given.shapes):
        shape = SMALLEST if given.smallest else draw_shape(source)
        for mode, found in errors.items():
            expected, measured = train(shape, mode == "compiled", given.steps)
            found.append(abs(expected / measured - 1))
            case = " ".join(f"{key.split('.')[1]} {value}" for key, value in shape.items())
            results.append(result("cpu_process_memory_ratio", case, [expected / measured], mode))
    for mode, found in errors.items():
        case = f"train.py, {mode}, {given.steps} steps, seed {given.seed}"
        results.append(result("cpu_process_memory_median_error", case, found, "train.py"))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--seed", type=int, default=2, help="of the shapes")
    bench.add_size("--shapes", 6, 1, "how many")
    bench.add_size("--steps", 20, 2, "steps that each is trained")
    bench.run(measure)

"""Compare predicted with measured resident memory of train.py, over random GPTs on this CPU.

python bench/cpu_memory.py [--seed 2] [--shapes 6] [--json]

Each shape is trained eager and compiled: width 64-512, depth 1-12, context 64-512, batch 1-16, vocabulary 264-50,304,
each drawn log-uniformly. The error is that of the frozen prediction's expected peak against the kernel's VmHWM.
"""

import math
import random
import tempfile
from pathlib import Path
from typing import Any

from results import SMALLEST_SHAPE, Bench, Result, case_of, flags_of, result, run_script

from nanogauge.runlog.folder import load_with_log


def random_shape(generator: random.Random) -> dict[str, int]:
    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(generator.uniform(math.log(low), math.log(high))))

    width = 64 * log_uniform(1, 8)
    return {
        "model.n-embd": width,
        "model.n-head": width // 64,
        "model.n-layer": log_uniform(1, 12),
        "model.block-size": log_uniform(64, 512),
        "model.vocab-size": log_uniform(264, 50304),
        "train.micro-batch": log_uniform(1, 16),
    }


def train(shape: dict[str, int], compiled: bool, steps: int) -> tuple[float, float]:
    """Return the predicted and the measured peak of a run in bytes."""
    settings = shape | {"train.max-steps": steps, "train.eval-batches": 2}
    settings |= {"train.eval-every": 1000, "train.checkpoint-every": 1000}
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--run.out={out}", f"--run.compile={str(compiled).lower()}", *flags_of(settings)]
        run_script("train.py", "configs/demo.toml", *flags)
        folder, recorded = load_with_log(Path(out) / "demo")
    predicted = folder.prediction.quantities["peak_process_bytes"]
    assert recorded.end is not None and recorded.end.peak_process_bytes is not None
    return predicted.expected, recorded.end.peak_process_bytes


def measure(args: Any) -> list[Result]:
    generator = random.Random(args.seed)
    errors: dict[str, list[float]] = {"eager": [], "compiled": []}
    if args.smallest:
        del errors["compiled"]
    results = []
    for _ in range(args.shapes):
        shape = SMALLEST_SHAPE if args.smallest else random_shape(generator)
        for mode, values in errors.items():
            expected, measured = train(shape, mode == "compiled", args.steps)
            values.append(abs(expected / measured - 1))
            ratio = [expected / measured]
            results.append(result("cpu_process_memory_ratio", case_of(shape), ratio, mode))
    for mode, values in errors.items():
        case = f"train.py, {mode}, {args.steps} steps, seed {args.seed}"
        results.append(result("cpu_process_memory_median_error", case, values, "train.py"))
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--seed", type=int, default=2, help="seed of the shapes")
    bench.add_size("--shapes", 6, 1, "number of shapes")
    bench.add_size("--steps", 20, 2, "training steps per shape")
    bench.run(measure)

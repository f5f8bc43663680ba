"""Compare calibrated step times with trained ones, over random GPTs on this CPU.

python bench/calibrated_cpu.py [--seed 0] [--shapes 6] [--steps 20] [--json]

Each shape is run eager and compiled. plan.py --calibrate measures it and train.py trains it. The error is that of the
calibrated prediction against the steady median of the log. Compiler caches and calibrations start empty.
"""

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from results import SMALLEST_SHAPE, Bench, Result, case_of, flags_of, result, run_script

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.runlog.reader import read_log

MODES = {"eager": "false", "compiled": "true"}


def random_shape(generator: random.Random) -> dict[str, int]:
    """Draw width 64-512, depth 1-12, block 64-512, batch 1-16, vocabulary 264-50,304."""
    head_size = generator.choice([32, 64])
    heads = generator.randint(64 // head_size, 512 // head_size)
    return {
        "model.n_layer": generator.randint(1, 12),
        "model.n_head": heads,
        "model.n_embd": heads * head_size,
        "model.block_size": 32 * generator.randint(2, 16),
        "train.micro_batch": generator.randint(1, 16),
        "model.vocab_size": 8 * round(33 * (50304 / 264) ** generator.random()),
    }


def run_shape(shape: dict[str, int], mode: str, steps: int, folder: Path) -> dict[str, float]:
    """Calibrate and train one shape; compare both predicted step times with the trained one."""
    flags = flags_of(shape | {"run.compile": MODES[mode], "run.name": "x", "run.out": folder})
    flags += [f"--train.max-steps={steps}", "--train.eval-every=1000", "--train.eval-batches=1"]
    flags += ["--train.checkpoint-every=1000", "--wandb.mode=disabled"]
    caches = {"XDG_DATA_HOME": str(folder / "data"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    began = time.perf_counter()
    plan = run_script("plan.py", "configs/demo.toml", *flags, "--calibrate", "--json", **caches)
    calibration_seconds = time.perf_counter() - began
    run_script("train.py", "configs/demo.toml", *flags, **caches)
    measured = float(statistics.median(steady_seconds(read_log(folder / "x"))))
    (row,) = [row for row in json.loads(plan)["rows"] if row["id"] == "step_seconds"]
    calibrated, analytic = row["calibrated"], row["analytic"]
    return {
        "calibration_seconds": calibration_seconds,
        "ratio": calibrated["expected"] / measured,
        "error": abs(calibrated["expected"] / measured - 1),
        "analytic_error": abs(analytic["expected"] / measured - 1),
        "inside": calibrated["low"] <= measured <= calibrated["high"],
    }


def measure(args: Any) -> list[Result]:
    generator = random.Random(args.seed)
    shapes = [random_shape(generator) for _ in range(args.shapes)]
    by_mode: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    if args.smallest:
        shapes = [SMALLEST_SHAPE]
        del by_mode["compiled"]
    results = []
    for shape in shapes:
        for mode, rows in by_mode.items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_shape(shape, mode, args.steps, Path(folder)))
            for name in ("ratio", "inside"):
                values = [rows[-1][name]]
                results.append(result(f"calibrated_step_{name}", case_of(shape), values, mode))
    for mode, rows in by_mode.items():
        errors, analytic, seconds = (
            [row[name] for row in rows] for name in ("error", "analytic_error", "calibration_seconds")
        )
        results += [
            result("calibrated_step_median_error", mode, errors, "train.py"),
            result("calibrated_step_worst_error", mode, errors, "train.py", max(errors)),
            result("analytic_step_median_error", mode, analytic, "train.py"),
            result("calibration_seconds", mode, seconds, "train.py", max(seconds)),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--seed", type=int, default=0, help="seed of the shapes")
    bench.add_argument("--shapes", type=int, default=6, help="number of shapes")
    bench.add_size("--steps", 20, 5, "training steps per shape")
    bench.run(measure)

"""How far a calibrated step is from the step that is then trained, on this CPU.

python bench/calibrated_cpu.py [--seed 0] [--shapes 6] [--steps 20] [--json]

Random GPT shapes, each in eager mode and compiled: plan.py --calibrate measures, train.py trains,
and the steady median of its log is held against the calibrated prediction. Caches of the compiler
and calibrations are fresh, in a folder that is removed.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from results import Bench, Result, flags_of, result, run_script

from nanogauge.analysis.ledger import steady_seconds
from nanogauge.runlog.reader import read_log

MODES = {"eager": "false", "compiled": "true"}
SMALLEST = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32}


def random_shape(generator: random.Random) -> dict[str, int]:
    """Width 64-512, depth 1-12, block 64-512, batch 1-16, vocabulary 264-50,304."""
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


def one(shape: dict[str, int], mode: str, steps: int, folder: Path) -> dict[str, float]:
    """Calibrate and train one shape; seconds of a step as predicted and as trained."""
    flags = [
        *flags_of(shape),
        f"--run.compile={MODES[mode]}",
        "--run.name=x",
        f"--run.out={folder}",
    ]
    flags += [f"--train.max-steps={steps}", "--train.eval-every=1000", "--train.eval-batches=1"]
    flags += ["--train.checkpoint-every=1000", "--wandb.mode=disabled"]
    caches = {
        "XDG_DATA_HOME": str(folder / "data"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    began = time.perf_counter()
    plan = run_script("plan.py", "configs/demo.toml", *flags, "--calibrate", "--json", **caches)
    calibrating = time.perf_counter() - began
    run_script("train.py", "configs/demo.toml", *flags, **caches)
    measured = float(statistics.median(steady_seconds(read_log(folder / "x"))))
    (row,) = [row for row in json.loads(plan)["rows"] if row["id"] == "step_seconds"]
    calibrated, analytic = row["calibrated"], row["analytic"]
    return {
        "calibrating": calibrating,
        "ratio": calibrated["expected"] / measured,
        "error": abs(calibrated["expected"] / measured - 1),
        "analytic_error": abs(analytic["expected"] / measured - 1),
        "inside": calibrated["low"] <= measured <= calibrated["high"],
    }


def measure(given: Any) -> list[Result]:
    generator = random.Random(given.seed)
    shapes = (
        [SMALLEST] if given.smallest else [random_shape(generator) for _ in range(given.shapes)]
    )
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    if given.smallest:
        del found["compiled"]
    results = []
    for shape in shapes:
        for mode, rows in found.items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(shape, mode, given.steps, Path(folder)))
            case = " ".join(f"{key.split('.')[1]} {value}" for key, value in shape.items())
            for name in ("ratio", "inside"):
                results.append(result(f"calibrated_step_{name}", case, [rows[-1][name]], mode))
    for mode, rows in found.items():
        errors = [row["error"] for row in rows]
        analytic = [row["analytic_error"] for row in rows]
        seconds = [row["calibrating"] for row in rows]
        results += [
            result("calibrated_step_median_error", mode, errors, "train.py"),
            result("calibrated_step_worst_error", mode, errors, "train.py", max(errors)),
            result("analytic_step_median_error", mode, analytic, "train.py"),
            result("calibration_seconds", mode, seconds, "train.py", max(seconds)),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("--seed", type=int, default=0, help="of the shapes")
    bench.add_argument("--shapes", type=int, default=6, help="how many")
    bench.add_size("--steps", 20, 5, "steps that each is trained")
    bench.run(measure)

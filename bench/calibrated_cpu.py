"""How far a calibrated step is from the step that is then trained, on this CPU.

python bench/calibrated_cpu.py [--seed 0] [--shapes 6] [--steps 20] [--json]

Random GPT shapes, each in eager mode and compiled: plan.py --calibrate measures, train.py trains,
and the steady median of its log is held against the calibrated prediction. Caches of the compiler
and calibrations are fresh, in a folder that is removed.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanogauge.analysis.measured import steady_seconds
from nanogauge.cli import Parser, run_command
from nanogauge.runlog.reader import read_log

ROOT = Path(__file__).parents[1]
MODES = {"eager": "false", "compiled": "true"}


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
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    flags += [f"--run.compile={MODES[mode]}", "--run.name=x"]
    flags += [f"--train.max-steps={steps}", "--train.eval-every=1000", "--train.eval-batches=1"]
    flags += ["--train.checkpoint-every=1000", "--wandb.mode=disabled", f"--run.out={folder}"]
    caches = {
        "XDG_DATA_HOME": str(folder / "data"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }

    def command(script: str, *more: str) -> str:
        return subprocess.run(
            [sys.executable, str(ROOT / script), "configs/demo.toml", *flags, *more],
            cwd=ROOT,
            env={**os.environ, **caches},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout

    began = time.perf_counter()
    plan = json.loads(command("plan.py", "--calibrate", "--json"))
    calibrating = time.perf_counter() - began
    command("train.py")
    steps_made = steady_seconds(read_log(folder / "x"))
    (row,) = [row for row in plan["rows"] if row["id"] == "step_seconds"]
    measured = float(np.median(steps_made))
    calibrated, analytic = row["calibrated"], row["analytic"]
    return {
        "calibrating": calibrating,
        "measured": measured,
        "calibrated": calibrated["expected"],
        "error": abs(calibrated["expected"] / measured - 1),
        "analytic_error": abs(analytic["expected"] / measured - 1),
        "inside": calibrated["low"] <= measured <= calibrated["high"],
    }


def result(name: str, case: str, value: float, values: Sequence[float]) -> dict[str, object]:
    return {
        "id": name,
        "case": case,
        "value": value,
        "low": min(values),
        "high": max(values),
        "n": len(values),
        "peer": "train.py",
    }


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the shapes")
    parser.add_argument("--shapes", type=int, default=6, help="how many")
    parser.add_argument("--steps", type=int, default=20, help="steps that each is trained")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    generator = random.Random(given.seed)
    shapes = [random_shape(generator) for _ in range(given.shapes)]
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    if not given.json:
        print(
            "layers heads width block batch vocabulary mode     "
            "calibrated   trained   ratio  inside  analytic error  calibrating"
        )
    for shape in shapes:
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                seen = one(shape, mode, given.steps, Path(folder))
            found[mode].append(seen)
            if not given.json:
                print(
                    "{:6} {:5} {:5} {:5} {:5} {:10}".format(*_order(shape)),
                    f"{mode:8} {1e3 * seen['calibrated']:7.1f} ms {1e3 * seen['measured']:6.1f} ms"
                    f"  {seen['calibrated'] / seen['measured']:.3f}  "
                    f"{'yes' if seen['inside'] else 'no':6}  {100 * seen['analytic_error']:12.0f} %"
                    f"  {seen['calibrating']:9.0f} s",
                    flush=True,
                )
    results = []
    for mode, rows in found.items():
        errors = [row["error"] for row in rows]
        analytic = [row["analytic_error"] for row in rows]
        seconds = [row["calibrating"] for row in rows]
        results += [
            result("calibrated_step_median_error", mode, statistics.median(errors), errors),
            result("calibrated_step_worst_error", mode, max(errors), errors),
            result("analytic_step_median_error", mode, statistics.median(analytic), analytic),
            result("calibration_seconds", mode, max(seconds), seconds),
        ]
    if given.json:
        print(json.dumps({"bench": "calibrated_cpu", "results": results}))
        return 0
    for line in results:
        print(f"{line['id']:30} {line['case']:9} {line['value']:.3g}")
    return 0


def _order(shape: dict[str, int]) -> list[int]:
    keys = ("n_layer", "n_head", "n_embd", "block_size")
    return [
        *(shape[f"model.{key}"] for key in keys),
        shape["train.micro_batch"],
        shape["model.vocab_size"],
    ]


if __name__ == "__main__":
    run_command(main)

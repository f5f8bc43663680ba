"""Compare the time from process start to the end of the first compiled step with nanoGPT's.

python bench/first_step.py PATH-TO-nanoGPT [--rounds 3] [--json]

Cold: the compiler's caches are empty. Warm: the same command a second time. Each program has its own cache and
evaluates a batch before the first step, as its train.py does. The shape is the documented model's at 2 x 256 tokens, in
fp32.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import ROOT, Bench, Result, ratios, result
from step_vs_nanogpt import SHAPES, SMALLEST, nanogpt_folder
from training_pair import Task

from nanogauge.errors import RunFailed


def first_step_seconds(task: Task, cache: Path) -> float:
    """Time the first step of a new process that compiles with this cache."""
    command = [sys.executable, str(ROOT / "bench" / "training_pair.py"), task.to_json()]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    begin = time.perf_counter()
    done = subprocess.run(command, input="step\n", text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise RunFailed(f"the training process failed: {done.stderr.strip().splitlines()[-1]}.")
    return time.perf_counter() - begin


def measure(args: Any) -> list[Result]:
    model, micro_batch, _ = SHAPES[SMALLEST if args.smallest else "documented-4x2x256"]
    programs = {"nanogauge": "nanogauge", "nanoGPT": str(args.nanogpt)}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "weights.pt")
            for state in ("cold", "warm"):
                for name, program in programs.items():
                    size = (model, micro_batch, 1, "float32")
                    task = Task(program, weights, *size, compile=True, evaluate=True)
                    took = first_step_seconds(task, Path(folder) / name)
                    seconds.setdefault((name, state), []).append(took)
    results = []
    for state in ("cold", "warm"):
        ours, theirs = seconds["nanogauge", state], seconds["nanoGPT", state]
        results += [
            result("first_step_ratio", state, ratios(ours, theirs), "nanoGPT, compiled"),
            result("first_step_seconds", f"{state}, nanogauge", ours, None),
            result("first_step_seconds", f"{state}, nanoGPT", theirs, None),
        ]
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("nanogpt", type=nanogpt_folder, help="folder of nanoGPT, with its model.py")
    bench.add_size("--rounds", 3, 1, "cold and warm starts of each program")
    bench.run(measure)

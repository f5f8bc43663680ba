"""Seconds from the start of the process to the end of its first compiled step, and nanoGPT's.

python bench/first_step.py PATH-TO-nanoGPT [--rounds 3] [--json]

Cold: the compiler's caches are empty. Warm: the same command again. Both programs evaluate a batch
before the first step, as their train.py do, and have each a cache of its own. The shape is the
documented model's at 2 x 256 tokens, in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from results import result  # noqa: E402
from step_vs_nanogpt import SHAPES  # noqa: E402
from training_pair import Task  # noqa: E402

from nanogauge.cli import Parser, run_command  # noqa: E402
from nanogauge.errors import BadInput  # noqa: E402


def first_step_seconds(task: Task, cache: Path) -> float:
    """Of a fresh process that compiles with this cache."""
    command = [sys.executable, str(ROOT / "bench" / "training_pair.py"), task.to_json()]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    begin = time.perf_counter()
    done = subprocess.run(
        command, input="step\n", text=True, capture_output=True, env=environment, check=False
    )
    if done.returncode:
        raise BadInput(f"the training process failed: {done.stderr.strip().splitlines()[-1]}.")
    return time.perf_counter() - begin


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("nanogpt", type=Path, help="folder of nanoGPT, with its model.py")
    parser.add_argument("--rounds", type=int, default=3, help="cold and warm starts of each")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse(arguments)
    model, micro_batch, _ = SHAPES["documented-4x2x256"]
    programs = {"nanogauge": "nanogauge", "nanoGPT": str(given.nanogpt)}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "weights.pt")
            for state in ("cold", "warm"):
                for name, program in programs.items():
                    task = Task(
                        *(program, weights, model, micro_batch, 1, "float32", True), evaluate=True
                    )
                    took = first_step_seconds(task, Path(folder) / name)
                    seconds.setdefault((name, state), []).append(took)
    results = []
    for state in ("cold", "warm"):
        ours, theirs = seconds["nanogauge", state], seconds["nanoGPT", state]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        results.append(result("first_step_ratio", state, ratios, "nanoGPT, compiled"))
        results.append(result("first_step_seconds", f"{state}, nanogauge", ours, None))
        results.append(result("first_step_seconds", f"{state}, nanoGPT", theirs, None))
    if given.json:
        print(json.dumps({"bench": "first_step", "results": results}))
    else:
        for r in results:
            print(
                f"{r['id']:20} {r['case']:20} {r['value']:.3g} ({r['low']:.3g} - {r['high']:.3g})"
            )
    return 0


if __name__ == "__main__":
    run_command(main)

"""Compare a training step with nanoGPT's on the same weights and batches.

python bench/step_vs_nanogpt.py PATH-TO-nanoGPT [--case NAME ...] [--steps 20] [--json]

Each program runs in its own process, and they step in turn. Ratios are to the preceding eager step of nanoGPT in the
same dtype. Wall time needs an idle machine; on a shared one the ratio of CPU time is steadier. Peak memory is that of
the process. matrix_product_share is the causal FLOP/s of a step (6N + 6LCT) over those of the fastest matrix product in
the same process.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import ROOT, Bench, Result, result
from training_pair import Task

from nanogauge.config import ModelSection, shape_of
from nanogauge.errors import BadInput
from nanogauge.prediction.flops import flops_per_token_causal


def sizes(layers: int, heads: int, width: int, block: int, vocabulary: int) -> dict[str, Any]:
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": block}
    return {**shape, "vocab_size": vocabulary, "bias": False, "dropout": 0.0}


SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "documented-4x2x256": (sizes(12, 12, 384, 256, 50304), 2, 4),
    "documented-8x512": (sizes(12, 12, 384, 512, 50304), 8, 1),
    "gpt2-1x512": (sizes(12, 12, 768, 512, 50304), 1, 1),
    "10m-8x256": (sizes(6, 6, 384, 256, 65), 8, 1),
}
"""model, micro-batch, gradient accumulation"""
SMALLEST = "10m-8x256"
FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "low-memory": {"low_memory": True},
    "one-pass": {"one_pass": True},
}
"""of our program: as it is, compiled, recomputing blocks, all sequences of a step in one pass"""
CASES = [f"{shape}-{dtype}-{form}" for shape in SHAPES for dtype in ("fp32", "bf16") for form in FORMS]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Trainer:
    """A training process that steps on request."""

    def __init__(self, task: Task) -> None:
        command = [sys.executable, str(ROOT / "bench" / "training_pair.py"), task.to_json()]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.answers: list[dict[str, float]] = []

    def step(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print("product", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise BadInput("a training process ended early; its output is above.")
        self.answers.append(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(path: Path, shape: str, dtype: str, forms: Sequence[str], steps: int) -> list[Result]:
    """Time nanoGPT's eager step and each of our forms in turn, after two warm-up steps."""
    model, micro_batch, grad_accum = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pt")

        def task(program: str, **form: Any) -> Task:
            size = (model, micro_batch, grad_accum, DTYPES[dtype])
            return replace(Task(program, weights, *size, compile=False), **form)

        trainers: dict[str, Trainer] = {}
        for form in forms:
            trainers[form] = Trainer(task("nanogauge", **FORMS[form]))
            trainers[form].step()  # creates the weights
        peer = trainers["nanoGPT"] = Trainer(task(str(path)))
        peer.step()
        for _ in range(steps - 1):
            for trainer in (peer, *(trainers[form] for form in forms)):
                trainer.step()
        for trainer in trainers.values():
            trainer.close()
    flops = flops_per_token_causal(shape_of(ModelSection(**model)))
    flops *= micro_batch * model["block_size"] * grad_accum
    results = []
    for form in (*forms, "nanoGPT"):
        answers, case = trainers[form].answers, f"{shape}-{dtype}-{form}"
        steady = list(zip(answers[2:], peer.answers[2:], strict=True))
        best = max(answer["product_flops"] for answer in answers)
        shares = [flops / answer["seconds"] / best for answer, _ in steady]
        results.append(result("matrix_product_share", case, shares, None))
        results.append(result("step_seconds", case, [a["seconds"] for a, _ in steady], None))
        if form == "nanoGPT":
            continue
        peak = answers[-1]["peak_bytes"] / peer.answers[-1]["peak_bytes"]
        pairs = zip(answers, peer.answers, strict=True)
        differences = [abs(a["loss"] / b["loss"] - 1) for a, b in pairs]
        for name, values in (
            ("step_time_ratio", [a["seconds"] / b["seconds"] for a, b in steady]),
            ("step_cpu_ratio", [a["cpu_seconds"] / b["cpu_seconds"] for a, b in steady]),
            ("peak_memory_ratio", [peak]),
            ("loss_difference", [max(differences)]),
        ):
            results.append(result(name, case, values, f"nanoGPT, eager, {dtype}"))
    return results


def nanogpt_folder(text: str) -> Path:
    """Return the folder of a clone of nanoGPT; raise BadInput if it holds no model.py."""
    if not (Path(text) / "model.py").exists():
        raise BadInput(f"there is no model.py in {text}; give the folder of nanoGPT.")
    return Path(text)


def run(args: Any) -> list[Result]:
    chosen = args.case or ([f"{SMALLEST}-fp32-eager"] if args.smallest else CASES)
    if unknown := set(chosen) - set(CASES):
        raise BadInput(f"there is no case {min(unknown)}; --help names them.")
    if args.steps < 3:
        raise BadInput("--steps takes a number above 2.")
    results: list[Result] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            forms = [form for form in FORMS if f"{shape}-{dtype}-{form}" in chosen]
            if forms:
                results += measure(args.nanogpt, shape, dtype, forms, args.steps)
    return results


if __name__ == "__main__":
    bench = Bench(__doc__)
    bench.add_argument("nanogpt", type=nanogpt_folder, help="folder of nanoGPT, with its model.py")
    bench.add_argument("--case", action="append", metavar="NAME", help="one of: " + ", ".join(CASES))
    bench.add_size("--steps", 20, 3, "steps of each program, two of them to warm up")
    bench.run(run)

"""Run one training process of step_vs_nanogpt.py or first_step.py: our step, or nanoGPT's.

python bench/training_pair.py '{"program": "nanogauge" or a path to nanoGPT, "weights": FILE, ...}'

Each line on stdin requests a step; the answer is a line of JSON. Both programs load the same weights, read the same
batches, and step as their own train.py does.
"""

import contextlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Task:
    """Model, batch and form of a training process."""

    program: str
    """The word nanogauge, or the path of nanoGPT."""
    weights: str
    """File of a state dict; nanogauge creates it if missing."""
    model: dict[str, Any]
    """Keys of the [model] section."""
    micro_batch: int
    grad_accum: int
    dtype: str
    compile: bool
    low_memory: bool = False
    one_pass: bool = False
    """Process all micro-batches of a step in one pass (nanogauge only)."""
    evaluate: bool = False
    """Evaluate a batch before the first step."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


if __name__ == "__main__" and json.loads(sys.argv[1])["program"] == "nanogauge":
    from trainer.step.torch_env import keep_pages

    keep_pages()  # before torch, as train.py does

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Step = Callable[[int], float]
LEARNING_RATE, CLIP = 1e-3, 1.0


def batch(task: Task, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Draw random tokens; low ids are the most frequent, as in a text."""
    random = np.random.default_rng([step, micro])
    size = (task.micro_batch, task.model["block_size"] + 1)
    tokens = torch.from_numpy((task.model["vocab_size"] * random.random(size) ** 3).astype(int))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def load(model: nn.Module, path: str) -> None:
    model.load_state_dict(torch.load(path, mmap=True, weights_only=True))


def ours(task: Task) -> Step:
    """Return the step of train.py without measurement."""
    from model import GPT
    from nanogauge.config import ModelSection, OptimizerSection
    from trainer.step.compile import compile_loss
    from trainer.step.device import autocast
    from trainer.step.loss import TrainingLoss
    from trainer.step.optimizer import make_optimizer

    device = torch.device("cpu")
    model = GPT(ModelSection(**task.model))
    if Path(task.weights).exists():
        load(model, task.weights)
    else:
        torch.save(model.state_dict(), task.weights)
    model.recompute = task.low_memory
    optimizer = make_optimizer(model, OptimizerSection(learning_rate=LEARNING_RATE, beta2=0.99))
    passes = 1 if task.one_pass else task.grad_accum
    loss_of = TrainingLoss(model, "chunked", passes, device)
    if task.compile:
        first = batch(task, 0, 0)
        failure = compile_loss(model, loss_of, *first, lambda: autocast(device, task.dtype))
        assert failure is None, failure
    elif task.evaluate:
        with torch.no_grad(), autocast(device, task.dtype):
            loss_of(*batch(task, 0, 0))

    def step(number: int) -> float:
        total = torch.zeros(())
        batches = [batch(task, number, micro) for micro in range(task.grad_accum)]
        if task.one_pass:
            tokens, targets = zip(*batches, strict=True)
            batches = [(torch.cat(tokens), torch.cat(targets))]
        for each in batches:
            with autocast(device, task.dtype):
                loss = loss_of(*each) / passes
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


def load_nanogpt(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def nanogpt(task: Task) -> Step:
    """Return the step of nanoGPT's train.py, which keeps the last logits in memory."""
    module = load_nanogpt(Path(task.program))
    with contextlib.redirect_stdout(sys.stderr):
        model = module.GPT(module.GPTConfig(**task.model))
        load(model, task.weights)
        optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.99), "cpu")
    run = torch.compile(model) if task.compile else model
    narrow = task.dtype == "bfloat16"
    context = torch.autocast("cpu", torch.bfloat16) if narrow else contextlib.nullcontext()
    if task.evaluate:
        model.eval()
        with torch.no_grad(), context:
            run(*batch(task, 0, 0))
        model.train()
    kept: list[Tensor] = []

    def step(number: int) -> float:
        total = 0.0
        for micro in range(task.grad_accum):
            with context:
                logits, loss = run(*batch(task, number, micro))
                loss = loss / task.grad_accum
            kept[:] = [logits]
            del logits
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def best_product_flops() -> float:
    """Return the FLOP/s of a large fp32 matrix product, the best of three."""
    a = torch.ones(1536, 1536)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 1536**3 / min(seconds)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    step = ours(task) if task.program == "nanogauge" else nanogpt(task)
    for number, line in enumerate(sys.stdin):
        begin, busy = time.perf_counter(), time.process_time()
        loss = step(number)
        answer = {
            "loss": loss,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - busy,
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        if line.strip() == "product":
            answer["product_flops"] = best_product_flops()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

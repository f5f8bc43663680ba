"""Two ranks that shard a small model, without a run; test_sharding.py asserts what they measure.

Each rank runs `main` with the name of the JSON file that rank 0 writes.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import trainer.step.torch_env  # noqa: F401  before torch

# isort: split
import torch
from torch import Tensor, nn

from model import GPT
from nanogauge.config import ModelSection, OptimizerSection
from trainer.step.compile import compile_loss
from trainer.step.distributed import Ranks, open_ranks
from trainer.step.fsdp import ShardedLoss, full_tensor, local_tensor
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer, update

CPU = torch.device("cpu")
SECTION = ModelSection(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=265)


def batch(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, SECTION.vocab_size, (2, SECTION.block_size), generator=generator)


def new_model(recompute: bool = False) -> GPT:
    torch.manual_seed(0)
    model = GPT(SECTION)
    model.recompute = recompute
    return model


def new_loss(model: GPT) -> ShardedLoss:
    return ShardedLoss(model, "chunked", 1, CPU, "float32")


def gradients(model: GPT) -> Tensor:
    """Return all gradients as one vector."""
    parts = [full_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.cat([part.flatten() for part in parts])


def gradients_of_one(world: int) -> Tensor:
    """Return the gradients of an unsharded model over the batches of all ranks."""
    model = new_model()
    loss = TrainingLoss(model, "plain", world, CPU, alone=False)
    for rank in range(world):
        (loss(batch(rank), batch(rank)) / world).backward()  # type: ignore[no-untyped-call]
    return gradients(model)


def gradients_after_failure(rank: int) -> tuple[str | None, Tensor]:
    """Return the error of a compilation that fails in the second block, and the gradients then."""

    def broken(forward: Any) -> Any:
        broken.blocks += 1  # type: ignore[attr-defined]
        return forward if broken.blocks == 1 else mock.Mock(side_effect=ValueError("no compiler"))  # type: ignore[attr-defined]

    broken.blocks = 0  # type: ignore[attr-defined]
    model = new_model()
    loss = new_loss(model)
    with mock.patch.object(torch, "compile", broken):
        failure = compile_loss(model, loss, batch(rank), batch(rank), contextlib.nullcontext)
    loss(batch(rank), batch(rank)).backward()  # type: ignore[no-untyped-call]
    return failure, gradients(model)


def share(tensors: Iterable[Tensor]) -> float:
    """Return the share of all elements that this rank holds."""
    held = [(local_tensor(tensor).numel(), tensor.numel()) for tensor in tensors]
    return sum(own for own, _ in held) / sum(of_all for _, of_all in held)


def update_twice(ranks: Ranks) -> dict[str, Any]:
    """Update with a gradient that is infinite on rank 1 only, then with a finite one."""
    model = new_model()
    loss = new_loss(model)
    optimizer = make_optimizer(model, OptimizerSection())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters = list(model.parameters())
    measured: dict[str, Any] = {"changed": [], "norms": []}
    for poisoned in (True, False):
        before = [full_tensor(p).detach().clone() for p in parameters]
        loss(batch(ranks.rank), batch(ranks.rank)).backward()  # type: ignore[no-untyped-call]
        if poisoned and ranks.rank == 1:
            assert parameters[0].grad is not None
            local_tensor(parameters[0].grad)[0, 0] = math.inf
        held = [p.grad for p in parameters if p.grad is not None]
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, 1.0))
        update(optimizer, scaler, torch.isfinite(norm))
        measured["norms"].append(ranks.gather(float(norm)))
        pairs = zip(parameters, before, strict=True)
        measured["changed"].append([not torch.equal(full_tensor(p), old) for p, old in pairs])
        measured["gradients"] = ranks.gather(share(held))
        optimizer.zero_grad(set_to_none=True)
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    measured["moments"] = ranks.gather(share(moments))
    with torch.no_grad():
        loss(batch(0), batch(0))
    measured["weights"] = ranks.gather(share(model.parameters()))  # after an evaluation, too
    return measured


def main(arguments: Sequence[str]) -> int:
    with open_ranks("cpu") as ranks:
        rank, one = ranks.rank, gradients_of_one(ranks.world)
        distances: dict[str, float] = {}

        def compare(name: str, other: Tensor) -> None:
            distances[name] = float((other - one).norm() / one.norm())

        for recompute, compiled in ((False, False), (True, False), (True, True)):
            model = new_model(recompute)
            loss = new_loss(model)
            if compiled:  # inductor is not the subject
                quick = partial(torch.compile, backend="aot_eager")
                with mock.patch.object(torch, "compile", quick):
                    loss.compile()
            loss(batch(rank), batch(rank)).backward()  # type: ignore[no-untyped-call]
            compare(f"recomputed {recompute}, compiled {compiled}", gradients(model))
        failure, after = gradients_after_failure(rank)
        compare("compilation failed", after)
        measured = {"distances": distances, "failure": failure, **update_twice(ranks)}
        if ranks.is_first:
            Path(arguments[0]).write_text(json.dumps(measured))
    return 0

"""Compile the loss before the first step, so that compile time is measured separately."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
import torch
from torch import Tensor, nn

from nanogauge.files import obstacle
from trainer.step.device import is_out_of_memory
from trainer.step.loss import TrainingLoss

LossFunction = Callable[[Tensor, Tensor], Tensor]
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def persist_compile_cache(needed: bool) -> None:
    """Set torch's compile cache to the user's cache folder, unless the user chose another one.

    torch's default is a temporary folder, which a reboot empties; it stays the default if the cache folder is not
    writable. Importing dynamo writes that default into the environment and makes the folder, so a chosen one that
    cannot be made is ignored unless it is `needed`.
    """
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    chosen = os.environ.get(CACHE, default)
    if not chosen.startswith(default) and (needed or obstacle(Path(chosen)) is None):
        return
    folder = platformdirs.user_cache_path("nanogauge", appauthor=False) / "compiled"
    if obstacle(folder) is None:
        os.environ[CACHE] = str(folder)
    else:
        os.environ.pop(CACHE, None)


def try_compiler(device: torch.device) -> str | None:
    """Compile a trivial function on this rank; return the error message if that fails, else None.

    Call it before all ranks compile code with collectives: a rank without a working compiler would leave the other
    ranks waiting.
    """
    try:
        torch.compile(lambda x: 2 * x)(torch.zeros(8, device=device))
    except Exception as error:
        torch._dynamo.reset()
        return _reason(error)
    return None


def compile_loss(
    model: nn.Module, loss: TrainingLoss, tokens: Tensor, targets: Tensor, autocast: Callable[[], object]
) -> str | None:
    """Compile the loss for training and evaluation, by running both once on a batch (B T each).

    Weights, gradients and random states are unchanged afterwards. If compilation fails (no C++ compiler, no Triton, a
    bug), the loss stays eager and the error message is returned.
    """
    loss.compile()
    # It would warn of an autotuning that is off: not enough SMs for max_autotune_gemm.
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)
    try:
        run_once(model, loss, loss.grad_accum, tokens, targets, autocast)
    except Exception as error:  # inductor raises many types: fall back to eager mode
        if is_out_of_memory(error):
            raise
        torch._dynamo.reset()
        loss.undo_compile()
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def run_once(
    model: nn.Module,
    loss: LossFunction,
    grad_accum: int,
    tokens: Tensor,
    targets: Tensor,
    autocast: Callable[[], object],
) -> None:
    """Run a loss once with and once without gradients, and undo all side effects.

    grad_accum: number of micro-batches per step; the loss is divided by it before backward().
    """
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            with autocast():  # type: ignore[attr-defined]
                value = loss(tokens, targets) / grad_accum
            value.backward()  # type: ignore[no-untyped-call]
            model.eval()
            with torch.no_grad(), autocast():  # type: ignore[attr-defined]
                loss(tokens, targets)
    finally:
        model.zero_grad(set_to_none=True)
        model.train()

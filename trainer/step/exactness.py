"""The same bits each time: what torch needs for it besides its seeds.

Eager training on a processor gives the same bits in every process. Compiled training does not by
itself: inductor turns the backward pass of the embedding into atomic additions of several threads,
whose order is chance. torch's deterministic algorithms put one thread there; on a processor that
costs nothing that could be measured (docs/exactness.md), so they are always on. On a GPU they are
slower and a matter of `run.deterministic`.

Sources: torch's notes on reproducibility, and of use_deterministic_algorithms.
"""

from __future__ import annotations

import hashlib
import os

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_EXACT_WORKSPACES = (":4096:8", ":16:8")


def fix_workspace() -> None:
    """Have cuBLAS take a workspace with which its sums have one order; before CUDA is begun with.

    One of the two that NVIDIA documents is kept where the environment has it.
    """
    if os.environ.get(_WORKSPACE) not in _EXACT_WORKSPACES:
        os.environ[_WORKSPACE] = _EXACT_WORKSPACES[0]


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Begin random numbers that no other rank draws, nor this one from another step on."""
    digest = hashlib.blake2b(f"{seed} {rank} {step} dropout".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def choose_algorithms(device: torch.device, deterministic: bool) -> None:
    """Deterministic kernels on a processor, and on a GPU where they are asked for.

    torch then refuses an operation that has none; the model here has no such operation.
    """
    exact = deterministic or device.type == "cpu"
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.deterministic = exact
    # Nothing here reads memory that it has not written: filling it first would cost a pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

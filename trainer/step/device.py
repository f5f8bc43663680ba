"""One loop for cuda, mps and cpu: choosing the device, its arithmetic, and waiting for it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogauge.errors import BadInput

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """The device of a configuration's run.device.

    Raises:
        BadInput: if it is asked for and not there.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there if there is not None and there.type in ("cuda", "mps") else torch.device("cpu")
    if name == "cpu" or (there is not None and there.type == name):
        return torch.device(name)
    if name == "cuda":
        raise BadInput(
            "no CUDA GPU is visible to torch; check nvidia-smi and the driver, "
            "or try the run on the processor with --run.device cpu."
        )
    raise BadInput(f"torch has no {name} device here; choose --run.device auto or cpu.")


def choose_dtype(name: str, device: torch.device) -> str:
    """The dtype of the matrix products; auto is bfloat16 where the GPU has it, else float32.

    Raises:
        BadInput: for arithmetic that this device does not have.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        raise BadInput("this GPU has no bfloat16; set --run.dtype float16 or float32.")
    if name == "float16" and device.type != "cuda":
        raise BadInput(f"float16 training needs a CUDA GPU, not {device.type}; use float32.")
    return name


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Matrix products in dtype, weights and reductions in fp32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that an allocation found no room; only CUDA has an error of its own for it.

    Source of the other words: c10/core/impl/alloc_cpu.cpp, aten/src/ATen/mps/MPSAllocator.mm.
    """
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("DefaultCPUAllocator" in text or "MPS backend out of memory" in text)
    )


def release_memory(device: torch.device) -> None:
    """Give back what the allocator keeps and nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def to_host(figures: Tensor) -> Tensor:
    """Ask for a copy in the host's memory: whole once the device has come by the next mark."""
    return figures.to("cpu", non_blocking=True)


class EventTimeline:
    """Moments as events in the device's queue, read one step late so that the queue never dries."""

    lag = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def wait(self, moment: torch.Event) -> None:
        moment.synchronize()

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class AllocatorPeaks:
    """torch's CUDA allocator, at its highest so far; None on other devices."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    inactive_bytes: int | None = None
    """reserved, free, but in pieces of blocks that are in use: what fragmentation costs"""
    retries: int | None = None
    """how often it gave back what it kept and tried again"""


def allocator_peaks(device: torch.device) -> AllocatorPeaks:
    if device.type != "cuda":
        return AllocatorPeaks()
    stats = torch.cuda.memory_stats(device)
    return AllocatorPeaks(
        allocated_bytes=stats["allocated_bytes.all.peak"],
        reserved_bytes=stats["reserved_bytes.all.peak"],
        inactive_bytes=stats["inactive_split_bytes.all.peak"],
        retries=stats["num_alloc_retries"],
    )


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

"""Common interface to cuda, mps and cpu: device, dtype, synchronisation, determinism, memory.

Eager training on a CPU is bitwise reproducible. Compiled training is not by default: inductor turns the backward pass
of the embedding into atomic additions of several threads, in random order. torch's deterministic algorithms use one
thread there, which costs nothing measurable on a CPU (docs/exactness.md), so they are always on there. On a GPU they
are slower and set by `run.deterministic`. Sources: torch's notes on reproducibility, and of
use_deterministic_algorithms.
"""

import contextlib
import gc
import hashlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from nanogauge.errors import BadInput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device that the value of run.device selects.

    Raises:
        BadInput: if a named device is absent.
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
    """Return the dtype of the matrix products; auto is bfloat16 on GPUs with it, else float32.

    Raises:
        BadInput: if the device does not support the dtype.
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
    """Return a context with matrix products in dtype, weights and reductions in fp32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # c10/core/impl/alloc_cpu.cpp
    "MPS backend out of memory",  # aten/src/ATen/mps/MPSAllocator.mm
    "CUDA error: out of memory",  # a kernel that is loaded at its first launch
    "CUDA driver error: out of memory",  # inductor's launcher
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of failed allocations that are not torch.OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the error is a failed allocation, by torch's allocator or by the driver."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)  # torch.compile's errors contain the messages of their causes
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Return the allocator's unused memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def to_host(tensor: Tensor) -> Tensor:
    """Start an asynchronous copy to host memory; synchronise with the device before reading it."""
    return tensor.to("cpu", non_blocking=True)


def reset_allocator_peaks(device: torch.device) -> None:
    """Forget the peaks so far, among them the buffers of a compiler's benchmarks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_EXACT_WORKSPACES = (":4096:8", ":16:8")


def set_cublas_workspace() -> None:
    """Select a deterministic cuBLAS workspace; call it before CUDA is initialised.

    A deterministic workspace that the environment already selects is kept.
    """
    if os.environ.get(_WORKSPACE) not in _EXACT_WORKSPACES:
        os.environ[_WORKSPACE] = _EXACT_WORKSPACES[0]


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Seed torch's random numbers with a seed that differs for each rank and step."""
    digest = hashlib.blake2b(f"{seed} {rank} {step} dropout".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def choose_algorithms(device: torch.device, deterministic: bool) -> None:
    """Select torch's deterministic kernels: always on a CPU, with run.deterministic on a GPU.

    torch then raises for operations without a deterministic kernel, which model.py does not use.
    """
    exact = deterministic or device.type == "cpu"
    torch.use_deterministic_algorithms(exact)
    torch.backends.cudnn.deterministic = exact
    # No operation reads uninitialised memory: filling it would cost a pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""What one optimizer step has to compute: all that time, memory and FLOPs are predicted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanogauge.errors import BadInput
from nanogauge.runspec import PLAIN, Program, RunSpec, Shape, Sharding

GPUS_OF_A_NODE = 8
"""of a machine: hybrid sharding is over them, and links between machines are slower"""

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Workload:
    """One optimizer step, as each of `gpus` devices sees it."""

    shape: Shape
    micro_batch: int
    """sequences of a micro-batch on one device"""
    grad_accum: int
    """micro-batches of a step on one device"""
    dtype: Dtype = "bfloat16"
    """arithmetic of the matrix products"""
    compiled: bool = True
    attention: Literal["flash", "flash3", "plain"] = "flash"
    """SDPA's fused kernel, FlashAttention 3, or T x T scores in memory"""
    dropout: float = 0.0
    checkpointing: Literal["none", "selective", "full"] = "none"
    """activations recomputed in the backward pass: none, the cheap half, or all"""
    head: Literal["plain", "chunked"] = "plain"
    """all logits at once, or training/head.py's chunks of tokens"""
    optimizer: Literal["adamw", "adamw_foreach", "muon"] = "adamw"
    """adamw is the fused one"""
    clipped: bool = True
    """gradients are scaled down to a largest norm"""
    gpus: int = 1
    sharding: Sharding = "replicated"
    """over the GPUs: DDP; DDP with the optimizer's work shared out; FSDP; FSDP within a node"""
    overlapped: bool = True
    """gradients travel while the backward pass runs"""
    program: Program = PLAIN

    @property
    def tokens(self) -> int:
        """of one micro-batch on one device"""
        return self.micro_batch * self.shape.context

    @property
    def tokens_per_step(self) -> int:
        """of all devices together"""
        return self.tokens * self.grad_accum * self.gpus

    @property
    def shards(self) -> int:
        """devices that weights and gradients are divided over"""
        if self.sharding == "full":
            return self.gpus
        return min(self.gpus, GPUS_OF_A_NODE) if self.sharding == "hybrid" else 1

    @property
    def element_bytes(self) -> int:
        """of an activation"""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


def resolve_dtype(spec: RunSpec, on_gpu: bool) -> str:
    """Return the precision of the run, bfloat16 on a GPU and float32 on a CPU where it is open."""
    return spec.dtype or ("bfloat16" if on_gpu else "float32")


def workload_of(spec: RunSpec, on_gpu: bool) -> Workload:
    """Return one optimizer step of a run as each of its devices computes it.

    Raises:
        BadInput: if the devices cannot share the micro-batches of a step equally.
    """
    gpus = spec.world_size
    if spec.grad_accum % gpus:
        raise BadInput(
            f"{gpus} GPUs cannot share {spec.grad_accum} micro-batches of a step equally; "
            f"set --train.grad-accum to a multiple of {gpus}."
        )
    resolved: dict[str, Dtype] = {
        "float32": "tf32" if on_gpu else "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
    }
    compiled, overlapped = bool(spec.compile), spec.program.overlapped
    return Workload(
        shape=spec.shape,
        micro_batch=spec.micro_batch,
        grad_accum=spec.grad_accum // gpus,
        dtype=resolved[resolve_dtype(spec, on_gpu)],
        compiled=compiled,
        attention=spec.attention,
        dropout=spec.dropout or 0.0,
        checkpointing=spec.recomputation,
        head=spec.head,
        optimizer=spec.optimizer.name,
        clipped=spec.optimizer.grad_clip != 0,
        gpus=gpus,
        sharding=spec.sharding if gpus > 1 else "replicated",
        # The backward pass of a compiled model is one operation, at whose end all gradients come.
        overlapped=(gpus == 1 or not compiled) if overlapped is None else overlapped,
        program=spec.program,
    )

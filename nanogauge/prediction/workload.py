"""One optimizer step as a device sees it: the input of the time, memory and FLOP predictions."""

from dataclasses import dataclass
from typing import Literal

from nanogauge.errors import BadInput
from nanogauge.files import package_table
from nanogauge.runspec import RunSpec
from nanogauge.spec_parts import PLAIN, Program, Shape, Sharding

GPUS_OF_A_NODE = 8
"""GPUs of one machine, over which hybrid sharding shards; links between machines are slower."""

FORMULAS: dict[str, dict[str, str]] = package_table("formulas.toml")
"""What pages say of the parts of a step's time and memory, by kind and name of the part."""

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Workload:
    """One optimizer step, as each of `gpus` devices sees it."""

    shape: Shape
    micro_batch: int
    """Sequences of a micro-batch on one device."""
    grad_accum: int
    """Micro-batches of a step on one device (gradient accumulation)."""
    dtype: Dtype = "bfloat16"
    """Precision of the matrix products."""
    compiled: bool = True
    tuned: bool = False
    """Whether activations of the MLP are fused into matrix products."""
    deterministic: bool = False
    attention: Literal["flash", "flash3", "plain"] = "flash"
    """SDPA's fused kernel, FlashAttention 3, or T x T scores in memory."""
    dropout: float = 0.0
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, the cheap half, or all."""
    head: Literal["plain", "chunked"] = "plain"
    """All logits at once, or trainer/step/chunked_cross_entropy.py's chunks of tokens."""
    optimizer: Literal["adamw", "adamw_foreach", "muon"] = "adamw"
    """adamw is the fused kernel."""
    clipped: bool = True
    """Whether gradients are clipped by norm."""
    gpus: int = 1
    sharding: Sharding = "replicated"
    """Sharding over GPUs: DDP; DDP with a sharded optimizer; FSDP; FSDP within a machine."""
    overlapped: bool = True
    """Whether the all-reduce of gradients overlaps with the backward pass."""
    program: Program = PLAIN

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.micro_batch * self.shape.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all devices together."""
        return self.tokens * self.grad_accum * self.gpus

    @property
    def shards(self) -> int:
        """Devices over which weights and gradients are sharded."""
        if self.sharding == "full":
            return self.gpus
        return min(self.gpus, GPUS_OF_A_NODE) if self.sharding == "hybrid" else 1

    @property
    def in_place(self) -> bool:
        """Whether gradients of embedding and head accumulate in place (trainer/step/loss.py)."""
        return self.head == "chunked" and self.gpus == 1 and self.dtype != "float16"

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation."""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


def resolve_dtype(spec: RunSpec, on_gpu: bool) -> str:
    """Return the spec's precision; if it is not set, bfloat16 on a GPU and float32 on a CPU."""
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
        tuned=compiled and bool(spec.tuned) and on_gpu,
        deterministic=bool(spec.deterministic),
        attention=spec.attention,
        dropout=spec.dropout or 0.0,
        checkpointing=spec.recomputation,
        head=spec.head,
        optimizer=spec.optimizer.name,
        clipped=spec.optimizer.grad_clip != 0,
        gpus=gpus,
        sharding=spec.sharding if gpus > 1 else "replicated",
        # A compiled backward pass is one operation: all gradients are ready only at its end.
        overlapped=(gpus == 1 or not compiled) if overlapped is None else overlapped,
        program=spec.program,
    )

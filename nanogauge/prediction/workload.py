"""What one optimizer step has to compute: all that time, memory and FLOPs are predicted from.

A Shape is a GPT's architecture, wider than what model.py builds, so that published runs of other
programs can be predicted with the same formulas; a Workload is a Shape and how it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanogauge.config import Config, ModelSection
from nanogauge.errors import BadInput

GPUS_OF_A_NODE = 8
"""of a machine: hybrid sharding is over them, and links between machines are slower"""

Dtype = Literal["float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    kv_heads: int
    """heads of keys and values: fewer than heads under grouped-query attention"""
    head_size: int
    mlp_width: int
    mlp_matrices: int = 2
    """2, or 3 for a gated MLP (SwiGLU)"""
    tied: bool = True
    """the vocabulary head is the embedding"""
    position_table: bool = True
    """learned positions; False for rotary ones"""
    bias: bool = False
    norm_weights: bool = True
    table_parameters: int = 0
    """look-up tables beside the embeddings (value embeddings): memory, but no FLOPs"""
    attended: float = 1.0
    """mean share of the context that is attended to; below 1 with sliding windows"""

    @property
    def query_width(self) -> int:
        """of all heads"""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """of all heads of keys, or of values"""
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class Program:
    """What a training program does that its memory depends on; the defaults are train.py's."""

    embeddings_16_bit: bool = False
    """the embedding and its tables with their gradients and moments in 16 bits"""
    fused_qkv: bool = True
    """one matrix makes queries, keys and values"""
    qk_norm: bool = False
    """queries and keys are normalised"""
    squared_relu: bool = False
    """in the MLP, and not GELU"""
    learned_scales: float = 0.0
    """in a layer, on tensors of the model's width: each keeps what it multiplies"""
    logit_softcap: bool = False
    logits_kept: bool = False
    """the loop holds the logits until the step is over, as nanoGPT's does"""
    gradients_kept: bool = False
    """zero_grad comes after the forward pass, which the last step's gradients so outlive"""
    compiled_loss: bool = True
    """where the model is compiled, the loss is too"""
    donated_buffers: bool = True
    """compiled: the backward pass overwrites what was saved for it (torch after 2.5)"""
    fp32_exchange: bool = True
    """FSDP gathers embedding and head in fp32, and exchanges gradients in it; False: in 16 bits"""


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
    master_weights: bool = True
    """weights, gradients and moments in fp32; False: all of them in 16 bits"""
    wide_residual: bool = True
    """the residual stream is fp32, as autocast leaves it; False: in 16 bits"""
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
    newton_schulz_steps: int = 5
    """of Muon"""
    muon_batched: bool = True
    """Newton-Schulz on all matrices of a shape at once, not on one after another"""
    muon_restored: bool = False
    """Muon's update can be taken back, as train.py's: copies before it, and a choice after it"""
    gpus: int = 1
    sharding: Literal["replicated", "optimizer", "full", "hybrid"] = "replicated"
    """over the GPUs: DDP; DDP with the optimizer's work shared out; FSDP; FSDP within a node"""
    fp8_products: bool = False
    """matrix products of the blocks in 8 bits, the rest in dtype"""
    sync_every_micro_step: bool = False
    """gradients averaged after every micro-batch, not once a step"""
    overlapped: bool = True
    """gradients travel while the backward pass runs"""
    program: Program = Program()

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


def shape_of(model: ModelSection) -> Shape:
    """The architecture of model.py."""
    return Shape(
        layers=model.n_layer,
        width=model.n_embd,
        heads=model.n_head,
        context=model.block_size,
        vocabulary=model.vocab_size,
        kv_heads=model.n_head,
        head_size=model.n_embd // model.n_head,
        mlp_width=4 * model.n_embd,
        tied=model.tied_head,
        position_table=model.positions == "learned",
        bias=model.bias,
        norm_weights=model.norm == "layernorm",
    )


def program_of(model: ModelSection) -> Program:
    """What model.py does beyond the products of its shape."""
    return Program(
        qk_norm=model.qk_norm,
        squared_relu=model.activation == "relu2",
        logit_softcap=model.logit_softcap > 0,
    )


def workload_of(config: Config, dtype: str, on_gpu: bool, gpus: int = 1) -> Workload:
    """What train.py does for this configuration; several GPUs share out the micro-batches.

    Raises:
        BadInput: if the GPUs cannot share the micro-batches of a step equally.
    """
    if config.train.grad_accum % gpus:
        raise BadInput(
            f"{gpus} GPUs cannot share {config.train.grad_accum} micro-batches of a step equally; "
            f"set --train.grad-accum to a multiple of {gpus}."
        )
    resolved: dict[str, Dtype] = {
        "float32": "tf32" if on_gpu else "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
    }
    return Workload(
        shape=shape_of(config.model),
        micro_batch=config.train.micro_batch,
        grad_accum=config.train.grad_accum // gpus,
        dtype=resolved[dtype],
        compiled=config.run.compile,
        dropout=config.model.dropout,
        checkpointing=config.train.checkpointing,
        head=config.train.head,
        optimizer=config.optimizer.name,
        clipped=config.optimizer.grad_clip > 0,
        muon_batched=False,
        muon_restored=True,
        gpus=gpus,
        sharding="full" if config.train.sharding == "full" and gpus > 1 else "replicated",
        # The backward pass of a compiled model is one operation, at whose end all gradients come.
        overlapped=gpus == 1 or not config.run.compile,
        program=program_of(config.model),
    )

"""Predict the peak memory by component: allocated tensors, and the whole process.

The peak is the highest of a few moments of a step, each computed from the tensors that exist then. Gradients do not
exist during a step's first backward pass unless an earlier micro-batch left them; the logits are freed before the last
gradient exists. docs/prediction.md has the derivation and the validation.
"""

from dataclasses import dataclass, replace
from typing import Literal

from nanogauge.prediction.activations import Saved, saved_for_backward
from nanogauge.prediction.flops import count_parameters, layer_matrices
from nanogauge.prediction.workload import FORMULAS, Workload
from nanogauge.quantities import Interval
from nanogauge.schema import Hardware, Part


@dataclass(frozen=True)
class TrainingState:
    weights: float
    gradients: float
    moments: float
    casts: float
    """16-bit copies of weights that exist from the forward to the backward pass"""
    buckets: float
    """gradient buckets for communication with other GPUs"""
    embedding_gradient: float
    layer_gradients: float
    """gradients of one layer's matrices"""
    layer_casts: float
    """part of `casts` that is freed with one layer's backward pass"""
    head_casts: float
    """part of `casts` that belongs to the vocabulary head"""
    gathered_layers: float
    """FSDP in fp32: gathered copies of two layers, of which one stays between the passes"""
    whole_tables: float
    """FSDP in fp32: gradients of embedding and head at the end of a backward pass, unsharded until then, with their sum
    if they are tied, else with a copy for communication"""
    optimizer_temporary: float
    weight_formula: str
    moment_formula: str
    cast_formula: str


def training_state(work: Workload) -> TrainingState:
    """Return the weights, gradients, moments and copies of one process, sharded as configured."""
    shape = work.shape
    counted = count_parameters(shape)
    master = 4 if work.program.master_weights else 2
    narrow = 0  # parameters in 16 bits although the rest is in fp32
    if work.program.embeddings_16_bit and work.program.master_weights and work.element_bytes == 2:
        narrow = counted.vocabulary + shape.table_parameters
    weights = master * counted.total - 2 * narrow
    moments = 2 * weights
    if work.optimizer == "muon":  # which has one moment, and works on the matrices of the blocks
        moments -= master * counted.block_matrices
    temporary = {
        "adamw": 0,
        "adamw_foreach": weights,  # the square roots of all second moments at once
        "muon": 2 * counted.block_matrices,  # 16-bit updates of all matrices
    }[work.optimizer]
    if work.optimizer == "muon" and not work.program.muon_batched:
        # Of one matrix: it and its moment as they were, the update in fp32, and in 16 bits what goes into an iteration,
        # what comes out, and two products as large as the smaller side.
        temporary = max(16 * a * b + 4 * min(a, b) ** 2 for a, b in layer_matrices(shape))
    layer = counted.block_matrices / shape.n_layer
    table_gradient = (2 if narrow else master) * counted.vocabulary
    shards = work.shards
    in_fp32 = shards > 1 and work.program.fp32_exchange
    head_casts = work.element_bytes * counted.vocabulary
    if in_fp32 and work.element_bytes == 4:
        head_casts = 0
    casts: float
    buckets: float
    gathered_layers = whole_tables = 0.0
    if shards == 1:
        in_16_bits = counted.vocabulary if narrow and shape.tied_head else 0
        cast = work.program.master_weights and work.element_bytes == 2
        casts = 2 * (counted.matrices - in_16_bits) if cast else 0
        buckets = weights if work.gpus > 1 else 0  # DDP's, of a copy of all gradients
    else:
        # FSDP: embedding and head stay gathered from the forward pass on; of the layers the one at work and the next.
        # Of one layer the gradients are summed up in fp32.
        tables = counted.vocabulary * (1 if shape.tied_head else 2)
        casts = work.element_bytes * (tables + 2 * layer)
        buckets = (4 + work.element_bytes) * layer
        if in_fp32:  # as train.py does it
            casts += (4 - work.element_bytes) * tables + head_casts
            gathered_layers = 2 * work.element_bytes * layer
            whole_tables = (3 if shape.tied_head else 4) * table_gradient
    per_weight = f"{master} B per parameter" + (", embeddings 2 B" if narrow else "")
    shared = f" / {shards} GPUs" if shards > 1 else ""
    return TrainingState(
        weights=weights / shards,
        gradients=weights / shards,
        moments=moments / (work.gpus if work.sharding == "optimizer" else shards),
        casts=casts,
        buckets=buckets,
        embedding_gradient=table_gradient,
        layer_gradients=master * layer / shards,
        layer_casts=2 * layer if casts and shards == 1 else 0.0,
        head_casts=head_casts if casts else 0.0,
        gathered_layers=gathered_layers,
        whole_tables=whole_tables,
        optimizer_temporary=temporary / shards,
        weight_formula=per_weight + shared,
        moment_formula=f"twice the weights{', Muon once' * (work.optimizer == 'muon')}{shared}",
        cast_formula="2 B per weight of a product" if shards == 1 else "what FSDP has gathered",
    )


Copied = Literal["never", "at the end", "in training"]
"""when the host memory holds the copy of the state that checkpoints are written from: never, from the end of training
on, or already during training"""

ALLOCATED_FACTOR = Interval(0.92, 1.0, 1.08)
"""Interval of actual over predicted peaks. Source: docs/prediction.md, 16 published peaks."""

EAGER_RESERVED = Interval(1.05, 1.20, 1.35)
SHARDED_RESERVED = Interval(1.03, 1.12, 1.35)
COMPILED_RESERVED = Interval(1.00, 1.03, 1.15)
"""Reserved over allocated bytes of the allocator. Source: torch.cuda.max_memory_reserved over max_memory_allocated of
eager runs, 1.15-1.33, median 1.23 (manavsehgal/ai-field-notes, nemo-framework-on-spark and
baseline-training-loop-on-spark); sharded 1.14 of the allocation predicted for torchtitan's Llama 3.1 8B
(benchmarks/llama3_h100_202412_torchtitan.md); compiled on one GPU the growth of a process with its micro-batch from 8
to 128 sequences, beside _broken_block (one script on ten cards)."""

CUDA_CONTEXT = Interval(0.287e9, 0.35 * 2**30, 0.667e9)
"""Driver, libraries and kernels of a process. Source: pytorch/pytorch#86509, 287,047,680 bytes with kernels loaded as
they are needed and 666,632,192 with all of them; expected 0.35 GiB, for those that a training step needs."""

CPU_LIBRARIES_BYTES = Interval(0.10e9, 0.13e9, 0.19e9)
COMPILER_BYTES = Interval(0.05e9, 0.075e9, 0.12e9)
"""Memory of torch's compiler that is loaded after Hardware.process_bytes was measured, beyond the part that the
optimizer loads anyway. Source: bench/cpu_memory.py, as for HEAP_OVER_ALLOCATED."""

HEAP_OVER_ALLOCATED = Interval(1.0, 1.05, 1.3)
"""Size of glibc's heap over the bytes of the tensors that are allocated and freed in it."""


@dataclass(frozen=True)
class Memory:
    parts: list[Part]
    """components of the expected allocated peak"""
    moment: str
    """moment of a step at which the peak occurs"""
    allocated: Interval
    """peak bytes allocated to tensors"""
    reserved: Interval
    """bytes that the allocator reserves on the device; on a CPU, the heap for tensors"""
    process: Interval
    """peak bytes of the process"""


def predict_memory(work: Workload, hardware: Hardware, copied: Copied = "never") -> Memory:
    """Predict the peak memory of training on this device; on a CPU, the process's resident memory.

    `copied` counts on a CPU only: on a GPU the copy for checkpoints is in host memory.
    """
    on_cpu = hardware.kind == "cpu"
    state, saved = training_state(work), saved_for_backward(work, on_cpu)
    moments = _moments(work, state, saved, on_cpu)
    if on_cpu and copied != "never":
        moments = _with_copy(work, state, moments, copied)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    there = moments[moment]
    if not on_cpu:
        there = there | {"cuBLAS workspaces": _workspace_bytes(work, hardware)}
    formulas = _formulas(work, state, saved, there.get("logits and loss", 0.0))
    parts = [Part(name=name, value=value, formula=formulas[name]) for name, value in there.items() if value > 0]
    memory = peak_memory(parts, moment, hardware, _reserved_over_allocated(work), _broken_block(work, state))
    return replace(memory, process=memory.process + COMPILER_BYTES) if on_cpu and work.compiled else memory


def peak_memory(parts: list[Part], moment: str, hardware: Hardware, reserving: Interval, broken: float = 0.0) -> Memory:
    """Return the memory of eager execution around tensors of these sizes."""
    on_cpu, allocated = hardware.kind == "cpu", ALLOCATED_FACTOR * sum(part.value for part in parts)
    lost = Interval(0.0, broken, ALLOCATED_FACTOR.high * broken)
    reserved = HEAP_OVER_ALLOCATED * allocated if on_cpu else reserving * allocated + lost
    outside = CPU_LIBRARIES_BYTES + (hardware.process_bytes or 0) if on_cpu else CUDA_CONTEXT
    return Memory(parts, moment, allocated, reserved, reserved + outside)


def _workspace_bytes(work: Workload, hardware: Hardware) -> float:
    """Return the workspaces of cuBLAS: one for the main thread, one for that of autograd.

    Source: chooseWorkspaceSize of torch's aten/src/ATen/cuda/CublasHandlePool.cpp, and set_cublas_workspace().
    """
    large = work.deterministic or (hardware.kind == "datacenter" and hardware.architecture in ("hopper", "blackwell"))
    return 2.0 * (8 * 4096 if large else 2 * 4096 + 8 * 16) * 1024


def _reserved_over_allocated(work: Workload) -> Interval:
    if not work.compiled:
        return EAGER_RESERVED
    return SHARDED_RESERVED if work.shards > 1 else COMPILED_RESERVED


def _broken_block(work: Workload, state: TrainingState) -> float:
    """Return the bytes that the allocator loses to fragmentation, compiled on one GPU.

    Gradients and moments are first allocated after the first backward pass, in a block that held logits. The next pass
    needs a new block, and the rest of the old one stays unused.
    """
    if not work.compiled or work.shards > 1 or work.head == "chunked":
        return 0.0
    logits = work.element_bytes * work.shape.vocabulary * work.tokens
    return max(0.0, logits - state.gradients - state.moments)


def _moments(work: Workload, state: TrainingState, saved: Saved, on_cpu: bool) -> dict[str, dict[str, float]]:
    """Return the bytes by component at each moment of a step that can be its peak."""
    accumulating = work.grad_accum > 1
    accumulated = state.gradients if accumulating else 0.0
    before = state.gradients if work.program.gradients_kept else accumulated
    chunked = work.head == "chunked"
    # Gradients of the embedding and of an untied head, which are kept between steps.
    if work.in_place:
        kept = state.embedding_gradient * (1 if work.shape.tied_head else 2)
        before, accumulated = (max(b, kept) for b in (before, accumulated))
    always = {"weights": state.weights, _moments_name(work): state.moments}
    if saved.logits_kept:
        always |= {"logits and loss": saved.logits_kept}
    exchanging = {"gradient buckets": state.buckets}
    if not state.whole_tables:
        always |= exchanging
    layers = work.shape.n_layer
    done = layers - 1  # layers, when the first is the last to go back
    # The head's are let go with its own backward pass, a chunked one's before the others; those of a recomputed layer
    # are made again with it.
    of_first_layer = state.casts - state.head_casts - done * state.layer_casts
    recomputing = work.checkpointing != "none"
    of_layers = of_first_layer if recomputing else state.casts - state.head_casts
    in_backward = always | {
        "16-bit copies": of_layers + (0 if chunked else state.head_casts),
        "activations": layers * saved.kept + saved.edges,
    }
    # Eager, a gradient is added to what an earlier micro-batch left as soon as it is made; the
    # compiled pass returns all at its end. The tied embedding's waits for both parts and their sum, which in 16 bits is
    # made in place of the first. Sharded, each layer is compiled by itself.
    added_at_once = accumulating and (not work.compiled or work.shards > 1)
    made = (2 if accumulating and not added_at_once else 1) * state.gradients
    if state.whole_tables and not accumulating:  # gradients of the tables are exchanged after that
        made -= state.embedding_gradient * (1 if work.shape.tied_head else 2) / work.shards
    if not work.shape.tied_head:
        waiting = int(added_at_once)
    elif work.compiled:
        waiting = 2
    else:
        waiting = (2 if work.element_bytes == 4 else 1) + accumulating
    embedding_gradient = 0.0 if work.in_place else state.embedding_gradient
    # So is that of every other matrix, of which the widest counts.
    beside = 0.0
    if added_at_once:
        beside = state.embedding_gradient * work.shape.mlp_width / work.shape.vocabulary
    temporaries = saved.layer_gradients + (saved.layer if recomputing else 0.0)
    # That of an untied head is added to what an earlier micro-batch left before the layers begin, but where it is
    # exchanged in fp32, at the end.
    if work.shape.tied_head or not added_at_once or state.whole_tables:
        temporaries += embedding_gradient
    moments = {
        "the vocabulary head" if chunked else "the end of the forward pass": in_backward
        | {
            "16-bit copies": state.head_casts
            if recomputing and work.compiled and work.shards == 1
            else state.casts - state.gathered_layers / 2,
            "gradients": before,
            "logits and loss": saved.logits_forward,
        },
        "the backward pass of the loss": in_backward
        | {"gradients": accumulated, "logits and loss": saved.logits_backward},
        "the backward pass of the last layer": always
        | {
            "16-bit copies": of_layers,
            "activations": in_backward["activations"] - saved.final_norm,
            "gradients": accumulated,
            "temporaries": temporaries,
        },
        "the backward pass of the first layer": always
        | {
            "16-bit copies": of_first_layer,
            "activations": saved.kept + saved.edges - saved.final_norm,
            "gradients": accumulated + (0 if added_at_once else done * state.layer_gradients),
            "temporaries": temporaries,
        },
        "the end of the backward pass": always
        | {"gradients": made, "temporaries": state.whole_tables or max(waiting * embedding_gradient, beside)},
        "the optimizer's step": always | {"gradients": state.gradients, "temporaries": state.optimizer_temporary},
    }
    if state.whole_tables:
        # A layer's gradients are exchanged when its backward pass is over; what was sent of them is held until those of
        # the layer before it are ready.
        sent = state.buckets - state.gathered_layers / 2
        moments["the backward pass of the layer before the last"] = moments["the backward pass of the last layer"] | {
            "activations": in_backward["activations"] - saved.final_norm - saved.kept,
            "gradient buckets": sent,
        }
        moments |= {
            f"the exchange of the {which} gradients": always
            | exchanging
            | {
                "16-bit copies": of_layers,
                "activations": left * saved.kept + saved.edges - saved.final_norm,
                "gradients": accumulated + (0 if added_at_once else before * state.layer_gradients),
                "temporaries": embedding_gradient,
            }
            for which, left, before in (("last layer's", done, 0), ("first layers'", 1, done))
        }
    return moments


def _with_copy(
    work: Workload, state: TrainingState, moments: dict[str, dict[str, float]], copied: Copied
) -> dict[str, dict[str, float]]:
    there = {"weights": state.weights, _moments_name(work): state.moments}
    copy = {"copy for checkpoints": work.shards * (state.weights + state.moments)}
    if copied == "in training":
        return {name: parts | copy for name, parts in moments.items()}
    return moments | {"the last checkpoint": there | copy}


def _moments_name(work: Workload) -> str:
    return "Muon and AdamW moments" if work.optimizer == "muon" else "AdamW moments"


def _formulas(work: Workload, state: TrainingState, saved: Saved, logits: float) -> dict[str, str]:
    per_unit = saved.kept / (work.tokens * work.shape.n_embd)
    formulas = FORMULAS["memory"] | {
        "weights": state.weight_formula,
        "gradients": state.weight_formula,
        _moments_name(work): state.moment_formula,
        "16-bit copies": state.cast_formula,
        "activations": f"{per_unit:.1f} B x tokens x layers x width + the final norm",
    }
    if work.head == "plain":
        per_logit = logits / (work.tokens * work.shape.vocabulary)
        formulas["logits and loss"] = f"{per_logit:g} B x tokens x vocabulary"
    return formulas

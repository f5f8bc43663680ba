"""Weights, gradients and moments in bytes on one device: what does not depend on the batch."""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.predict.parameters import count_parameters, layer_matrices
from nanogauge.predict.workload import Workload


@dataclass(frozen=True)
class TrainingState:
    weights: float
    gradients: float
    moments: float
    casts: float
    """16-bit copies of weights that are there from the forward to the backward pass"""
    buckets: float
    """gradients on their way to other GPUs"""
    embedding_gradient: float
    layer_gradients: float
    """of the matrices of one layer"""
    layer_casts: float
    """of the 16-bit copies those that are let go with one layer's backward pass"""
    head_casts: float
    """of the 16-bit copies those of the vocabulary head"""
    gathered_layers: float
    """FSDP in fp32: of the copies two layers, of which one is there between the passes"""
    whole_tables: float
    """FSDP in fp32: at the end of a backward pass, the gradients of embedding and head, which are
    whole until then, with their sum where they are tied, else with a copy to be exchanged"""
    optimizer_temporary: float
    weight_formula: str
    moment_formula: str
    cast_formula: str


def training_state(work: Workload) -> TrainingState:
    """The state of one training process, sharded where the workload says so."""
    shape = work.shape
    counted = count_parameters(shape)
    master = 4 if work.program.master_weights else 2
    narrow = 0  # parameters in 16 bits although the rest is in fp32
    if work.program.embeddings_16_bit and work.program.master_weights:
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
        # Of one matrix: it and its moment as they were, the update in fp32, and in 16 bits what
        # goes into an iteration, what comes out, and two products as large as the smaller side.
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
        # FSDP: embedding and head stay gathered from the forward pass on; of the layers the one at
        # work and the next. Of one layer the gradients are summed up in fp32.
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

"""Parameters of a GPT, and FLOPs of a training token by operation and by the named conventions.

A multiply-add counts as two. Sources: Kaplan et al. 2020 (6N); Chowdhery et al. 2022, PaLM, appendix B (6N + 12LCT);
Dao et al. 2022, FlashAttention, appendix B (recomputation).
"""

from dataclasses import dataclass
from functools import cache

from nanogauge.spec_parts import Shape


@dataclass(frozen=True)
class Parameters:
    block_matrices: int
    """Weights of the matrix products of all blocks."""
    vocabulary: int
    """The embedding, or the vocabulary head: V x C."""
    tied: bool
    vectors: int
    """Norms and biases."""
    tables: int
    """Position and other tables that are looked up, not multiplied."""

    @property
    def matrices(self) -> int:
        """Weights of all matrix products, the vocabulary head once."""
        return self.block_matrices + self.vocabulary

    @property
    def without_positions(self) -> int:
        """N in 6N as nanoGPT counts it; an untied embedding is excluded, being a look-up only."""
        return self.matrices + self.vectors

    @property
    def total(self) -> int:
        return self.matrices + self.vectors + (0 if self.tied else self.vocabulary) + self.tables


def layer_matrices(shape: Shape) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a block's matrices; those that share their input count as one."""
    return [
        (shape.n_embd, shape.query_width + 2 * shape.key_width),
        (shape.query_width, shape.n_embd),
        (shape.n_embd, (shape.mlp_matrices - 1) * shape.mlp_width),
        (shape.mlp_width, shape.n_embd),
    ]


@cache
def count_parameters(shape: Shape) -> Parameters:
    """Count the parameters: in model.py L blocks of 12 C^2 and V x C.

    12 C^2 is 3 for queries, keys and values, 1 for the projection and 8 for the MLP. In general a block has C x D x (2
    H + 2 H_kv) of attention and 2 or 3 C x F of MLP.
    """
    width, layers, mlp = shape.n_embd, shape.n_layer, shape.mlp_width
    norms = (2 * layers + 1) * width if shape.norm_weights else 0
    biases = 0
    if shape.bias:
        of_attention = shape.query_width + 2 * shape.key_width + width
        of_mlp = (shape.mlp_matrices - 1) * mlp + width
        biases = norms + layers * (of_attention + of_mlp)
    positions = shape.context * width if shape.position_table else 0
    return Parameters(
        block_matrices=layers * sum(a * b for a, b in layer_matrices(shape)),
        vocabulary=shape.vocabulary * width,
        tied=shape.tied_head,
        vectors=norms + biases + shape.vector_parameters,
        tables=positions + shape.table_parameters,
    )


@dataclass(frozen=True)
class Operation:
    """One kind of matrix product; FLOPs per token, attention as if it were not causal."""

    name: str
    forward: int
    backward: int
    recomputed: int = 0
    """FLOPs that a fused kernel recomputes in the backward pass."""
    causal: float = 1.0
    """Share of the FLOPs that causal attention needs."""


def operations(shape: Shape) -> list[Operation]:
    """Return every matrix product of the model; each has two in the backward pass.

    The sum of forward and backward equals torch's FlopCounterMode with plain attention.
    """
    width, layers, mlp = shape.n_embd, shape.n_layer, shape.mlp_width
    queries = shape.query_width
    forward = {
        "query, key, value": layers * 2 * width * (queries + 2 * shape.key_width),
        "attention": layers * 2 * 2 * shape.context * queries,
        "attention projection": layers * 2 * queries * width,
        "MLP": layers * 2 * shape.mlp_matrices * width * mlp,
        "vocabulary head": 2 * shape.vocabulary * width,
    }
    return [
        Operation(
            name,
            flops,
            2 * flops,
            recomputed=flops // 2 if name == "attention" else 0,  # the scores, of two products
            causal=0.5 if name == "attention" else 1.0,
        )
        for name, flops in forward.items()
    ]


def flops_per_token_6n(shape: Shape) -> int:
    """Return 6N, with N the parameters without position embeddings, norms included."""
    products = sum(o.forward + o.backward for o in operations(shape) if o.name != "attention")
    return products + 6 * count_parameters(shape).vectors


def flops_per_token_palm(shape: Shape) -> int:
    """Return 6N + 12 LCT: PaLM's count, with attention over the full context T."""
    attention = (o.forward + o.backward for o in operations(shape) if o.name == "attention")
    return flops_per_token_6n(shape) + sum(attention)


def flops_per_token_causal(shape: Shape) -> float:
    """Return 6N + 6 LCT: with causal attention only."""
    return flops_per_token_6n(shape) + sum(
        o.causal * (o.forward + o.backward) for o in operations(shape) if o.name == "attention"
    )


def flops_per_token_executed(shape: Shape) -> float:
    """Return 6N + 7 LCT: what flash attention executes, recomputed scores included."""
    return flops_per_token_6n(shape) + sum(
        o.causal * (o.forward + o.backward + o.recomputed) for o in operations(shape) if o.name == "attention"
    )


MFU_CONVENTIONS = {"mfu_palm": flops_per_token_palm, "mfu_6n": flops_per_token_6n}
"""Row id of an MFU -> its FLOPs per token."""

"""Parameters of a GPT, by formula; a test compares them with model.py."""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.runspec import Shape


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
        """N of 6N, as nanoGPT reports it; an untied embedding is looked up, not multiplied."""
        return self.matrices + self.vectors

    @property
    def total(self) -> int:
        untied = 0 if self.tied else self.vocabulary
        return self.matrices + self.vectors + untied + self.tables


def layer_matrices(shape: Shape) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a block's matrices; those that share their input count as one."""
    return [
        (shape.n_embd, shape.query_width + 2 * shape.key_width),
        (shape.query_width, shape.n_embd),
        (shape.n_embd, (shape.mlp_matrices - 1) * shape.mlp_width),
        (shape.mlp_width, shape.n_embd),
    ]


def count_parameters(shape: Shape) -> Parameters:
    """Count the parameters: in model.py L blocks of 12 C^2 and V x C.

    12 C^2 is 3 for queries, keys and values, 1 for the projection and 8 for the MLP. In general a
    block has C x D x (2 H + 2 H_kv) of attention and 2 or 3 C x F of MLP.
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
        vectors=norms + biases,
        tables=positions + shape.table_parameters,
    )

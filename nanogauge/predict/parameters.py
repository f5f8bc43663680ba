"""Parameters of the GPT in model.py, counted by formula; a test holds them against the model."""

from __future__ import annotations

from dataclasses import dataclass

from nanogauge.config import ModelSection


@dataclass(frozen=True)
class Parameters:
    matrices: int
    """weights of all matrix products, the tied vocabulary head once"""
    vectors: int
    """norms and biases"""
    positions: int
    """position embeddings: a look-up, no matrix product"""

    @property
    def without_positions(self) -> int:
        """The N of 6N, as nanoGPT reports it."""
        return self.matrices + self.vectors

    @property
    def total(self) -> int:
        return self.matrices + self.vectors + self.positions


def count_parameters(model: ModelSection) -> Parameters:
    """L blocks of 12 C^2 (3 query-key-value, 1 projection, 8 MLP) and V x C of the tied head."""
    width, layers = model.n_embd, model.n_layer
    norms = (2 * layers + 1) * width
    biases = norms + layers * (3 + 1 + 4 + 1) * width if model.bias else 0
    return Parameters(
        matrices=layers * 12 * width**2 + model.vocab_size * width,
        vectors=norms + biases,
        positions=model.block_size * width,
    )

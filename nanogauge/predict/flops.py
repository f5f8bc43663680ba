"""FLOPs of one training token, by operation, and the named conventions derived from them.

A multiply-add counts as two. Attention is counted in full, as if it were not causal, and nothing
is counted that is computed twice: so PaLM, nanoGPT, nanochat and torchtitan do it.
Sources: Kaplan et al. 2020 (6N); Chowdhery et al. 2022, PaLM, appendix B (6N + 12LCT).
"""

from __future__ import annotations

from nanogauge.config import ModelSection
from nanogauge.predict.parameters import count_parameters


def forward_flops_per_token(model: ModelSection) -> dict[str, int]:
    """Matrix-product FLOPs of one token's forward pass, by operation; the backward pass is twice.

    Three times the sum equals what torch's FlopCounterMode counts for a forward and backward pass.
    """
    width, layers, context = model.n_embd, model.n_layer, model.block_size
    return {
        "query, key, value": layers * 2 * 3 * width**2,
        "attention": layers * 2 * 2 * context * width,
        "attention projection": layers * 2 * width**2,
        "MLP": layers * 2 * 8 * width**2,
        "vocabulary head": 2 * model.vocab_size * width,
    }


def flops_per_token_6n(model: ModelSection) -> int:
    """6 FLOPs per parameter and token; N without position embeddings."""
    return 6 * count_parameters(model).without_positions


def flops_per_token_palm(model: ModelSection) -> int:
    """6N + 12 LCT: with attention over the full context T."""
    return flops_per_token_6n(model) + 12 * model.n_layer * model.n_embd * model.block_size

"""What is known of programs whose runs were published, and no table says: read in their code.

Memory depends on it: which tensors are in 16 bits, who holds the logits, when gradients go.
"""

from __future__ import annotations

import re

from nanogauge.runspec import Program

_NANOCHAT = Program(embeddings_16_bit=True, fused_qkv=False, qk_norm=True, logit_softcap=15.0)
_PROGRAMS = (
    # karpathy/nanochat, nanochat/gpt.py; karpathy/autoresearch has the same model.
    (r"nanochat|autoresearch", _NANOCHAT),
    # openai/parameter-golf, train_gpt.py: on attention, its queries, MLP and residual stream in
    # each of 9 layers, and on 4 skips between them, learned scales: 4 + 4/9 a layer.
    (
        r"parameter-golf",
        Program(
            embeddings_16_bit=True,
            fused_qkv=False,
            qk_norm=True,
            logit_softcap=15.0,
            learned_scales=4 + 4 / 9,
        ),
    ),
    # pytorch/torchtitan at the end of 2024 compiled block by block, and not the loss.
    (r"torchtitan", Program(fused_qkv=False, compiled_loss=False)),
    # manavsehgal/ai-field-notes, vanilla_train.py and sweep.py.
    (r"ai-field-notes", Program(logits_kept=True, gradients_kept=True)),
    # torch 2.5 has no donated buffers. karpathy/nanoGPT's train.py: `logits, loss = model(X, Y)`.
    (r"torch 2\.[0-5]\b", Program(donated_buffers=False)),
    (r"nanogpt|jekyll-ai-blog", Program(logits_kept=True)),
)


def published_program(notes: str) -> Program:
    """The program that a run's notes name; train.py's habits where none is known."""
    for pattern, program in _PROGRAMS:
        if re.search(pattern, notes, re.IGNORECASE):
            return program
    return Program()

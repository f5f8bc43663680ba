"""GPT-2 as nanoGPT defines it: pre-norm blocks, GELU, learned positions, tied embeddings.

Shapes in comments: B sequences, T positions, C width, H heads, D = C / H, V vocabulary.
Parameter names are those of GPT-2's published weights, so that state dicts can be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogauge.config import ModelSection


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        q, k, v = heads  # B H T D each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


def through(blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor, recompute: bool) -> Tensor:
    """The blocks one after the other; recompute keeps only what is between them (B T C each).

    The backward pass then computes a block's forward pass again: a third more work in the blocks.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


class GPT(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """whether the backward pass computes what is within the blocks again, and keeps nothing"""
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight  # tied
        self._initialise()

    @property
    def embedding(self) -> nn.Embedding:
        wte = self.transformer["wte"]
        assert isinstance(wte, nn.Embedding)
        return wte

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled down.

        Source: Radford et al. 2019, section 2.3: residual weights by 1/sqrt(number of residual
        layers), which are two a block.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The final hidden states, B T C, of token ids, B T."""
        return self.trunk(self.embedding(tokens))

    def trunk(
        self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor:
        """The final hidden states, B T C, of the tokens' embeddings, B T C.

        blocks: what runs in the place of the model's own, such as these compiled.
        """
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.transformer["drop"](x + self.transformer["wpe"](positions))
        x = through(self.blocks if blocks is None else blocks, x, self.recompute)
        return self.transformer["ln_f"](x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of predicting targets (B T) from tokens (B T)."""
        logits = self.lm_head(self.hidden(tokens))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Continue token ids (1 T) by `count` sampled ones; returns 1 (T + count).

        Each token runs the whole context again. Call it in eval mode; generator lives on the CPU.
        """
        for _ in range(count):
            context = tokens[:, -self.config.block_size :]
            logits = self.lm_head(self.hidden(context)[:, -1]) / temperature
            probabilities = F.softmax(logits.float(), dim=-1).cpu()
            chosen = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, chosen.to(tokens.device)], dim=1)
        return tokens

"""GPT-2 as in nanoGPT: pre-norm blocks, GELU, learned positions, tied embeddings.

Shapes in comments: B sequences, T positions, C width, H heads, D = C / H, V vocabulary. Parameter names are those of
GPT-2's published weights, so that state dicts can be exchanged.

Options that change the architecture, with their sources:

- positions = "rotary": Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864
- norm = "rmsnorm": Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, without weights as in
  OLMo (Groeneveld et al. 2024, https://arxiv.org/abs/2402.00838)
- qk_norm: Henry et al. 2020, https://arxiv.org/abs/2010.04245, here by the root mean square
- activation = "relu2": So et al. 2021, Primer, https://arxiv.org/abs/2109.08668
- tied_head = false: Press and Wolf 2017, https://arxiv.org/abs/1608.05859, have both forms
- zero_init: Zhang et al. 2019, Fixup, https://arxiv.org/abs/1901.09321; of the head: Yang et al.
  2022, Tensor Programs V, appendix D.2, https://arxiv.org/abs/2203.03466
- logit_softcap: Gemma Team 2024, Gemma 2, https://arxiv.org/abs/2408.00118
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogauge.config import ModelSection

NORM_EPSILON = 1e-5


def make_norm(config: ModelSection) -> nn.Module:
    """Return LayerNorm or RMSNorm over the model's width."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=NORM_EPSILON, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap), which bounds them by cap; unchanged if cap is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Rotary(nn.Module):
    """Rotary position embedding: rotates pairs of values by angles proportional to the position.

    Pair i of D / 2 is rotated by t / 10000^(2 i / D) at position t, so that the product of query and key depends on
    their distance. The tables, T x D / 2 each, are not parameters.
    """

    def __init__(self, positions: int, size: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor, begin: int) -> Tensor:
        """Rotate x (B H T D), whose first position is `begin`."""
        assert isinstance(self.cosines, Tensor) and isinstance(self.sines, Tensor)
        end = begin + x.shape[-2]
        cosines, sines = self.cosines[begin:end].to(x.dtype), self.sines[begin:end].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosines - b * sines, a * sines + b * cosines], dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        self.rotary: Rotary | None = None
        if config.positions == "rotary":
            self.rotary = Rotary(config.block_size, config.n_embd // config.n_head)

    def prepared(self, x: Tensor, begin: int = 0) -> Tensor:
        """Apply QK norm and rotary embedding, if configured, to queries or keys (B H T D).

        `begin` is the position in the sequence of x[:, :, 0].
        """
        if self.qk_norm:
            x = F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)
        return x if self.rotary is None else self.rotary(x, begin)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        q, k, v = heads  # B H T D each
        q, k = self.prepared(q), self.prepared(k)
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
        self.squared = config.activation == "relu2"
        self.gelu = "none" if config.gelu == "exact" else config.gelu

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x).square() if self.squared else F.gelu(x, approximate=self.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


def through(blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor, recompute: bool) -> Tensor:
    """Apply the blocks in order; with `recompute`, store only block inputs (B T C each).

    The backward pass then repeats each block's forward pass: a third more FLOPs in the blocks.
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return x


class GPT(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether blocks use activation checkpointing."""
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.positions == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.embedding.weight
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
        """Initialise as GPT-2: N(0, 0.02), projections into the residual stream scaled down.

        Source: Radford et al. 2019, section 2.3: by 1/sqrt(number of residual layers), two per block. With zero_init
        these projections and an untied head are zero.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        zero = ("bias", "c_proj.weight", "lm_head.weight") if self.config.zero_init else ("bias",)
        for name, parameter in self.named_parameters():
            if name.endswith(zero):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the final hidden states, B T C, of token ids, B T."""
        return self.trunk(self.embedding(tokens))

    def trunk(self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return the final hidden states, B T C, of token embeddings, B T C.

        blocks: blocks to run instead of the model's own, for example compiled ones.
        """
        if "wpe" in self.transformer:
            x = x + self.transformer["wpe"](torch.arange(x.shape[1], device=x.device))
        x = self.transformer["drop"](x)
        x = through(self.blocks if blocks is None else blocks, x, self.recompute)
        return self.transformer["ln_f"](x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits, ... V, of final hidden states, ... C."""
        return softcap(self.lm_head(hidden), self.config.logit_softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of targets (B T) predicted from tokens (B T)."""
        logits = self.logits(self.hidden(tokens))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

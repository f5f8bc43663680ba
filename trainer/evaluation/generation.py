"""Text generation with a key-value cache.

Positions are absolute and learned ones end with the context, so a full context cannot shift by one token: its newer
half is recomputed from position 0. In a text longer than the context, the next token sees between half a context and a
whole one.

Shapes in comments: T positions, C width, H heads, D = C / H, S positions of a block, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, Block, softcap
from trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """How to sample the next token."""

    temperature: float = 0.8
    """0 takes the most likely token; 1 samples from the model's distribution."""
    top_k: int | None = None
    """Sample from the k most likely tokens; None for all."""
    top_p: float | None = None
    """Sample from the most likely tokens with this total probability, after temperature; None for all. Source: Holtzman
    et al., The Curious Case of Neural Text Degeneration (2020)."""

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Sample a token from its logits (V) on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = None
        if self.top_k is not None and self.top_k < len(logits):
            logits, order = torch.topk(logits, self.top_k)
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p is not None:
            if order is None:
                probabilities, order = probabilities.sort(descending=True)
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.where(before < self.top_p, 0.0)
        chosen = int(torch.multinomial(probabilities, 1, generator=generator))
        return chosen if order is None else int(order[chosen])


SMALL_WIDTH = 256
"""Model width up to which generation is faster on one CPU thread than on several."""
Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer or norm."""
Norm = Callable[[Tensor], Tensor]


class _Weights:
    """The weights of a block, collected once, as module look-ups take as long as the arithmetic."""

    def __init__(self, block: Block) -> None:
        self.ln_1, self.ln_2 = _norm(block.ln_1), _norm(block.ln_2)
        self.c_attn, self.attn_proj = _affine(block.attn.c_attn), _affine(block.attn.c_proj)
        self.c_fc, self.mlp_proj = _affine(block.mlp.c_fc), _affine(block.mlp.c_proj)
        self.activate = block.mlp.activate
        attention = block.attn
        plain = attention.rotary is None and not attention.qk_norm
        self.prepared = None if plain else attention.prepared


def _affine(module: nn.Linear) -> Affine:
    return module.weight, module.bias


def _norm(module: nn.Module) -> Norm:
    if isinstance(module, nn.RMSNorm):
        return partial(torch.rms_norm, normalized_shape=module.normalized_shape, eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return partial(
        torch.layer_norm,
        normalized_shape=module.normalized_shape,
        weight=module.weight,
        bias=module.bias,
        eps=module.eps,
    )


class Context:
    """A growing sequence with its key-value cache.

    One position is so little work that calling modules would double its time: their weights are used directly.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        self._blocks = [_Weights(block) for block in model.blocks if isinstance(block, Block)]
        self._ln_f, self._head = _norm(model.transformer["ln_f"]), model.lm_head.weight
        self._cap, self._embedding = config.logit_softcap, model.embedding.weight
        self._positions: Tensor | None = None
        if config.positions == "learned":
            table = model.transformer["wpe"]
            assert isinstance(table, nn.Embedding)
            self._positions = table.weight
        self._block_size, self._n_head = config.block_size, config.n_head
        self._small = config.n_embd <= SMALL_WIDTH
        width = config.n_embd // config.n_head
        shape = config.n_layer, 2, config.n_head, config.block_size, width
        self._keys_values = self._embedding.new_empty(shape).unbind()
        self._seen: list[int] = []
        """Tokens in the cache, from position 0 on."""

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens, several only in the first call; return the next logits (V, fp32, CPU)."""
        assert len(tokens) == 1 or not self._seen
        if len(self._seen) + len(tokens) > self._block_size:
            room = self._block_size // 2 if self._seen else self._block_size
            tokens = [*self._seen, *tokens][-max(room, 1) :]
            self._seen = []
        threads = torch.get_num_threads()
        if self._small:
            torch.set_num_threads(1)
        try:
            logits = softcap(F.linear(self._run(tokens), self._head), self._cap)
        finally:
            torch.set_num_threads(threads)
        self._seen += tokens
        return logits.float().cpu()

    def _run(self, tokens: Sequence[int]) -> Tensor:
        """Run `tokens` through the model; return the final hidden state (C) of the last one."""
        begin, count = len(self._seen), len(tokens)
        end = begin + count
        x = self._embedding[torch.tensor(tokens, device=self._embedding.device)]
        if self._positions is not None:
            x = x + self._positions[begin:end]
        for block, keys_values in zip(self._blocks, self._keys_values, strict=True):
            made = F.linear(block.ln_1(x), *block.c_attn)
            made = made.view(count, 3, self._n_head, -1).permute(1, 2, 0, 3)  # 3 H T D
            keys_values.narrow(2, begin, count).copy_(made[1:])
            queries, past = made[:1], keys_values.narrow(2, 0, end)
            if block.prepared is not None:
                queries = block.prepared(queries, begin)
                past[:1, :, begin:] = block.prepared(made[1:2], begin)
            y = F.scaled_dot_product_attention(queries, past[:1], past[1:], is_causal=begin == 0)
            x = x + F.linear(y.transpose(1, 2).reshape(count, -1), *block.attn_proj)
            inner = F.linear(block.ln_2(x), *block.c_fc)
            x = x + F.linear(block.activate(inner), *block.mlp_proj)
        return self._ln_f(x[-1])


def generate(
    model: GPT, prompt: Sequence[int], count: int, choice: Choice, generator: torch.Generator, end: int | None = None
) -> Iterator[int]:
    """Yield up to `count` generated tokens after a prompt of at least one token, without dropout.

    Ends early at the end-of-text token, or if the logits are non-finite.

    Args:
        model: model to sample from.
        prompt: tokens of the prompt.
        count: maximum number of tokens to generate.
        choice: sampling options.
        generator: CPU generator, so that a seed gives the same random numbers on every device. end: the end-of-text
        token, which is not returned; None continues after it.
    """
    context, tokens = Context(model), prompt
    for _ in range(count):
        logits = context.next_logits(tokens)
        if not math.isfinite(float(logits.max())):
            return  # the weights have diverged
        chosen = choice.draw(logits, generator)
        if chosen == end:
            return
        yield chosen
        tokens = [chosen]


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """Return the text of a prompt and up to `count` generated tokens; "" begins a document."""
    generator = torch.Generator().manual_seed(seed)
    begin, end = tokenizer.prompt(prompt), tokenizer.end_of_text
    return prompt + tokenizer.decode(list(generate(model, begin, count, Choice(), generator, end)))


SHOWN_TOKENS = 8
"""Tokens that are decoded again with each new one, as a character may take several."""


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Yield the text that each token completes ("" within a character) and its token count."""
    last: list[int] = []
    shown = text = ""
    for token in tokens:
        last.append(token)
        text = tokenizer.decode(last)
        if text.endswith("\ufffd"):
            yield "", 1
            continue
        yield text[len(shown) :], 1
        last = last[-SHOWN_TOKENS:]
        shown = text = tokenizer.decode(last)
    yield text[len(shown) :], 0

"""Text from a model, a token at a time: what the blocks made of the past is kept, not made again.

Positions are absolute, and where they are learned there are no more than a block has, so a full
context is not moved on by one: then the newer half of it is run again from position 0, and goes on
from there. Once a text is longer than a block, the next token sees between half a block and a whole
block of what comes before it.

Shapes in comments: T positions, C width, H heads, D = C / H, S positions of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import tiktoken
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, Block, softcap


@dataclass(frozen=True)
class Choice:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest; 1 draws as the model has it; less prefers what is likely anyway"""
    top_k: int | None = None
    """draw from so many of the likeliest alone"""
    top_p: float | None = None
    """draw from the likeliest alone that have this much of the probability together, after
    temperature: Holtzman et al., The Curious Case of Neural Text Degeneration (2020)"""

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token by its logits (V) on the CPU."""
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
"""up to this, threads of a processor wait for each other longer than they would work"""
Affine = tuple[Tensor, Tensor | None]
"""weight and bias"""
Norm = Callable[[Tensor], Tensor]


class _Weights:
    """Those of a block, looked up once: asking modules for them takes as long as using them."""

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
    """A sequence that grows, and what comes next.

    A single position is so little work that calling the modules would take as long again, so their
    weights are used here as they use them.
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
        """the tokens whose keys and values are kept, from position 0 on"""

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Append a token, or begin with several; the logits (V, fp32, on the CPU) of the next."""
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
        """The final state, C, of the last of these tokens, which follow those that were seen."""
        begin, count = len(self._seen), len(tokens)
        end = begin + count
        ids = torch.tensor(tokens, device=self._embedding.device)
        x = self._embedding[ids]
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
    model: GPT,
    prompt: Sequence[int],
    count: int,
    choice: Choice,
    generator: torch.Generator,
    end: int | None = None,
) -> Iterator[int]:
    """Tokens that go on from a prompt of at least one: `count`, or fewer where the text ends.

    A model whose logits are not finite, as one that has diverged, ends it too.

    Dropout has no part in it, whatever the model's mode.

    Args:
        generator: on the CPU, so that a seed draws alike on every device.
        end: the token that ends a text, which is not returned; None goes on behind it.
    """
    context, tokens = Context(model), prompt
    for _ in range(count):
        logits = context.next_logits(tokens)
        if not math.isfinite(float(logits.max())):
            return  # weights that have diverged say nothing
        chosen = choice.draw(logits, generator)
        if chosen == end:
            return
        yield chosen
        tokens = [chosen]


def is_sample_due(step: int, every: int, max_steps: int) -> bool:
    """Whether this evaluation, one of every so many steps, is the first of a quarter of the run."""
    quarter = 4 * step // max_steps
    return step > 0 and quarter > 4 * max(0, (step - 1) // every * every) // max_steps


def sample_text(model: GPT, encoding: tiktoken.Encoding, prompt: str, count: int, seed: int) -> str:
    """A prompt and up to `count` tokens after it, as far as the model goes on with that text.

    Without a prompt the text begins a document.
    """
    begin = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    generator = torch.Generator().manual_seed(seed)
    made = generate(model, begin, count, Choice(), generator, encoding.eot_token)
    return prompt + encoding.decode(list(text_tokens(made, encoding)), errors="replace")


def text_tokens(tokens: Iterable[int], encoding: tiktoken.Encoding) -> Iterator[int]:
    """Those that stand for text: rows that pad the embedding have no text, and may be drawn."""
    return (token for token in tokens if token < encoding.n_vocab)

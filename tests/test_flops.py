"""Parameters and FLOPs by formula equal those of the model."""

import pytest
import torch
from examples import beyond_gpt2, documented_config, documented_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from nanogauge.config import ModelSection, shape_of
from nanogauge.prediction.flops import (
    count_parameters,
    flops_per_token_6n,
    flops_per_token_causal,
    flops_per_token_executed,
    flops_per_token_palm,
    operations,
)
from nanogauge.spec_parts import Shape

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def small_models(draw: st.DrawFn) -> ModelSection:
    heads = draw(st.integers(1, 4))
    return ModelSection(
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_embd=heads * draw(st.sampled_from([4, 8, 12])),
        block_size=draw(st.integers(1, 24)),
        vocab_size=draw(st.integers(2, 80)),
        bias=draw(st.booleans()),
        dropout=0.0,
        **draw(beyond_gpt2()),
    )


GPT2_LIKE = ModelSection(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=200, bias=True)


@settings(max_examples=12, deadline=None)
@given(model=small_models(), sequences=st.integers(1, 3))
@example(model=GPT2_LIKE, sequences=2)
def test_operations_have_the_flops_that_torch_counts(model: ModelSection, sequences: int) -> None:
    """torch counts no FLOPs of fused attention on a CPU, so attention is unfused here."""
    gpt = GPT(model)
    tokens = torch.zeros(sequences, model.block_size, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        gpt(tokens, tokens).backward()
    per_token = sum(o.forward + o.backward for o in operations(shape_of(model)))
    assert counter.get_total_flops() == per_token * tokens.numel()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draw architectures that model.py does not build: grouped heads, gated MLPs, untied heads."""
    kv_heads = draw(st.integers(1, 3))
    return Shape(
        n_layer=draw(st.integers(1, 3)),
        n_embd=draw(st.sampled_from([8, 24, 40])),
        n_head=kv_heads * draw(st.integers(1, 3)),
        context=draw(st.integers(1, 16)),
        vocabulary=draw(st.integers(2, 50)),
        n_kv_head=kv_heads,
        head_size=draw(st.sampled_from([4, 8])),
        mlp_width=draw(st.integers(1, 50)),
        mlp_matrices=draw(st.sampled_from([2, 3])),
        tied_head=draw(st.booleans()),
        position_table=False,
    )


@settings(max_examples=20, deadline=None)
@given(shapes())
def test_other_architectures_have_the_flops_that_torch_counts(shape: Shape) -> None:
    queries, keys = shape.n_head * shape.head_size, shape.n_kv_head * shape.head_size
    up = (shape.mlp_matrices - 1) * shape.mlp_width

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.ones(rows, columns, requires_grad=True)

    counter = FlopCounterMode(display=False)
    x = matrix(shape.context, shape.n_embd)  # one sequence
    head = matrix(shape.n_embd, shape.vocabulary)
    weights = count_parameters(shape).block_matrices
    counted = 0
    with counter:
        for _ in range(shape.n_layer):
            into, out = matrix(shape.n_embd, queries + 2 * keys), matrix(queries, shape.n_embd)
            wide, narrow = matrix(shape.n_embd, up), matrix(shape.mlp_width, shape.n_embd)
            counted += sum(m.numel() for m in (into, out, wide, narrow))
            parts = (x @ into).view(shape.context, -1, shape.head_size).transpose(0, 1)
            q, k, v = parts.split([shape.n_head, shape.n_kv_head, shape.n_kv_head])
            k, v = (t.repeat_interleave(shape.n_head // shape.n_kv_head, 0) for t in (k, v))
            attended = (torch.bmm(q, k.transpose(1, 2)) @ v).transpose(0, 1)
            x = attended.reshape(shape.context, queries) @ out
            x = (x @ wide)[:, : shape.mlp_width] @ narrow
        (x @ head).sum().backward()  # type: ignore[no-untyped-call]
    assert counted == weights
    per_token = sum(o.forward + o.backward for o in operations(shape))
    assert counter.get_total_flops() == per_token * shape.context


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_the_named_conventions_come_from_one_table(shape: Shape) -> None:
    full = 12 * shape.n_layer * shape.n_head * shape.head_size * shape.context
    base = flops_per_token_6n(shape)
    assert base == 6 * count_parameters(shape).without_positions
    assert flops_per_token_palm(shape) == base + full
    assert flops_per_token_causal(shape) == base + full / 2
    assert flops_per_token_executed(shape) == base + full / 2 * 7 / 6


@settings(max_examples=30, deadline=None)
@given(small_models())
@example(documented_config().model)
def test_the_parameter_count_is_that_of_the_model(model: ModelSection) -> None:
    with torch.device("meta"):
        gpt = GPT(model)
    counted = count_parameters(shape_of(model))
    assert counted.total == sum(p.numel() for p in gpt.parameters())
    learned = model.positions == "learned"
    assert counted.tables == (gpt.transformer["wpe"].weight.numel() if learned else 0)
    embedding_in_place = 0 if model.tied_head else gpt.embedding.weight.numel()
    assert counted.without_positions == counted.total - counted.tables - embedding_in_place


def test_the_documented_run_has_the_documented_counts() -> None:
    spec = documented_spec()
    counted = count_parameters(spec.shape)
    assert counted.without_positions == 40_560_000
    assert counted.total == 40_953_216
    tokens = spec.tokens_per_step * spec.steps
    assert tokens == 10_485_760_000
    assert flops_per_token_6n(spec.shape) * tokens == 6 * 40_560_000 * 10_485_760_000
    assert f"{flops_per_token_6n(spec.shape) * tokens:.4g}" == "2.552e+18"
    assert f"{flops_per_token_palm(spec.shape) * tokens:.4g}" == "3.146e+18"

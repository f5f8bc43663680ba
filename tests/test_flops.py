"""Parameters and FLOPs by formula are those of the model that trains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from examples import documented_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT
from nanogauge.config import ModelSection
from nanogauge.predict.flops import (
    flops_per_token_6n,
    flops_per_token_palm,
    forward_flops_per_token,
)
from nanogauge.predict.parameters import count_parameters
from nanogauge.predict.workload import shape_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose more to waiting for a second thread than it does for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    )


GPT2_LIKE = ModelSection(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=200, bias=True)


@settings(max_examples=12, deadline=None)
@given(model=small_models(), sequences=st.integers(1, 3))
@example(model=GPT2_LIKE, sequences=2)
def test_three_forward_passes_are_what_torch_counts(model: ModelSection, sequences: int) -> None:
    """Forward and backward of the real model, exactly, with attention as plain products.

    torch counts nothing for fused attention on a CPU, so attention is forced to be unfused.
    """
    gpt = GPT(model)
    tokens = torch.zeros(sequences, model.block_size, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        gpt(tokens, tokens).backward()
    per_token = 3 * sum(forward_flops_per_token(shape_of(model)).values())
    assert counter.get_total_flops() == per_token * tokens.numel()


@settings(max_examples=30, deadline=None)
@given(small_models())
def test_the_conventions_differ_from_the_products_by_vectors_alone(model: ModelSection) -> None:
    """6N + 12LCT counts norms and biases as if they were matrix products, and nothing else more."""
    vectors = count_parameters(shape_of(model)).vectors
    products = 3 * sum(forward_flops_per_token(shape_of(model)).values())
    assert flops_per_token_palm(shape_of(model)) == products + 6 * vectors
    attention = 12 * model.n_layer * model.n_embd * model.block_size
    assert flops_per_token_palm(shape_of(model)) - flops_per_token_6n(shape_of(model)) == attention


@settings(max_examples=30, deadline=None)
@given(small_models())
@example(documented_config().model)
def test_the_parameter_count_is_that_of_the_model(model: ModelSection) -> None:
    """The model is built on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        gpt = GPT(model)
    counted = count_parameters(shape_of(model))
    assert counted.total == sum(p.numel() for p in gpt.parameters())
    assert counted.tables == gpt.transformer["wpe"].weight.numel()
    assert counted.without_positions == counted.total - counted.tables


def test_the_documented_run_has_the_documented_counts() -> None:
    """The closed forms of the documented run, worked out by hand."""
    config = documented_config()
    counted = count_parameters(shape_of(config.model))
    assert counted.without_positions == 40_560_000
    assert counted.total == 40_953_216
    tokens = config.tokens_per_step * config.train.max_steps
    assert tokens == 10_485_760_000
    assert flops_per_token_6n(shape_of(config.model)) * tokens == 6 * 40_560_000 * 10_485_760_000
    assert f"{flops_per_token_6n(shape_of(config.model)) * tokens:.4g}" == "2.552e+18"
    assert f"{flops_per_token_palm(shape_of(config.model)) * tokens:.4g}" == "3.146e+18"

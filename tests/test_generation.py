"""Cached generation gives the text of the whole model."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import fill_by_formula, small_model

from model import GPT
from trainer.evaluation.generation import Choice, Context, generate

BLOCK = 12  # of small_model
LIKELIEST = Choice(temperature=0)


def whole_logits(model: GPT, context: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model.hidden(torch.tensor([context])))[0, -1]


def formula_model(bias: bool = False) -> GPT:
    model = small_model(bias).eval()
    fill_by_formula(model)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prompt", [1, 5, BLOCK, BLOCK + 8])
def test_each_next_token_has_the_logits_of_the_whole_model(bias: bool, prompt: int) -> None:
    """A full context continues with its newer half, which ends with the newest token."""
    model = formula_model(bias)
    context, seen = Context(model), [(5 * i + 3) % 37 for i in range(prompt)]
    found, seen = context.next_logits(seen), seen[-BLOCK:]
    for _ in range(3 * BLOCK):
        expected = whole_logits(model, seen)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        token = int(found.argmax() + len(seen)) % 37
        found = context.next_logits([token])
        seen = [*seen, token] if len(seen) < BLOCK else [*seen, token][-BLOCK // 2 :]


def test_generation_depends_on_the_seed_and_the_last_block_of_the_prompt() -> None:
    model = formula_model()

    def text(prompt: Sequence[int], seed: int, count: int = 30) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(generate(model, prompt, count, Choice(), generator))

    prompt = list(range(20))  # longer than the block of 12: position 8 is the first that counts
    first = text(prompt, seed=5)
    assert len(first) == 30
    assert set(first) <= set(range(37))
    assert text(prompt, seed=5) == first
    assert text(prompt, seed=6) != first
    far, near = prompt.copy(), prompt.copy()
    far[7] = near[8] = 36
    assert text(far, seed=5) == first
    assert any(text(near, seed, 1) != text(prompt, seed, 1) for seed in range(40))


def test_the_likeliest_text_is_that_of_the_whole_model_up_to_the_end_token() -> None:
    model, expected = formula_model(), [4]
    for _ in range(BLOCK - 1):
        expected.append(int(whole_logits(model, expected).argmax()))
    made = list(generate(model, [4], BLOCK - 1, LIKELIEST, torch.Generator()))
    assert [4, *made] == expected
    end = made[5]
    ended = list(generate(model, [4], BLOCK - 1, LIKELIEST, torch.Generator(), end))
    assert ended == made[: made.index(end)]


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=12),
    temperature=st.floats(0.3, 2),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_only_tokens_that_top_k_and_top_p_leave_are_drawn(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """The k likeliest tokens; of these the fewest with a total probability of p."""
    choice = Choice(temperature, top_k, top_p)
    chance = torch.Generator().manual_seed(3)
    drawn = {choice.draw(torch.tensor(logits), chance) for _ in range(60)}
    left = sorted(logits, reverse=True)[:top_k]
    shares = torch.softmax(torch.tensor(left) / temperature, dim=-1).tolist()
    before = [sum(shares[:i]) for i in range(len(left))]
    least = min(x for x, b in zip(left, before, strict=True) if top_p is None or b < top_p + 1e-6)
    assert all(logits[token] >= least - 1e-6 for token in drawn)  # equal in fp32's probabilities


def test_tokens_are_drawn_by_their_probability() -> None:
    """Temperature 0.5 squares the odds: 1 to 3 become 1 to 9."""
    chance = torch.Generator().manual_seed(1)
    logits = torch.tensor([1.0, 3.0]).log()
    count = sum(Choice(temperature=0.5).draw(logits, chance) for _ in range(4000))
    assert count / 4000 == pytest.approx(0.9, abs=0.02)


@torch.no_grad()
def test_a_diverged_model_generates_nothing() -> None:
    """The text sample must not end the run."""
    model = formula_model()
    model.embedding.weight[3] = math.nan
    assert list(generate(model, [3], 8, Choice(), torch.Generator())) == []

"""The chunked head has the plain head's loss and gradients, and keeps no logits."""

import math
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT
from nanogauge.config import CHUNK_BYTES, ModelSection, chunk_tokens
from trainer.step.chunked_cross_entropy import (
    InPlaceGradient,
    chunked_loss,
    fusible_losses_and_grad_logits,
    losses_and_grad_logits,
    plain_loss,
)
from trainer.step.loss import TrainingLoss

CPU = torch.device("cpu")
SMALL = ModelSection(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50)
pytestmark = pytest.mark.usefixtures("one_thread")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients(
    form: Literal["plain", "autograd", "in_place"],
    tokens: int,
    vocabulary: int,
    chunk: int,
    scale: float = 3.0,
    share: float = 0.25,
    dtype: torch.dtype = torch.float32,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden = (scale * torch.randn(tokens, 24, generator=random)).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(vocabulary, 24, generator=random).to(dtype))
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        if form == "plain":
            loss = plain_loss(hidden, weight, targets)
        else:
            in_place = InPlaceGradient(weight, share) if form == "in_place" else None
            loss = chunked_loss(hidden, weight, targets, chunk, in_place)
    (loss * share).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    vocabulary=st.integers(2, 300),
    chunk=st.integers(1, 80),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    form=st.sampled_from(["autograd", "in_place"]),
)
def test_loss_and_gradients_are_those_of_the_plain_head_for_any_chunk_size(
    tokens: int, vocabulary: int, chunk: int, scale: float, form: Literal["autograd", "in_place"]
) -> None:
    """Within 1e-6 of double precision, or as far from it as the plain head is."""
    exact = gradients("plain", tokens, vocabulary, chunk, scale, dtype=torch.float64)
    plain = gradients("plain", tokens, vocabulary, chunk, scale)
    found = gradients(form, tokens, vocabulary, chunk, scale)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        if true.norm() > 1e-6:
            assert relative(ours, true) < 1e-6 + 2 * relative(theirs, true)


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 90), st.integers(50, 300), st.integers(7, 64))
def test_bfloat16_is_as_near_to_fp32_as_in_the_plain_head(tokens: int, vocabulary: int, chunk: int) -> None:
    true = gradients("plain", tokens, vocabulary, chunk)
    plain = gradients("plain", tokens, vocabulary, chunk, bfloat16=True)
    found = gradients("autograd", tokens, vocabulary, chunk, bfloat16=True)
    for ours, theirs, exact in zip(found, plain, true, strict=True):
        assert relative(ours, exact) < 1.1 * relative(theirs, exact) + 1e-6


def test_the_fusible_softmax_equals_the_eager_one() -> None:
    for dtype, exact in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        logits = (5 * torch.randn(9, 1000, generator=torch.Generator().manual_seed(1))).to(dtype)
        targets = torch.arange(9)
        one, other = logits.clone(), logits.clone()
        losses = losses_and_grad_logits(one, targets)
        assert torch.allclose(losses, fusible_losses_and_grad_logits(other, targets), rtol=1e-6)
        assert torch.allclose(one.float(), other.float(), atol=exact)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_no_operation_makes_all_logits(training: bool) -> None:
    hidden = torch.randn(600, 8, requires_grad=True)
    weight = nn.Parameter(torch.randn(500, 8))
    with Largest() as seen, torch.set_grad_enabled(training):
        loss = chunked_loss(hidden, weight, torch.arange(600) % 500, 64)
        if training:
            loss.backward()  # type: ignore[no-untyped-call]
    assert seen.elements == 64 * 500


@given(tokens=st.integers(1, 20_000), vocabulary=st.integers(1, 200_000))
def test_chunks_are_equal_up_to_their_alignment(tokens: int, vocabulary: int) -> None:
    """As few chunks as fit, none of which is a small remainder."""
    for kind, unit, element, most in (("cpu", 16, 4, 1), ("cuda", 64, 2, 2)):
        chunk = chunk_tokens(tokens, vocabulary, kind)
        assert chunk == unit or element * vocabulary * chunk <= most * CHUNK_BYTES[kind]
        count = math.ceil(tokens / chunk)
        assert chunk - tokens / count < unit
    assert [chunk_tokens(16 * 1024, 50304, kind) for kind in ("cpu", "cuda")] == [176, 4096]


def step(
    head: Literal["plain", "chunked"], recompute: bool = False, device: str = "cpu", **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Return losses and gradients of the second of two steps of three micro-batches."""
    torch.manual_seed(3)
    model = GPT(SMALL.model_copy(update=options))
    model.recompute = recompute
    loss_of = TrainingLoss(model, head, 3, torch.device(device))
    if device == "cuda":
        loss_of.compile()
    losses = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        for _ in range(3):
            tokens = torch.randint(50, (4, 13))
            loss = loss_of(tokens[:, :-1], tokens[:, 1:]) / 3
            loss_of.backward(loss)
            losses.append(loss.item())
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.2}, {"tied_head": False}, {"tied_head": False, "logit_softcap": 15.0}]
)
def test_a_step_has_the_gradients_of_the_plain_head_with_and_without_recomputation(
    recompute: bool, options: dict[str, Any]
) -> None:
    """A recomputed tensor is a detached copy: a gradient added to it would be lost."""
    plain, expected = step("plain", **options)
    losses, found = step("chunked", recompute, **options)
    assert losses == pytest.approx(plain, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 2e-6, name


def test_the_same_step_has_the_same_bits() -> None:
    one, other = step("chunked", dropout=0.2), step("chunked", dropout=0.2)
    assert one[0] == other[0]
    assert all(torch.equal(g, other[1][name]) for name, g in one[1].items())


def test_a_loss_that_is_not_an_equal_share_of_its_step_is_refused() -> None:
    """The weight's gradient was added with that share already."""
    loss = TrainingLoss(GPT(SMALL), "chunked", 4, CPU)(*torch.zeros((2, 1, 8), dtype=torch.long))
    with pytest.raises(AssertionError, match=r"1\.0, not with 0\.25"):
        loss.backward()  # type: ignore[no-untyped-call]


def uncompiled(function: Any, **_: Any) -> Any:
    return function


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plain_head_is_compiled_with_the_model(device: str) -> None:
    """Uncompiled it kept the loss in fp32: 13 GB of the documented run instead of 6."""
    with mock.patch.object(torch, "compile", side_effect=uncompiled) as compiled:
        TrainingLoss(GPT(SMALL), "plain", 1, torch.device(device)).compile()
    assert mock.call(plain_loss, dynamic=False) in compiled.mock_calls


@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_gradients_that_are_added_together_are_those_of_autograd(
    head: Literal["plain", "chunked"], tied_head: bool
) -> None:
    """As where a GPU's compiled backward pass returns them."""
    _, expected = step("plain", tied_head=tied_head)
    with mock.patch.object(torch, "compile", side_effect=uncompiled):
        _, found = step(head, device="cuda", tied_head=tied_head)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 2e-6, name

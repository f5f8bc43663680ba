"""The model is nanoGPT's, and causal."""

import math

import pytest
import torch
from torch import Tensor

from model import GPT
from nanogauge.config import ModelSection

# bias -> loss, and the norm of each parameter's gradient in the order of registration
# fmt: off
NANOGPT: dict[bool, tuple[float, list[float]]] = {
    False: (
        3.7451389,
        [
            0.739564, 0.4158503, 0.04114625, 0.3787209, 0.3237493, 0.03302904, 0.4390496,
            0.4229692, 0.03409923, 0.2506643, 0.2413302, 0.04556719, 0.3666303, 0.3087174,
            0.1047225,
        ],
    ),
    True: (
        3.8079617,
        [
            0.6049808, 0.2259323, 0.02493804, 0.01700771, 0.2016762, 0.03406021, 0.2121366,
            0.09263959, 0.03957194, 0.02451097, 0.2850398, 0.04309468, 0.2949141, 0.06493016,
            0.01386455, 0.01669422, 0.1262552, 0.03161484, 0.1291552, 0.05871782, 0.02492024,
            0.01645217, 0.2154281, 0.04039397, 0.2202454, 0.05589076, 0.1378104, 0.0992728,
        ],
    ),
}
# fmt: on
pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(bias: bool = False, dropout: float = 0.0) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 37}
    return GPT(ModelSection.model_validate({**shape, "bias": bias, "dropout": dropout}))


def formula_tokens() -> tuple[Tensor, Tensor]:
    i = torch.arange(3 * 12)
    return ((7 * i + i * i) % 37).view(3, 12), ((5 * i + 3) % 37).view(3, 12)


@torch.no_grad()
def fill_by_formula(model: GPT) -> None:
    """Set weights of full rank: 0.2 sin(0.37 i + 0.011 i^2 + k) for element i of parameter k."""
    for k, (name, parameter) in enumerate(model.named_parameters()):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.2 * torch.sin(0.37 * i + 0.011 * i * i + k)
        if ".ln_" in name and name.endswith("weight"):
            values += 1
        parameter.copy_(values.view(parameter.shape))


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_nanogpt(bias: bool) -> None:
    """Figures were recorded from the model.py of karpathy/nanoGPT at commit 3adf61e, on a CPU in fp32 with torch 2.13,
    its GPT filled by fill_by_formula and run on formula_tokens; computed in fp64 they differ by less than 1e-6.
    """
    loss, norms = NANOGPT[bias]
    model = small_model(bias)
    fill_by_formula(model)
    found = model(*formula_tokens())
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    gradients = [parameter.grad.double().norm().item() for parameter in model.parameters()]
    assert gradients == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_new_model_is_initialised_like_gpt2(bias: bool) -> None:
    """N(0, 0.02), projections into the residual stream by 1/sqrt(2L) less, norms 1, biases 0."""
    torch.manual_seed(1)
    layers = 8
    shape = {"n_layer": layers, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 256}
    config = ModelSection.model_validate({**shape, "bias": bias})
    matrices = 0
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            matrices += 1
            residual = name.endswith("c_proj.weight")
            std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert matrices == 4 * layers + 2


def test_the_vocabulary_head_is_the_embedding() -> None:
    model = small_model()
    assert model.lm_head.weight is model.embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model(*formula_tokens()).backward()
    unseen = sorted(set(range(37)) - set(formula_tokens()[0].flatten().tolist()))
    assert unseen  # tokens that are no input: only the head can move their rows
    assert model.embedding.weight.grad[unseen].abs().sum(dim=1).gt(0).all()


def test_no_position_sees_a_later_token() -> None:
    torch.manual_seed(2)
    model = small_model().eval()
    tokens, _ = formula_tokens()
    before = model.hidden(tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = model.hidden(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        moved = (after[:, t:] - before[:, t:]).abs().amax(dim=-1)
        assert moved.gt(0).all(), t


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(3)
    model = small_model(dropout=0.5)
    tokens, targets = formula_tokens()
    assert model(tokens, targets).item() != model(tokens, targets).item()
    model.eval()
    assert model(tokens, targets).item() == model(tokens, targets).item()

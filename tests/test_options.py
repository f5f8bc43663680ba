"""Options of model and optimizer beyond GPT-2 and AdamW: each trains and resumes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Trained, same
from commands import ROOT, run_here, steps_of, succeed, train_tiny

from model import GPT, softcap
from nanogauge.config import ModelSection, OptimizerSection, load_config
from nanogauge.schedule import learning_rate
from nanogauge.spec_parts import Schedule
from trainer.checkpoints.checkpoint_writer import CheckpointWriter, Written
from trainer.evaluation.generation import Choice, Context, generate
from trainer.step.chunked_cross_entropy import fusible_losses_and_grad_logits, losses_and_grad_logits, plain_loss
from trainer.step.loss import TrainingLoss
from trainer.step.optimizer import make_optimizer, set_learning_rate, update

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE: dict[str, Any] = {**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 264}}
OPTIONS: dict[str, Any] = {
    **{"positions": "rotary", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2"},
    **{"tied_head": False, "zero_init": True, "logit_softcap": 15.0},
}
RECIPE = [f"--model.{key.replace('_', '-')}={json.dumps(value).strip(chr(34))}" for key, value in OPTIONS.items()] + [
    "--optimizer.name=muon",
    "--optimizer.schedule=wsd",
]
CPU = torch.device("cpu")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(32)
    return (7 * i % 264).view(2, 16), (5 * i % 264).view(2, 16)


@pytest.mark.parametrize(
    ("bias", "digest", "loss"),
    [(False, "8ca4a673a31591cf", 5.570401191711426), (True, "ef959999acfaaffe", 5.556819915771484)],
)
def test_the_default_model_has_the_recorded_weights_and_loss(bias: bool, digest: str, loss: float) -> None:
    torch.manual_seed(1337)
    model = GPT(ModelSection(**SHAPE, bias=bias))
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(name.encode() + weight.numpy().tobytes())
    assert found.hexdigest().startswith(digest)
    assert model(*batch()).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_option_lowers_the_loss_and_resumes_to_the_same_bits(key: str, name: Any, tmp_path: Path) -> None:
    section = ModelSection.model_validate({**SHAPE, key: OPTIONS[key]})

    def fresh(seed: int) -> Trained:
        torch.manual_seed(seed)
        made = Trained(section)
        made.optimizer = make_optimizer(made.model, OptimizerSection(name=name, learning_rate=1e-2))
        return made

    def step(trained: Trained) -> float:
        loss = TrainingLoss(trained.model, "chunked", 1, CPU)(*batch())
        loss.backward()  # type: ignore[no-untyped-call]
        update(trained.optimizer, trained.scaler, torch.tensor(True))
        trained.optimizer.zero_grad()
        return loss.item()

    first, second = fresh(1), fresh(2)
    losses = [step(first)]
    checkpoints = CheckpointWriter(tmp_path, keep=1)
    written = first.save(checkpoints, 1)
    assert isinstance(written, Written)
    second.load(tmp_path / "step_00000001")
    losses += [step(first), step(first)]
    assert losses[2] < losses[1] < losses[0]
    assert [step(second), step(second)] == losses[1:]
    assert same(first.state(), second.state())


def test_a_run_of_all_options_resumes_to_the_same_bits_and_is_read_by_other_commands(tmp_path: Path) -> None:
    succeed(train_tiny(tmp_path / "whole", *RECIPE))
    succeed(train_tiny(tmp_path / "cut", *RECIPE, "--rehearse=6"))
    succeed(train_tiny(tmp_path / "cut", *RECIPE, "--resume=auto"))
    losses = [{line["step"]: line["loss"] for line in steps_of(tmp_path / name / "demo")} for name in ("whole", "cut")]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    run = tmp_path / "cut" / "demo"
    succeed(run_here("sample.py", run, "--prompt", "The ", "--tokens", 8))
    exported = run_here("export.py", run)
    assert exported.returncode == 2
    assert 'no model.positions = "rotary"' in exported.stderr


@pytest.mark.parametrize("prompt", [1, 16, 21])
def test_cached_generation_with_all_options_is_that_of_the_whole_model(prompt: int) -> None:
    torch.manual_seed(3)
    model = GPT(ModelSection.model_validate({**SHAPE, **OPTIONS, "zero_init": False})).eval()
    for parameter in model.parameters():
        parameter.data *= 8  # far enough from uniform that a tie decides nothing
    seen = [(7 * i + 3) % 264 for i in range(prompt)]
    context, tokens = Context(model), seen
    made = generate(model, seen, 16, Choice(temperature=0), torch.Generator())
    seen = seen[-16:]
    for drawn in made:
        found = context.next_logits(tokens)
        with torch.no_grad():
            expected = model.logits(model.hidden(torch.tensor([seen])))[0, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert drawn == int(expected.argmax())
        tokens = [drawn]
        seen = [*seen, drawn] if len(seen) < 16 else [*seen, drawn][-8:]


def test_rotated_products_depend_on_the_distance_alone() -> None:
    """Su et al. 2021, section 3.2: the product of query m and key n is a function of m - n."""
    attention = GPT(ModelSection(**SHAPE, positions="rotary")).blocks[0].attn
    q, k = torch.randn(2, 1, 1, 1, 16)
    product = [float((attention.prepared(q, begin=b) * attention.prepared(k, begin=b - 3)).sum()) for b in (3, 7, 15)]
    assert product == pytest.approx([product[0]] * 3, rel=1e-4, abs=1e-5)
    other = float((attention.prepared(q, begin=7) * attention.prepared(k, begin=2)).sum())
    assert other != pytest.approx(product[0], rel=1e-3)


def test_the_gradients_of_capped_logits_are_those_of_autograd() -> None:
    torch.manual_seed(4)
    logits, targets = 20 * torch.randn(6, 40), torch.arange(6)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(softcap(exact, 15.0), targets, reduction="none")
    losses.sum().backward()
    for function in (losses_and_grad_logits, fusible_losses_and_grad_logits):
        slopes = logits.clone()
        torch.testing.assert_close(function(slopes, targets, 15.0).double(), losses.detach())
        torch.testing.assert_close(slopes.double(), exact.grad, rtol=1e-5, atol=1e-6)
    hidden = torch.eye(6)
    plain = plain_loss(hidden, logits.t().contiguous(), targets, 15.0)
    assert plain.item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_muon_has_the_matrices_of_the_blocks_and_a_rate_of_its_own() -> None:
    model = GPT(ModelSection(**SHAPE, tied_head=False))
    config = OptimizerSection(name="muon", learning_rate=1e-3, matrix_learning_rate=4e-3)
    optimizer = make_optimizer(model, config)
    of_muon = {id(p) for p in optimizer.param_groups[-1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in of_muon}
    assert len(names) == 8
    assert all(".attn." in name or ".mlp." in name for name in names)
    set_learning_rate(optimizer, 5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-4, 5e-4, 2e-3])


def test_the_stable_rate_goes_down_in_a_straight_line_at_the_end() -> None:
    schedule = Schedule(decay="wsd", learning_rate=1.0, warmup_steps=3, decay_share=0.4)
    rates = [learning_rate(step, schedule, 10) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_rotary_positions_of_an_odd_head_are_refused_and_the_recipe_sees_no_token_twice() -> None:
    demo = ROOT / "configs" / "demo.toml"
    odd = run_here("plan.py", demo, "--model.n-embd=12", "--model.positions=rotary")
    assert odd.returncode == 2
    assert "an even head size, not 3" in odd.stderr
    fast = load_config(ROOT / "configs" / "rtx4070_fineweb_fast.toml")
    assert fast.tokens_per_step * fast.train.max_steps < (fast.data.tokens or 0)

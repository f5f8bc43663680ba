"""The predicted memory traffic of options beyond GPT-2 is that of torch, by operation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from examples import CPU, DOCUMENTED, beyond_gpt2, documented_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from nanogauge.config import ModelSection, OptimizerSection, load_config, program_of, shape_of
from nanogauge.hardware import lookup
from nanogauge.prediction.step_time import MUON_BYTES, MUON_KERNELS, Extra, of_layer, of_logits, predict_step_time
from nanogauge.prediction.workload import Workload, workload_of
from nanogauge.runspec import RunSpec
from trainer.step.chunked_cross_entropy import chunked_loss, plain_loss
from trainer.step.optimizer import make_optimizer, update

HEADS, WIDTH, CONTEXT, SEQUENCES = 4, 256, 64, 8
TOKENS = SEQUENCES * CONTEXT
PRODUCTS = ("mm", "addmm", "addmm_", "_scaled_dot_product_flash_attention_for_cpu")


class Traffic(TorchDispatchMode):
    """Counts operations and the bytes that they read and write; views move none."""

    bytes = operations = products = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        storages = {t.untyped_storage()._cdata for t in given}
        view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in made)
        if view or name.startswith("empty") or name == "new_empty":
            return out
        if name.removesuffix("_backward") in PRODUCTS:
            self.products += 1
            return out
        self.operations += 1
        read = {id(t): size(t) for t in given}
        self.bytes += sum(read.values()) + sum(map(size, made))
        return out


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an expanded dimension counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, step in sizes if step)


def traffic_of(work: Callable[[], object]) -> Traffic:
    counted = Traffic()
    with counted:
        work()
    return counted


def section(layers: int, **options: Any) -> ModelSection:
    return ModelSection(n_layer=layers, n_head=HEADS, n_embd=WIDTH, block_size=CONTEXT, vocab_size=64, **options)


def layer_traffic(dtype: str, **options: Any) -> Extra:
    """Return the traffic of the second of two layers per token, eager on a CPU."""
    found = []
    for layers in (1, 2):
        with FakeTensorMode():
            model = GPT(section(layers, **options))
            tokens = torch.zeros(SEQUENCES, CONTEXT, dtype=torch.long)

            def passes(model: GPT = model, tokens: Tensor = tokens) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = model.hidden(tokens).float().sum()
                loss.backward()  # type: ignore[no-untyped-call]

            found.append(traffic_of(passes))
    one, two = found
    return Extra((two.bytes - one.bytes) / TOKENS, two.operations - one.operations)


def work_of(model: ModelSection, **how: Any) -> Workload:
    return Workload(shape_of(model), SEQUENCES, 1, program=program_of(model), **how)


@settings(max_examples=12, deadline=None)
@given(options=beyond_gpt2(), dtype=st.sampled_from(["float32", "bfloat16"]))
@example(options={"positions": "rotary", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2"}, dtype="float32")
def test_the_predicted_traffic_of_a_layer_is_counted(options: dict[str, Any], dtype: Any) -> None:
    expected = of_layer(work_of(section(2, **options), dtype=dtype, compiled=False), on_cpu=True)
    plain, counted = layer_traffic(dtype), layer_traffic(dtype, **options)
    assert counted.bytes - plain.bytes == pytest.approx(expected.bytes, rel=0.03)
    assert counted.kernels - plain.kernels == pytest.approx(expected.kernels, abs=4)


@pytest.mark.parametrize("head", ["plain", "chunked"])
def test_the_predicted_traffic_of_a_soft_cap_is_counted(head: Literal["plain", "chunked"]) -> None:
    """Beyond the loss without it, within 1 %, without tensors as long as the tokens."""
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight, targets = torch.randn(4000, WIDTH) / WIDTH, torch.zeros(TOKENS, dtype=torch.long)

    def loss(cap: float) -> Traffic:
        hidden.grad = None
        if head == "plain":
            return traffic_of(lambda: plain_loss(hidden, weight, targets, cap).backward())
        return traffic_of(lambda: chunked_loss(hidden, weight, targets, 128, cap=cap).backward())

    model = section(1, logit_softcap=15.0).model_copy(update={"vocab_size": 4000})
    work = work_of(model, dtype="float32", compiled=False, head=head)
    counted = (loss(15.0).bytes - loss(0.0).bytes) / TOKENS
    assert counted == pytest.approx(of_logits(work, on_cpu=True), rel=0.01)


def muon_traffic(matrices: int) -> Traffic:
    """Return the traffic of the second update of this many matrices."""
    names = [f"matrix {i}" for i in range(matrices)]
    model = torch.nn.ParameterDict({name: torch.randn(WIDTH, 3 * WIDTH) for name in names})
    model["vector"] = torch.nn.Parameter(torch.ones(WIDTH))
    optimizer = make_optimizer(model, OptimizerSection(name="muon"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    update(optimizer, scaler, torch.tensor(True))
    return traffic_of(lambda: update(optimizer, scaler, torch.tensor(True)))


def test_the_predicted_traffic_of_a_muon_update_is_counted() -> None:
    one, two = muon_traffic(1), muon_traffic(2)
    assert two.products - one.products == 15
    assert two.operations - one.operations + 15 == MUON_KERNELS
    assert (two.bytes - one.bytes) / (3 * WIDTH**2) == pytest.approx(MUON_BYTES, rel=0.001)


def test_the_documented_step_time_has_not_changed() -> None:
    """With a plain head; only a fit may change it."""
    for compiled, on_gpu, seconds in (
        (True, True, 3.7766973940008866),
        (False, True, 7.389269389012287),
        (True, False, 2588.9959395491396),
        (False, False, 2910.972355533165),
    ):
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if on_gpu else "float32"
        work = workload_of(replace(documented_spec(), compile=compiled, dtype=dtype), on_gpu)
        hardware = lookup("RTX 4070", "bfloat16") if on_gpu else CPU
        step = predict_step_time(replace(work, head="plain"), hardware)
        assert step is not None and step.seconds == seconds


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_plan_counts_what_an_option_costs(on_gpu: bool, compiled: bool) -> None:
    """The step takes longer, or the same where the option is fused."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if on_gpu else "float32"
    hardware = lookup("RTX 4070", "bfloat16") if on_gpu else CPU

    def seconds(overrides: dict[str, Any]) -> float:
        config = load_config(DOCUMENTED, {"run": {"compile": compiled}} | overrides)
        step = predict_step_time(workload_of(RunSpec.from_config(config, dtype), on_gpu), hardware)
        assert step is not None
        return step.seconds

    without = seconds({})
    for key, value in (("positions", "rotary"), ("qk_norm", True)):
        assert seconds({"model": {key: value}}) > without
    assert seconds({"optimizer": {"name": "muon"}}) > without
    squared, capped = (seconds({"model": model}) for model in ({"activation": "relu2"}, {"logit_softcap": 15.0}))
    assert squared == without if compiled else squared > without
    assert capped == without if compiled and on_gpu else capped > without

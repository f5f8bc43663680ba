"""Specs of any model: a shape from config.json, or a trace that is predicted, measured and reported."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nanogauge as ng
from nanogauge.prediction.flops import count_parameters


def recorded_peak(module: nn.Module, inputs: tuple[torch.Tensor, ...], loss: Any, grad_accum: int) -> int:
    """Return the peak that torch's own record of allocations shows in two steps."""
    there = peak = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers(), *inputs))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            for _ in range(grad_accum):
                loss(module, *inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        there += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, there)
    return peak


def language_model(name: str) -> Any:
    sizes = {"vocab_size": 500, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    of_model = getattr(transformers, name)
    return of_model(of_model.config_class(hidden_size=64, pad_token_id=0, **sizes)).train()


def convolutions() -> nn.Module:
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(16 * 256, 10))


TOKENS = torch.randint(500, (4, 64))
PICTURES = (torch.randn(8, 3, 16, 16), torch.randint(10, (8,)))


def own_loss(model: Any, tokens: torch.Tensor) -> Any:
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize(
    ("make", "inputs", "loss", "grad_accum"),
    [
        (partial(language_model, "LlamaForCausalLM"), (TOKENS,), own_loss, 1),
        (partial(language_model, "BertForMaskedLM"), (TOKENS,), own_loss, 1),
        (convolutions, PICTURES, lambda model, x, y: nn.functional.cross_entropy(model(x), y), 3),
    ],
)
def test_the_traced_peak_is_that_of_torchs_record(make: Any, inputs: Any, loss: Any, grad_accum: int) -> None:
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    traced = ng.RunSpec.from_module(module, *inputs, steps=10, loss=loss, grad_accum=grad_accum).traced
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert traced is not None
    assert traced.peak_bytes == pytest.approx(recorded_peak(module, inputs, loss, grad_accum), rel=0.03)


def test_a_module_without_memory_gives_the_same_trace_and_its_run_a_report(tmp_path: Path) -> None:
    model, batch = language_model("BertForMaskedLM"), {"input_ids": TOKENS, "labels": TOKENS}
    spec = ng.RunSpec.from_module(model, batch, steps=4)
    with torch.device("meta"):
        assert ng.RunSpec.from_module(language_model("BertForMaskedLM"), batch, steps=4) == spec
    assert ng.RunSpec.from_json(spec.to_json()) == spec
    plan = ng.predict(spec, gpu="RTX 4070")
    assert plan["parameters_total"].expected == sum(p.numel() for p in model.parameters())
    # 6N + 12LCT: N are the weights that are multiplied, the tied head's among them, but two tables are only looked up.
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    multiplied = sum(size for name, size in matrices.items() if "position" not in name and "token_type" not in name)
    flops = plan["flops_total_traced"].expected
    assert flops == 4 * TOKENS.numel() * (6 * multiplied + 12 * 2 * 64 * 64)
    with pytest.raises(KeyError, match="described by a trace"):
        plan["tokens_total"]
    with ng.run("traced", spec=spec, folder=tmp_path) as run:
        for _ in range(4):
            with run.step():
                pass
    report = json.loads((tmp_path / "traced" / "report.json").read_text())
    rows = {row["id"]: row for row in report["rows"]}
    assert rows["flops_total_traced"]["measured"]["value"] == flops
    assert rows["step_seconds"]["analytic"]["high"] > 2 * rows["step_seconds"]["analytic"]["expected"]
    assert "described by a trace, not by a GPT's shape" in rows["mfu_palm"]["why"]
    assert report["run"]["tokens_per_second"] is None and report["what_if"] == []


def test_a_module_that_cannot_be_traced_is_refused_with_what_to_do() -> None:
    module, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    for loss in (None, lambda model, x: model(x).mean(0)):
        with pytest.raises(ValueError, match="returns no loss; give loss="):
            ng.RunSpec.from_module(module, inputs, steps=1, loss=loss)
    with pytest.raises(ValueError, match="depends on values"):
        ng.RunSpec.from_module(module, inputs, steps=1, loss=lambda model, x: model(x).sum() * model(x).sum().item())


SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {"intermediate_size": 176, "num_key_value_heads": 2, "pad_token_id": 0}
SMOLLM = {**GROUPED, "tie_word_embeddings": True}
PARTLY_BIASED = {"intermediate_size": 256, "attention_bias": False, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *[("GPT2", {}), ("GPTNeoX", {"intermediate_size": 256}), ("GPTNeoX", PARTLY_BIASED), ("Llama", SMOLLM)],
        *[("Llama", GROUPED), ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}), ("SmolLM3", GROUPED)],
        *[("Mistral", GROUPED), ("Qwen2", SMOLLM), ("Qwen3", {**GROUPED, "head_dim": 32, "attention_bias": True})],
    ],
)
def test_the_parameters_of_a_shape_are_those_of_the_model(name: str, more: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**SIZES, max_position_embeddings=64, **more)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = ng.RunSpec.from_transformers(config, {}, steps=1)
    assert count_parameters(spec.shape).total == sum(p.numel() for p in model.parameters())


def test_a_model_of_another_shape_is_refused_instead_of_miscounted() -> None:
    with pytest.raises(ValueError, match=r"no shape of mixtral is described, .* use RunSpec\.from_module"):
        ng.RunSpec.from_transformers(transformers.MixtralConfig(), {}, steps=1)

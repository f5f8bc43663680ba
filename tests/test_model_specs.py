"""RunSpec.from_transformers: the shape in a config.json is that of the model."""

from typing import Any

import pytest
import torch
import transformers

import nanogauge as ng
from nanogauge.prediction.flops import count_parameters

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
    with pytest.raises(ValueError, match=r"the shape of mixtral is not described, .* use RunSpec\.gpt"):
        ng.RunSpec.from_transformers(transformers.MixtralConfig(), {}, steps=1)

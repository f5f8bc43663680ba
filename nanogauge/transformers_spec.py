"""Fields of the RunSpec of a Hugging Face model and its TrainingArguments."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogauge.errors import BadInput
from nanogauge.files import read_whole
from nanogauge.programs import program_named
from nanogauge.spec_parts import Optimizer, Schedule, Shape

_NAMES = {
    "n_layer": ("num_hidden_layers", "n_layer"),
    "n_embd": ("hidden_size", "n_embd"),
    "n_head": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}
"""Field of Shape -> its names in config.json; GPT-2 has names of its own."""
_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""model_type of the models whose shape is described; the older SmolLMs are Llamas."""
_DECAYS = {"linear": "wsd", "cosine": "cosine", "constant": "constant"}


def fields_from_transformers(config: Any, arguments: Any, context: int | None, steps: int | None) -> dict[str, Any]:
    """Return the fields of RunSpec for a transformers.Trainer run; RunSpec.from_transformers has the arguments."""
    if isinstance(config, str | Path):
        try:
            config = dict(json.loads(read_whole(Path(config))))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{config} is no config.json of a model: {error}.") from None
    model = config if isinstance(config, Mapping) else config.to_dict()
    args = arguments if isinstance(arguments, Mapping) else vars(arguments)
    steps = steps or args.get("max_steps")
    if not steps or steps < 0:
        raise BadInput("the number of optimizer steps is missing: give steps=.")
    precision: Any = "bfloat16" if args.get("bf16") else "float16" if args.get("fp16") else "float32"
    optim = str(getattr(args.get("optim"), "value", args.get("optim", "adamw_torch_fused")))
    warmup = args.get("warmup_steps") or args.get("warmup_ratio") or 0
    decay = str(getattr(args.get("lr_scheduler_type"), "value", args.get("lr_scheduler_type")))
    return {
        "shape": _shape(model, context),
        "micro_batch": args.get("per_device_train_batch_size", 8),
        "grad_accum": args.get("gradient_accumulation_steps", 1),
        "steps": steps,
        "dtype": precision,
        "compile": bool(args.get("torch_compile")),
        "dropout": model.get("resid_pdrop", model.get("hidden_dropout", 0.0)),
        "recomputation": "full" if args.get("gradient_checkpointing") else "none",
        "optimizer": Optimizer(
            name="adamw" if "fused" in optim else "adamw_foreach",
            beta1=args.get("adam_beta1"),
            beta2=args.get("adam_beta2"),
            weight_decay=args.get("weight_decay"),
            grad_clip=args.get("max_grad_norm"),
        ),
        "schedule": Schedule(
            learning_rate=args.get("learning_rate", 5e-5),
            warmup_steps=math.ceil(warmup if warmup >= 1 else warmup * steps),
            decay=_DECAYS[decay],  # type: ignore[arg-type]
            decay_share=1.0,
        )
        if decay in _DECAYS
        else None,
        "seed": args.get("seed"),
        "program": replace(program_named("transformers"), qk_norm=model.get("model_type") == "qwen3"),
    }


def _shape(model: Mapping[str, Any], context: int | None) -> Shape:
    family = model.get("model_type")
    if family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise BadInput(f"no shape of {family or 'this model'} is described, only {known}: use RunSpec.from_module.")
    found: dict[str, Any] = {}
    for field, names in _NAMES.items():
        value = next((model[name] for name in names if model.get(name)), None)
        if not isinstance(value, int):
            raise BadInput(f"config.json of {family} has no number {names[0]}; give the whole file.")
        found[field] = value
    n_head, n_embd = found["n_head"], found["n_embd"]
    length = context or model.get("max_position_embeddings") or model.get("n_positions")
    if length is None:
        raise BadInput("the length of a sequence is missing: give context=.")
    gated = family not in ("gpt2", "gpt_neox")
    shape = Shape(
        **found,
        context=length,
        n_kv_head=model.get("num_key_value_heads") or n_head,
        head_size=model.get("head_dim") or n_embd // n_head,
        mlp_width=model.get("intermediate_size") or model.get("n_inner") or 4 * n_embd,
        mlp_matrices=3 if gated else 2,
        tied_head=model.get("tie_word_embeddings", True),
        position_table=family == "gpt2",
        bias=not gated,
    )
    return replace(shape, **_partial_biases(model, shape)) if gated or not model.get("attention_bias", True) else shape


def _partial_biases(model: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Return the fields of a shape that has the biases of some matrices only, or norms of queries and keys."""
    family, outside = model["model_type"], 0
    of_queries = shape.query_width + 2 * shape.key_width
    if family == "gpt_neox":  # all but those of attention: of two LayerNorms, the MLP, and the last norm
        of_layer, outside = shape.mlp_width + 3 * shape.n_embd, shape.n_embd
    else:
        of_layer = of_queries if family == "qwen2" else (of_queries + shape.n_embd) * bool(model.get("attention_bias"))
        of_layer += (2 * shape.mlp_width + shape.n_embd) * bool(model.get("mlp_bias"))
        of_layer += 2 * shape.head_size * (family == "qwen3")
    return {"bias": False, "vector_parameters": shape.n_layer * of_layer + outside}

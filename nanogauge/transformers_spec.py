"""Fields of the RunSpec of a Hugging Face model and its TrainingArguments."""

import json
from collections.abc import Mapping
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
_GATED = ("silu", "swish", "swiglu", "geglu")
_ROTARY = ("rope_theta", "rope_parameters", "rotary_pct", "rms_norm_eps")
_DECAYS = {"linear": "wsd", "cosine": "cosine", "constant": "constant"}


def fields_from_transformers(config: Any, arguments: Any, context: int | None, steps: int | None) -> dict[str, Any]:
    """Return the fields of RunSpec for a transformers.Trainer run; RunSpec.from_transformers has the arguments."""
    if isinstance(config, str | Path):
        config = json.loads(read_whole(Path(config)))
    model = config if isinstance(config, Mapping) else config.to_dict()
    args = arguments if isinstance(arguments, Mapping) else vars(arguments)
    steps = steps or args.get("max_steps")
    if not steps or steps < 0:
        raise BadInput("the number of optimizer steps is missing: give steps=.")
    precision: Any = "bfloat16" if args.get("bf16") else "float16" if args.get("fp16") else "float32"
    optim = str(getattr(args.get("optim"), "value", args.get("optim", "adamw_torch_fused")))
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
            warmup_steps=int(args.get("warmup_steps") or 0),
            decay=_DECAYS[decay],  # type: ignore[arg-type]
            decay_share=1.0,
        )
        if decay in _DECAYS
        else None,
        "seed": args.get("seed"),
        "program": program_named("transformers"),
    }


def _shape(model: Mapping[str, Any], context: int | None) -> Shape:
    found = {}
    for field, names in _NAMES.items():
        value = next((model[name] for name in names if model.get(name)), None)
        if value is None:
            raise BadInput(
                f"config.json of {model.get('model_type', 'this model')} has no {names[0]}: only "
                "decoder-only transformers are described; use RunSpec.gpt or from_module."
            )
        found[field] = value
    n_head, n_embd = found["n_head"], found["n_embd"]
    longest = model.get("max_position_embeddings") or model.get("n_positions")
    length = context or longest
    if length is None:
        raise BadInput("the length of a sequence is missing: give context=.")
    activation = model.get("hidden_act") or model.get("activation_function") or "gelu"
    rotary = any(model.get(name) for name in _ROTARY)
    return Shape(
        **found,
        context=length,
        n_kv_head=model.get("num_key_value_heads") or n_head,
        head_size=model.get("head_dim") or n_embd // n_head,
        mlp_width=model.get("intermediate_size") or model.get("n_inner") or 4 * n_embd,
        mlp_matrices=3 if activation in _GATED else 2,
        tied_head=model.get("tie_word_embeddings", True),
        position_table=not rotary,
        bias=not rotary or "rotary_pct" in model or bool(model.get("attention_bias")),
    )

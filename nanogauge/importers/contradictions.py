"""Compare what a log says of its configuration with the configuration given for it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from nanogauge.errors import BadInput
from nanogauge.importers.printed import PrintedSession, number_of
from nanogauge.importers.text import shown
from nanogauge.records import Prediction
from nanogauge.runspec import RunSpec

_Value = float | bool | str

_KEYS = {
    "batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.grad_accum",
    "block_size": "model.block_size",
    "n_layer": "model.n_layer",
    "n_head": "model.n_head",
    "n_embd": "model.n_embd",
    "vocab_size": "model.vocab_size",
    "bias": "model.bias",
    "dropout": "model.dropout",
    "max_iters": "train.max_steps",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_batches",
    "learning_rate": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "warmup_iters": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "grad_clip": "optimizer.grad_clip",
    "dtype": "run.dtype",
    "compile": "run.compile",
    "num_iterations": "train.max_steps",
}
"""what nanoGPT and its kin call what our configuration has"""
DEVICE = "device"
"""compared by itself: which of several cards it was makes no difference"""
TOKENS = "tokens per step"
PARAMETERS = "parameters"
TOTAL_PARAMETERS = "parameters with position embeddings"
"""names under which a log may say what follows from its configuration"""


def is_known(name: str) -> bool:
    return name in _KEYS or name == DEVICE


def refuse_contradictions(
    path: Path, run: list[PrintedSession], spec: RunSpec, prediction: Prediction
) -> None:
    """Compare whatever the log says of its configuration.

    Raises:
        BadInput: for the first value that is another than the configuration has.
    """
    said: dict[str, tuple[int, str]] = {}
    for session in run:
        said |= session.settings  # a resumed run may have been given others: the last count
    on_cpu = prediction.hardware.kind == "cpu"
    if DEVICE in said:
        _refuse_other_device(path, *said.pop(DEVICE), on_cpu)
    if on_cpu:
        said.pop("dtype", None)  # nanoGPT's autocast is for cards alone
    for name, (line, text) in said.items():
        value = _value(text)
        key, ours = _ours(name, spec, prediction)
        if value is None or ours is None or _agree(name, value, ours):
            continue
        raise BadInput(
            f"line {line} of {path} has {name} = {shown(text)[1:-1]}, but the configuration has "
            f"{key} = {_text(ours)}; give the configuration of that run."
        )
    _refuse_other_rate(path, run, spec)
    last = max(session.last for session in run)
    if last > spec.steps:
        raise BadInput(
            f"{path} goes to step {last:,} but the configuration has "
            f"train.max_steps = {spec.steps:,}; give the configuration of that run."
        )


def _refuse_other_device(path: Path, line: int, text: str, on_cpu: bool) -> None:
    if (text.strip("'\"") == "cpu") == on_cpu:
        return
    what = "leave out run.device = cpu and name the card" if on_cpu else "give --run.device cpu"
    raise BadInput(
        f"line {line} of {path} has device = {shown(text)[1:-1]}; {what} "
        f"{'with' if on_cpu else 'instead of'} --gpu."
    )


def _refuse_other_rate(path: Path, run: list[PrintedSession], spec: RunSpec) -> None:
    """Tokens per second times seconds are tokens, whatever the program."""
    products = [
        entry.tokens_per_second * entry.seconds
        for session in run
        for entry in session.iterations
        if entry.tokens_per_second is not None and entry.seconds is not None
    ]
    if not products:
        return
    tokens, ours = statistics.median(products), spec.tokens_per_step
    if not 0.99 < tokens / ours < 1.01:
        raise BadInput(
            f"by its times and rates {path} made steps of {tokens:,.0f} tokens, but the "
            f"configuration has {ours:,} (train.micro_batch x model.block_size x "
            "train.grad_accum); give the configuration of that run."
        )


def _ours(name: str, spec: RunSpec, prediction: Prediction) -> tuple[str, _Value | None]:
    if name == TOKENS:
        return "train.micro_batch x model.block_size x train.grad_accum", spec.tokens_per_step
    if name == PARAMETERS:
        return "parameters without position embeddings", _expected(prediction, "parameters")
    if name == TOTAL_PARAMETERS:
        return "parameters with position embeddings", _expected(prediction, "parameters_total")
    return _KEYS[name], spec.setting(_KEYS[name])


def _expected(prediction: Prediction, row: str) -> float:
    return prediction.quantities[row].expected


def _value(text: str) -> _Value | None:
    """A number, a product of whole numbers, True, False or a quoted word; None for all else."""
    text = text.strip().rstrip(",")
    if text in ("True", "False"):
        return text == "True"
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.endswith("M"):
        text = text[:-1] + "e6"
    try:
        values = [number_of(factor) for factor in text.split("*")]
    except ValueError:
        return text if text.isidentifier() else None
    return math.prod(values)


def _agree(name: str, value: _Value, ours: _Value) -> bool:
    if isinstance(value, str):
        return value == ours or not isinstance(ours, str)  # a number's name tells nothing
    if isinstance(ours, str | bool):
        return value == ours
    if name == PARAMETERS:
        return abs(value - ours) < 5100  # printed in millions with two decimals
    return math.isclose(value, ours, rel_tol=1e-9)


def _text(value: _Value) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

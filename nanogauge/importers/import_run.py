"""Import of another program's log as a run folder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from nanogauge import __version__
from nanogauge.analysis.claims import Claims
from nanogauge.analysis.verdicts import build_rows
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, sha256_file, write_atomic
from nanogauge.importers.convert import to_run_log
from nanogauge.importers.parsed import LoggedProcess, ParsedLog, parse_number, split_runs, warning
from nanogauge.importers.text import quoted
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.reader import LOG_NAME, read_log
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Event, Prediction, Start

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
"""Setting as nanoGPT and nanochat name it -> key of our configuration."""
_TOKENS = "train.micro_batch x model.block_size x train.grad_accum"
_DERIVED = {
    "tokens_per_step": ("tokens per step", _TOKENS),
    "parameters": ("parameters", "parameters without position embeddings"),
    "total_parameters": ("parameters with position embeddings",) * 2,
}
"""Printed result of the configuration -> its name in a message, and what it corresponds to."""


def check_configuration(
    path: Path, run: list[LoggedProcess], spec: RunSpec, prediction: Prediction
) -> None:
    """Compare the configuration that a log prints with the one that the user gave.

    Raises:
        BadInput: for the first value that differs.
    """
    printed: dict[str, tuple[int, str]] = {}
    for process in run:
        printed |= process.settings  # of a resumed run the last values count
    on_cpu = prediction.hardware.kind == "cpu"
    if "device" in printed:
        _check_device(path, *printed["device"], on_cpu)
    if on_cpu:
        printed.pop("dtype", None)  # nanoGPT's autocast is used on GPUs only
    configured: dict[str, _Value | None] = {
        "tokens_per_step": spec.tokens_per_step,
        "parameters": prediction.quantities["parameters"].expected,
        "total_parameters": prediction.quantities["parameters_total"].expected,
        **{name: spec.setting(key) for name, key in _KEYS.items()},
    }
    for name, (line, text) in printed.items():
        value, ours = _parse_value(text), configured.get(name)
        if value is None or ours is None or _agree(name, value, ours):
            continue
        label, key = _DERIVED.get(name) or (name, _KEYS[name])
        raise BadInput(
            f"line {line} of {path} has {label} = {quoted(text)[1:-1]}, but the configuration has "
            f"{key} = {_format_value(ours)}; give the configuration of that run."
        )
    _check_tokens_per_second(path, run, spec)
    last = max(process.last_step for process in run)
    if last > spec.steps:
        raise BadInput(
            f"{path} contains step {last:,} but the configuration has "
            f"train.max_steps = {spec.steps:,}; give the configuration of that run."
        )


def _check_device(path: Path, line: int, text: str, on_cpu: bool) -> None:
    if (text.strip("'\"") == "cpu") != on_cpu:
        what = "leave out run.device = cpu and name the card" if on_cpu else "give --run.device cpu"
        raise BadInput(
            f"line {line} of {path} has device = {quoted(text)[1:-1]}; {what} "
            f"{'with' if on_cpu else 'instead of'} --gpu."
        )


def _check_tokens_per_second(path: Path, run: list[LoggedProcess], spec: RunSpec) -> None:
    """Compare tokens per second times seconds with the tokens of a step."""
    tokens = [
        step.tokens_per_second * step.seconds
        for process in run
        for step in process.steps
        if step.tokens_per_second is not None and step.seconds is not None
    ]
    if tokens and not 0.99 < statistics.median(tokens) / spec.tokens_per_step < 1.01:
        raise BadInput(
            f"by its times and rates {path} made steps of {statistics.median(tokens):,.0f} tokens, "
            f"but the configuration has {spec.tokens_per_step:,} ({_TOKENS}); "
            "give the configuration of that run."
        )


def _parse_value(text: str) -> _Value | None:
    """Return a number, product of numbers, boolean or word; None for any other expression."""
    text = text.strip().rstrip(",")
    if text in ("True", "False"):
        return text == "True"
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.endswith("M"):
        text = text[:-1] + "e6"
    try:
        return math.prod(parse_number(factor) for factor in text.split("*"))
    except ValueError:
        return text if text.isidentifier() else None


def _agree(name: str, value: _Value, ours: _Value) -> bool:
    if isinstance(value, str):
        return value == ours or not isinstance(ours, str)  # the name of a variable
    if isinstance(ours, str | bool):
        return value == ours
    if name == "parameters":
        return abs(value - ours) < 5100  # printed in millions with two decimals
    return math.isclose(value, ours, rel_tol=1e-9)


def _format_value(value: _Value) -> str:
    return str(value) if isinstance(value, str | bool) else f"{value:,.12g}"


def import_log(
    read: Callable[[Path], ParsedLog],
    log_path: Path,
    spec: RunSpec,
    prediction: Prediction,
    claims: Claims | None,
    claims_path: Path | None,
    out: Path,
    run_number: int | None = None,
) -> None:
    """Write a run folder from a log; replace an earlier import there, but never a trained run.

    Args:
        read: reader of the log's format.
        run_number: number of the run in a file with several, from 1; None for the last.

    Raises:
        BadInput: if the log or the claims cannot be used, the log contradicts the configuration,
            or out contains a trained run.
    """
    log = read(log_path)
    run, events = _select_run(log, log_path, run_number)
    check_configuration(log_path, run, spec, prediction)
    build_rows(claims, spec, prediction, None)  # raises for a claim that cannot be computed
    device = prediction.hardware.name
    lines = to_run_log(log.format, run, spec, device)
    if (out / LOG_NAME).exists():
        if read_log(out).starts[0].source == "train":
            raise BadInput(f"{out} holds a run that was trained here; choose another --out.")
        make_folder(out)
        (out / LOG_NAME).unlink()
    machine: dict[str, object] = {
        ("device" if prediction.hardware.kind == "cpu" else "gpu"): device,
        "log": log_path.name,
        "log_sha256": sha256_file(log_path),
        "imported_by": f"nanogauge {__version__}",
        "note": log.format.note,
        **log.machine,
    }
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    sha256 = create(out, spec, machine, prediction).prediction_sha256
    if claims_path is not None:
        write_atomic(out / CLAIMS_NAME, claims_path.read_bytes())
    with RunLog(out) as writer:
        for line in [*lines[:-1], *events, *log.events, lines[-1]]:
            hashed = {"prediction_sha256": sha256} if isinstance(line, Start) else {}
            writer.write(line.model_copy(update=hashed))


def _select_run(
    log: ParsedLog, path: Path, run_number: int | None
) -> tuple[list[LoggedProcess], list[Event]]:
    """Return one run of the file, and a warning if the file contains others."""
    runs = split_runs(log.processes)
    number = len(runs) if run_number is None else run_number
    if not 1 <= number <= len(runs):
        count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        raise BadInput(f"{path} holds {count}; there is no --run-number {run_number}.")
    if len(runs) == 1:
        return runs[0], []
    ranges = "; ".join(
        f"{n}: steps {run[0].first_step:,} to {run[-1].last_step:,} from line {run[0].line:,} on"
        for n, run in enumerate(runs[-5:], start=max(len(runs) - 4, 1))
    )
    message = (
        f"The log holds {len(runs)} runs ({ranges}). This is number {number}"
        f"{', the last' if number == len(runs) else ''}; --run-number selects another."
    )
    return runs[number - 1], [warning("several_runs", message)]

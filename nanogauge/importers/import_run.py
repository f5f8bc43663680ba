"""A run folder like our own, made of a log that another program wrote."""

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
from nanogauge.importers.convert import run_lines
from nanogauge.importers.parsed import Printed, PrintedSession, number_of, runs_of, warning
from nanogauge.importers.text import shown
from nanogauge.runlog.folder import CLAIMS_NAME, create
from nanogauge.runlog.reader import FILE_NAME, read_log
from nanogauge.runlog.writer import RunLog
from nanogauge.runspec import RunSpec
from nanogauge.schema import Event, Prediction

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


def import_log(
    read: Callable[[Path], Printed],
    log_path: Path,
    spec: RunSpec,
    prediction: Prediction,
    claims: Claims | None,
    claims_path: Path | None,
    out: Path,
    run_number: int | None = None,
) -> None:
    """Write out/ from a log; an earlier import there is replaced, a trained run never.

    Args:
        read: the reader of this form of log.
        run_number: which of several runs in the file, from 1; the last where it is None.

    Raises:
        BadInput: if the log or the claims are unusable, the log contradicts the configuration, or
            out holds a run of another origin.
    """
    log = read(log_path)
    run, events = _choose(log, log_path, run_number)
    refuse_contradictions(log_path, run, spec, prediction)
    build_rows(claims, spec, prediction, None)  # a claim that cannot be computed fails here
    max_steps, device = spec.steps, prediction.hardware.name
    compiled = bool(spec.compile)
    run_lines(log.form, run, max_steps, compiled, device, "")
    if (out / FILE_NAME).exists():
        if read_log(out).starts[0].source == "train":
            raise BadInput(f"{out} holds a run that was trained here; choose another --out.")
        make_folder(out)
        (out / FILE_NAME).unlink()
    machine: dict[str, object] = {
        ("device" if prediction.hardware.kind == "cpu" else "gpu"): device,
        "log": log_path.name,
        "log_sha256": sha256_file(log_path),
        "imported_by": f"nanogauge {__version__}",
        "note": log.form.note,
        **log.told,
    }
    spec = spec.resolved(prediction.dtype, prediction.gpus)
    folder = create(out, spec, machine, prediction)
    if claims_path is not None:
        write_atomic(out / CLAIMS_NAME, claims_path.read_bytes())
    lines = run_lines(log.form, run, max_steps, compiled, device, folder.prediction_sha256)
    with RunLog(out) as writer:
        for line in [*lines[:-1], *events, *log.events, lines[-1]]:
            writer.write(line)


def _choose(
    log: Printed, path: Path, run_number: int | None
) -> tuple[list[PrintedSession], list[Event]]:
    """One of the runs in the file, and a warning where there are others."""
    runs = runs_of(log.sessions)
    number = len(runs) if run_number is None else run_number
    if not 1 <= number <= len(runs):
        held = "one run" if len(runs) == 1 else f"{len(runs)} runs"
        raise BadInput(f"{path} holds {held}; there is no --run-number {run_number}.")
    if len(runs) == 1:
        return runs[0], []
    ranges = "; ".join(
        f"{n}: steps {run[0].first:,} to {run[-1].last:,} from line {run[0].line:,} on"
        for n, run in enumerate(runs[-5:], start=max(len(runs) - 4, 1))
    )
    said = (
        f"The log holds {len(runs)} runs ({ranges}). This is number {number}"
        f"{', the last' if number == len(runs) else ''}; --run-number takes another."
    )
    return runs[number - 1], [warning("several_runs", said)]

"""Command-line flags that import the log of another program into a run folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.config import config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.importers.formats import BUILD_NANOGPT, NANOCHAT, NANOGPT
from nanogauge.importers.import_run import import_log
from nanogauge.importers.wandb_history import read_wandb_history
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.programs import program_named
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction

LOG_FORMATS = {
    "nanogpt_log": (NANOGPT.read, "LOG", "output of nanoGPT"),
    "nanochat_log": (NANOCHAT.read, "LOG", "output of nanochat's base_train"),
    "build_nanogpt_log": (BUILD_NANOGPT.read, "LOG", "log.txt or output of build-nanogpt"),
    "wandb_history": (read_wandb_history, "FILE", "history of a W&B run as CSV"),
}
"""Flag of a format -> its reader, and its metavar and help."""
_REQUIRED = ("config", "out")
_FLAGS = (*_REQUIRED, "gpu", "this_cpu", "run_number")
_UNNAMED_CPU = Hardware(
    name="CPU",
    kind="cpu",
    architecture="cpu",
    peak_flops=None,
    peak_name="not known: the log does not name its processor",
    matmul_flops=None,
    memory_bytes=None,
    bandwidth_bytes_per_second=None,
    power_limit_watts=None,
    source="run.device of the configuration",
)
MeasureCpu = Callable[[str], Hardware]
"""Measures the CPU of this machine in a dtype."""


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    """Add a flag per format, which names the log to import."""
    formats = group.add_mutually_exclusive_group()
    for name, (_, metavar, words) in LOG_FORMATS.items():
        formats.add_argument(_flag(name), type=Path, metavar=metavar, help=words)


def add_import_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that describe the run of an imported log."""
    group.add_argument("--config", type=Path, help="configuration of that run")
    group.add_argument("--gpu", help="the GPU it ran on, as in nanogauge/hardware.toml")
    group.add_argument(
        "--this-cpu",
        action="store_true",
        default=None,
        help="it ran on the CPU of this machine, which is measured now",
    )
    group.add_argument("--out", type=Path, help="run folder to write")
    group.add_argument(
        "--run-number", type=int, metavar="K", help="run to import from a log of several"
    )


def import_given(
    given: argparse.Namespace, allowed: Set[str], measure_cpu: MeasureCpu | None
) -> Path | None:
    """Import the log that a flag of add_log_flags names; return its folder, or None without one.

    Args:
        given: Command line.
        allowed: Sections of the configuration whose flags are valid without a log.
        measure_cpu: Serves --this-cpu; None outside a checkout.

    Raises:
        BadInput: if a flag is missing or out of place, or as import_log; nothing is written then.
    """
    name = next((n for n in LOG_FORMATS if getattr(given, n) is not None), None)
    if name is not None:
        if given.run is not None:
            raise BadInput(f"give either a run folder or {_flag(name)}, not both.")
        return import_as(given, name, getattr(given, name), measure_cpu)
    misplaced = [_flag(flag) for flag in _FLAGS if getattr(given, flag) is not None]
    if config_overrides(given).keys() - allowed:
        misplaced.append("a configuration flag")
    if misplaced:
        raise BadInput(
            f"{misplaced[0]} belongs to --nanogpt-log and other logs; a run folder has its own."
        )
    return None


def import_as(
    given: argparse.Namespace, name: str, log: Path, measure_cpu: MeasureCpu | None
) -> Path:
    """Write a run folder from a log of the format `name`; nothing is written on bad input.

    Raises:
        BadInput: as import_given.
    """
    for flag in _REQUIRED:
        if getattr(given, flag) is None:
            raise BadInput(f"an imported log also needs {_flag(flag)}.")
    overrides = config_overrides(given)
    # None of these programs has a chunked head.
    overrides["train"] = {"head": "plain"} | overrides.get("train", {})
    spec = load_config(given.config, overrides).to_spec()
    if name.endswith("_log"):
        program = name.removesuffix("_log").replace("_", "-")
        spec = replace(spec, program=program_named(program))
    claims = load_claims(given.claims) if given.claims is not None else None
    prediction = _predict(given, spec, measure_cpu)
    out: Path = given.out
    reader = LOG_FORMATS[name][0]
    import_log(reader, log, spec, prediction, claims, given.claims, out, given.run_number)
    return out


def _predict(
    given: argparse.Namespace, spec: RunSpec, measure_cpu: MeasureCpu | None
) -> Prediction:
    """Return the prediction of an imported run on the device that the user names.

    Raises:
        BadInput: if no device is named, or two are.
    """
    if spec.device != "cpu":
        if given.this_cpu:
            raise BadInput(
                '--this-cpu is for a run on a CPU: its configuration has run.device = "cpu".'
            )
        if given.gpu is None:
            raise BadInput(
                "an imported log also needs --gpu, the card it ran on; for a run on a CPU give "
                "--run.device cpu instead."
            )
        return predict(spec, lookup(given.gpu, resolve_dtype(spec, on_gpu=True)))
    if given.gpu is not None:
        raise BadInput(
            '--gpu names a card, but the configuration has run.device = "cpu"; drop one of them.'
        )
    hardware = _UNNAMED_CPU
    if given.this_cpu:
        if measure_cpu is None:
            raise BadInput("--this-cpu needs a checkout of nanogauge: use report.py there.")
        hardware = measure_cpu(resolve_dtype(spec, on_gpu=False))
    prediction = predict(spec, hardware)
    # The memory of a process before it creates its model is known only for train.py.
    row = "peak_process_bytes"
    quantities = {r: q for r, q in prediction.quantities.items() if r != row}
    reason = {row: "what that program held before its model is not known"}
    unpredicted = prediction.unpredicted | reason
    return prediction.model_copy(update={"quantities": quantities, "unpredicted": unpredicted})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

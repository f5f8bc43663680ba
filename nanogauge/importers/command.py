"""Command-line flags of the import, and the import itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Set
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.cli import shipped
from nanogauge.config import config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.importers.formats import BUILD_NANOGPT, NANOCHAT, NANOGPT
from nanogauge.importers.import_run import import_log
from nanogauge.importers.wandb_history import read_wandb_history
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction

_READERS = {
    "nanogpt_log": (NANOGPT.read, "LOG", "output of nanoGPT"),
    "nanochat_log": (NANOCHAT.read, "LOG", "output of nanochat's base_train"),
    "build_nanogpt_log": (BUILD_NANOGPT.read, "LOG", "build-nanogpt's log.txt or output"),
    "wandb_history": (read_wandb_history, "FILE", "history of a W&B run, CSV or Parquet"),
}
_REQUIRED = ("config", "out")
_ALL = (*_REQUIRED, "gpu", "this_cpu", "run_number")
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


def add_import_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("import the log of another program")
    formats = group.add_mutually_exclusive_group()
    for name, (_, metavar, text) in _READERS.items():
        formats.add_argument(_flag(name), type=shipped, metavar=metavar, help=text)
    group.add_argument("--config", type=shipped, help="configuration of that run")
    group.add_argument("--gpu", help="the GPU it ran on, as in nanogauge/hardware.toml")
    group.add_argument(
        "--this-cpu",
        action="store_true",
        default=None,
        help="it ran on the CPU of this machine, which is measured now",
    )
    group.add_argument("--out", type=Path, help="run folder to write")
    group.add_argument(
        "--run-number", type=int, metavar="K", help="number of the run in a log with several"
    )


def import_from_flags(
    given: argparse.Namespace, allowed: Set[str], measure_cpu: Callable[[str], Hardware]
) -> Path | None:
    """Import the log that the flags name and return its run folder; None without such a flag.

    Args:
        given: the parsed command line.
        allowed: sections of the configuration whose flags are allowed without a log.
        measure_cpu: measures this machine's CPU in a data type, for --this-cpu.

    Raises:
        BadInput: if a flag is missing or out of place, or as import_log; nothing is written then.
    """
    name = next((n for n in _READERS if getattr(given, n) is not None), None)
    if name is None:
        own = "belongs to --nanogpt-log and other logs; a run folder has its own."
        for flag in _ALL:
            if getattr(given, flag) is not None:
                raise BadInput(f"{_flag(flag)} {own}")
        for section in config_overrides(given).keys() - allowed:
            raise BadInput(f"a flag --{section}.KEY {own}")
        return None
    if given.run is not None:
        raise BadInput(f"give either a run folder or {_flag(name)}, not both.")
    for flag in _REQUIRED:
        if getattr(given, flag) is None:
            raise BadInput(f"{_flag(name)} also needs {_flag(flag)}.")
    overrides = config_overrides(given)
    # No other program has chunked cross-entropy.
    overrides["train"] = {"head": "plain"} | overrides.get("train", {})
    spec = load_config(given.config, overrides).to_spec()
    claims = load_claims(given.claims) if given.claims is not None else None
    prediction = _predict(spec, given.gpu, measure_cpu if given.this_cpu else None, _flag(name))
    read, log, out = _READERS[name][0], getattr(given, name), given.out
    import_log(read, log, spec, prediction, claims, given.claims, out, given.run_number)
    return Path(out)


def _predict(
    spec: RunSpec, gpu: str | None, measure_cpu: Callable[[str], Hardware] | None, log_flag: str
) -> Prediction:
    """Predict the run on the device that the user names.

    Raises:
        BadInput: if no device is named, or two are.
    """
    if spec.device != "cpu":
        if measure_cpu is not None:
            raise BadInput(
                '--this-cpu is for a run on a CPU: its configuration has run.device = "cpu".'
            )
        if gpu is None:
            raise BadInput(
                f"{log_flag} also needs --gpu, the card it ran on; for a run on a CPU give "
                "--run.device cpu instead."
            )
        return predict(spec, lookup(gpu, resolve_dtype(spec, on_gpu=True)))
    if gpu is not None:
        raise BadInput(
            '--gpu names a card, but the configuration has run.device = "cpu"; drop one of them.'
        )
    hardware = _UNNAMED_CPU
    if measure_cpu is not None:
        hardware = measure_cpu(resolve_dtype(spec, on_gpu=False))
    prediction = predict(spec, hardware)
    # Host memory before the model is created is calibrated for our own process only.
    row = "peak_process_bytes"
    quantities = {r: estimate for r, estimate in prediction.quantities.items() if r != row}
    reason = "what that program held before its model is not known"
    unpredicted = {**prediction.unpredicted, row: reason}
    return prediction.model_copy(update={"quantities": quantities, "unpredicted": unpredicted})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

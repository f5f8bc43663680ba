"""The flags by which report.py makes a run folder of somebody else's log."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Set
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.cli import shipped
from nanogauge.config import config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.importers.build_nanogpt import read_build_nanogpt_log
from nanogauge.importers.import_run import import_log
from nanogauge.importers.nanochat import read_nanochat_log
from nanogauge.importers.nanogpt import read_nanogpt_log
from nanogauge.importers.wandb_history import read_wandb_history
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.runspec import RunSpec
from nanogauge.schema import Hardware, Prediction

_READERS = {
    "nanogpt_log": (read_nanogpt_log, "LOG", "what nanoGPT printed"),
    "nanochat_log": (read_nanochat_log, "LOG", "what nanochat's base_train printed"),
    "build_nanogpt_log": (read_build_nanogpt_log, "LOG", "build-nanogpt's log.txt or its output"),
    "wandb_history": (read_wandb_history, "FILE", "a run's history from W&B, CSV or Parquet"),
}
_NEEDED = ("config", "out")
_ALL = (*_NEEDED, "gpu", "this_cpu", "run_number")
_SOME_CPU = Hardware(
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
    one = group.add_mutually_exclusive_group()
    for name, (_, kind, words) in _READERS.items():
        one.add_argument(_flag(name), type=shipped, metavar=kind, help=words)
    group.add_argument("--config", type=shipped, help="configuration of that run")
    group.add_argument("--gpu", help="the GPU it ran on, as in nanogauge/hardware.toml")
    group.add_argument(
        "--this-cpu",
        action="store_true",
        default=None,
        help="it ran on the CPU of this machine, which is measured now",
    )
    group.add_argument("--out", type=Path, help="run folder to make of it")
    group.add_argument(
        "--run-number", type=int, metavar="K", help="which run of a log that holds several"
    )


def import_given(
    given: argparse.Namespace, allowed: Set[str], measure_cpu: Callable[[str], Hardware]
) -> Path | None:
    """Make a run folder of the log that was given; None where none was.

    Nothing is written before everything was understood.

    Args:
        given: the command line.
        allowed: sections of the configuration whose flags make sense without a log, too.
        measure_cpu: measures the CPU of this machine in a dtype, for --this-cpu.

    Raises:
        BadInput: if a flag is missing or out of place, or as import_log.
    """
    name = next((n for n in _READERS if getattr(given, n) is not None), None)
    if name is None:
        for flag in _ALL:
            if getattr(given, flag) is not None:
                raise BadInput(f"{_flag(flag)} belongs to --nanogpt-log and other logs; {_OWN}")
        if config_overrides(given).keys() - allowed:
            raise BadInput(f"configuration flags belong to --nanogpt-log and other logs; {_OWN}")
        return None
    if given.run is not None:
        raise BadInput(f"give either a run folder or {_flag(name)}, not both.")
    for flag in _NEEDED:
        if getattr(given, flag) is None:
            raise BadInput(f"{_flag(name)} also needs {_flag(flag)}.")
    overrides = config_overrides(given)
    # None of these programs has a chunked head.
    spec = load_config(
        given.config, overrides | {"train": {"head": "plain"} | overrides.get("train", {})}
    ).to_spec()
    claims = load_claims(given.claims) if given.claims is not None else None
    prediction = _predict(spec, given.gpu, bool(given.this_cpu), _flag(name))
    out: Path = given.out
    import_log(
        _READERS[name][0],
        getattr(given, name),
        spec,
        prediction,
        claims,
        given.claims,
        out,
        given.run_number,
    )
    return out


def _predict(spec: RunSpec, gpu: str | None, this_cpu: bool, log: str) -> Prediction:
    """What would have been predicted of that run, on the device that the user names.

    Raises:
        BadInput: if no device is named, or two are.
    """
    if spec.device != "cpu":
        if this_cpu:
            raise BadInput(
                '--this-cpu is for a run on a CPU: its configuration has run.device = "cpu".'
            )
        if gpu is None:
            raise BadInput(
                f"{log} also needs --gpu, the card it ran on; for a run on a CPU give "
                "--run.device cpu instead."
            )
        return predict(spec, lookup(gpu, resolve_dtype(spec, on_gpu=True)))
    if gpu is not None:
        raise BadInput(
            '--gpu names a card, but the configuration has run.device = "cpu"; drop one of them.'
        )
    hardware = _SOME_CPU
    if this_cpu:
        from trainer.calibrate import this_processor

        hardware = this_processor(resolve_dtype(spec, on_gpu=False))
    found = predict(spec, hardware)
    # What a process holds before it makes its model is known of our own alone.
    row = "peak_process_bytes"
    told = {r: estimate for r, estimate in found.quantities.items() if r != row}
    why = {**found.unpredicted, row: "what that program held before its model is not known"}
    return found.model_copy(update={"quantities": told, "unpredicted": why})


_OWN = "a run folder has its own."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

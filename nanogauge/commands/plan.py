"""Predict a run before it starts: time, memory, energy, cost, and what else would fit."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.verdicts import build_rows
from nanogauge.cli import Parser, print_json
from nanogauge.commands.doctor import LoadTools, check_machine
from nanogauge.config import Config, add_config_flags, config_overrides, given_config
from nanogauge.doctor.machine import memory_to_plan_with
from nanogauge.errors import BadInput
from nanogauge.files import make_folder, write_atomic
from nanogauge.hardware import auto_dtype, lookup, read_gpus
from nanogauge.importers.nanogpt_config import load_nanogpt_config
from nanogauge.prediction.calibrated import Calibration, load_calibration
from nanogauge.prediction.loss import FinishedLoss
from nanogauge.prediction.overheads import preparation_seconds
from nanogauge.prediction.plan import BestPlan, best_toml, parse_duration, plan_best, plan_deadline, plan_fit
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.quality import load_losses
from nanogauge.prediction.search import choose_head
from nanogauge.quantities import next_time
from nanogauge.report.terminal import print_best, print_plan
from nanogauge.runspec import RunSpec
from nanogauge.schema import SCHEMA, FreeMemory, Hardware, Prediction
from nanogauge.sinks.mode import obeying_config

_EXAMPLES = """
  %(prog)s configs/rtx4070_fineweb.toml --gpu "RTX 4070" --claims predictions/seed_zh.toml
  %(prog)s configs/rtx4070_fineweb.toml --gpu "RTX 4070" --by 08:00
  %(prog)s --best 8h --gpu "RTX 4070" --write MINE.toml
  %(prog)s --doctor configs/demo.toml
  %(prog)s config/train_gpt2.py --write configs/mine.toml      # a configuration of nanoGPT
"""


def _make_parser() -> Parser:
    parser = Parser(f"{__doc__}\n{_EXAMPLES}", usage="%(prog)s [CONFIG] [--gpu GPU] [options]")
    parser.add_argument("config", type=Path, nargs="?", help="configuration of the run")
    parser.add_argument("--gpu", help='name of a row of nanogauge/hardware.toml: "RTX 4070"')
    parser.add_argument("--gpu-file", type=Path, metavar="FILE", help="TOML file with [[gpu]] rows of your own")
    parser.add_argument("--power-limit", type=float, metavar="W", help="power limit of the GPU")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs that share each step")
    parser.add_argument("--free-vram-gib", type=float, metavar="GIB", help="free memory per GPU")
    parser.add_argument("--claims", type=Path, help="claims to compare with the plan")
    parser.add_argument(
        "--best",
        nargs="?",
        const="",
        metavar="8h",
        help="find the run with the lowest predicted loss that ends in this time, or --by a time",
    )
    parser.add_argument("--sure", action="store_true", help="--best: even if the device is slow")
    parser.add_argument("--by", metavar="08:00", help="show the best runs that end by this time")
    parser.add_argument("--start", metavar="22:00", help="start of the run (default: now)")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the local device for up to a minute and plan for it"
    )
    parser.add_argument("--doctor", action="store_true", help="check whether this machine is ready for a run")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the configuration, with all its keys")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    add_config_flags(parser)
    return parser


def main(arguments: Sequence[str], load_tools: LoadTools | None = None) -> int:
    given = _make_parser().parse(arguments)
    if given.doctor:
        _refuse_flags_of_a_plan(given)
        return check_machine(obeying_config(given), given.json, load_tools)
    if given.gpus < 1:
        raise BadInput("--gpus takes a number of GPUs above 0.")
    return _plan(given, load_tools)


def _plan(given: Namespace, load_tools: LoadTools | None) -> int:
    """Print the plan of one run, or of the best run in a given time."""
    if given.best is not None and given.config is None:
        given.config = Path(str(files("nanogauge").joinpath("base.toml")))
    config = _given_config(given)
    if config is None:
        raise BadInput("give the configuration of a run: configs/ holds examples.")
    if given.best is None and given.write is not None:
        _write(f"# From {given.config}\n\n{config.to_toml()}", given.write)
        if given.gpu is None and not given.calibrate:
            return 0
    now = datetime.now().astimezone().replace(microsecond=0)
    start = next_time(given.start, now, "--start") if given.start is not None else now
    by = next_time(given.by, start, "--by") if given.by is not None else None
    spec = RunSpec.from_config(config)
    claims = load_claims(given.claims) if given.claims is not None else None
    if given.calibrate:
        if load_tools is None:
            raise BadInput("--calibrate needs a checkout of nanogauge: use plan.py there.")
        if given.gpu_file is not None or given.power_limit is not None:
            raise BadInput(
                "--calibrate measures the local GPU at its own limit; leave out --gpu-file and --power-limit."
            )
        target = Target(*load_tools().calibrate(config, given.gpu))
    else:
        target = _named_target(spec, given)
    spec = spec.resolved(target.dtype, given.gpus)
    free = memory_to_plan_with(target.hardware, given.free_vram_gib, given.gpus)
    if config.train.head == "auto":
        spec = replace(spec, head=choose_head(spec, target.hardware, free.bytes))
    prediction, best = target.predict(spec), None
    if given.best is not None or (by is not None and prediction.best("total_seconds")):
        best = _best(given, config, spec, target, free, None if by is None else by.timestamp() - start.timestamp())
    rows, findings = build_rows(claims, spec, prediction, None)
    fit = plan_fit(spec, target.predict, free)
    data, preparation = config.data, None
    if data.folder is not None and data.tokens is not None and not data.folder.exists():
        preparation = preparation_seconds(data.tokens)
    deadline = plan_deadline(spec, target.predict, start, by, preparation)
    if not given.json:
        if given.best is None:
            print_plan(spec, prediction, rows, findings, fit, deadline, now)
        if best is not None:
            print_best(best, spec, target.hardware.name)
        return 0
    plan = {
        "schema": SCHEMA,
        "gpus": given.gpus,
        "rows": [row.model_dump(mode="json") for row in rows],
        "fit": fit.model_dump(mode="json"),
        "deadline": deadline.model_dump(mode="json"),
        "best": None if best is None else best.model_dump(mode="json"),
        "inconsistencies": [finding.model_dump(mode="json") for finding in findings],
    }
    print_json(plan)
    return 0


def _best(
    given: Namespace, config: Config, spec: RunSpec, target: Target, free: FreeMemory, until_by: float | None
) -> BestPlan:
    """Return the runs with the lowest predicted loss in the time given, and write the best.

    `until_by` is the time from --start to --by in seconds; None without --by.
    """
    seconds = parse_duration(given.best, "--best") if given.best else until_by
    if seconds is None:
        raise BadInput("--best needs a time: --best 8h, or --best --by 07:00.")
    plan, specs = plan_best(spec, target.predict, free, seconds, given.sure)
    best = specs.get("best")
    if given.best is not None and best is None:
        raise BadInput(plan.notes[-1])
    if given.write is not None and best is not None:
        _write(best_toml(config, best, plan, target.hardware.name, str(given.write)), given.write)
    return plan


def _given_config(given: Namespace) -> Config | None:
    """Load the configuration that the command line names, which may be one of nanoGPT's."""
    if given.config is not None and given.config.suffix == ".py":
        return load_nanogpt_config(given.config, config_overrides(given))
    return given_config(given)


def _write(text: str, path: Path) -> None:
    if path.exists():
        raise BadInput(f"{path} exists: --write takes the name of a new file.")
    make_folder(path.parent)
    write_atomic(path, text.encode())
    print(f"{path} holds the configuration.", file=sys.stderr)


def _refuse_flags_of_a_plan(given: Namespace) -> None:
    """Reject flags that --doctor would ignore."""
    defaults = _make_parser()
    for name, value in vars(given).items():
        ignored = "." not in name and name not in ("doctor", "config", "json")
        if ignored and value != defaults.get_default(name):
            flag = name.replace("_", "-")
            raise BadInput(f"--{flag} belongs to a plan; --doctor checks this machine.")


@dataclass(frozen=True)
class Target:
    """The device to plan for, with its calibration if it has been measured."""

    hardware: Hardware
    dtype: str
    calibration: Calibration | None
    warning: str | None
    losses: Sequence[FinishedLoss] = field(default_factory=load_losses)

    def predict(self, spec: RunSpec) -> Prediction:
        prediction = predict(spec, self.hardware, self.calibration, losses=self.losses)
        if self.warning is None:
            return prediction
        return prediction.model_copy(update={"notes": [*prediction.notes, self.warning]})


def _named_target(spec: RunSpec, given: Namespace) -> Target:
    """Return the GPU that the flags name, with the calibration this machine has stored for it.

    Raises:
        BadInput: without a name, for one that has no row, or for a power limit that is not above 0.
    """
    if given.gpu is None:
        raise BadInput("--gpu is missing: name the GPU to plan for, or measure the local device with --calibrate.")
    if given.power_limit is not None and not given.power_limit > 0:
        raise BadInput("--power-limit takes watts above 0.")
    own = read_gpus(given.gpu_file) if given.gpu_file is not None else ()
    dtype = spec.dtype or auto_dtype(given.gpu, own)
    hardware = lookup(given.gpu, dtype, given.power_limit, own)
    if given.power_limit is not None:
        return Target(hardware, dtype, None, None)  # calibrations hold for the limit they ran at
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return Target(hardware, dtype, None, None)  # calibrations are stored per torch version
    return Target(hardware, dtype, *load_calibration(hardware.name, torch_version, None))

"""What a run will need, whether it fits, when it ends, and which claims about it cannot be true.

python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --claims predictions/seed_zh.toml
python plan.py configs/rtx4070_fineweb.toml --gpu "RTX 4070" --fit --by 08:00
python plan.py --compare configs/*.toml --gpu "RTX 4070"    # which of them in one night?
python plan.py --doctor    # is this machine ready for a night? with a configuration: for that run?
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version

from nanogauge.analysis.claims import load_claims
from nanogauge.analysis.verdicts import build_rows
from nanogauge.cli import Parser, run_command, shipped
from nanogauge.config import Config, add_config_flags, config_overrides, load_config
from nanogauge.doctor.checks import worst
from nanogauge.doctor.machine import memory_to_plan_with
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.prediction.calibrated import Calibration
from nanogauge.prediction.calibration_store import load_calibration
from nanogauge.prediction.compare_configs import plan_all
from nanogauge.prediction.overheads import preparation_seconds
from nanogauge.prediction.plan import make_wish, plan_deadline, plan_fit
from nanogauge.prediction.prediction import predict
from nanogauge.prediction.search import TOKENS_PER_PARAMETER
from nanogauge.prediction.workload import resolve_dtype
from nanogauge.report.terminal import print_plan, print_plans
from nanogauge.runspec import RunSpec
from nanogauge.schema import SCHEMA, Hardware, Prediction


def make_parser() -> Parser:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("config", type=shipped, nargs="?", help="configuration of the run")
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="no plan: go, warn or no-go on this machine, and on what the run needs of it",
    )
    parser.add_argument(
        "--compare",
        type=shipped,
        nargs="+",
        metavar="CONFIG",
        help="no plan of one run: a table of several, the shortest first",
    )
    parser.add_argument("--gpu", help='a row of nanogauge/hardware.toml: "RTX 4070"')
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the device that is here for up to a minute, and plan for it",
    )
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="so many of them share the micro-batches"
    )
    parser.add_argument("--free-vram-gib", type=float, metavar="GIB", help="memory that is free")
    parser.add_argument("--claims", type=shipped, help="claims to hold against the plan")
    parser.add_argument("--fit", action="store_true", help="the largest models that would fit")
    parser.add_argument("--by", metavar="08:00", help="what would end by then")
    parser.add_argument("--start", metavar="22:00", help="when the run starts; now if not given")
    parser.add_argument(
        "--tokens-per-parameter",
        type=float,
        default=TOKENS_PER_PARAMETER,
        metavar="N",
        help="of the model that would end --by then; 20 is Chinchilla's",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_config_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    given = make_parser().parse(arguments)
    if given.doctor:
        return doctor(given)
    if given.compare is not None:
        return compare(given)
    if given.config is None:
        raise BadInput("give the configuration of a run: configs/ holds examples.")
    refuse_no_gpus(given.gpus)
    now = datetime.now().astimezone().replace(microsecond=0)
    wish = make_wish(now, given.start, given.by, given.tokens_per_parameter)
    config = load_config(given.config, config_overrides(given))
    spec = config.to_spec()
    claims = load_claims(given.claims) if given.claims is not None else None
    if given.calibrate:
        device = measured_device(config, given.gpu)
    else:
        device = named_device(spec, given.gpu)
    spec = spec.resolved(device.dtype, given.gpus)
    prediction = device.predict(spec)
    rows, findings = build_rows(claims, spec, prediction, None)
    free = memory_to_plan_with(prediction.hardware, given.free_vram_gib, given.gpus)
    fit = plan_fit(spec, device.predict, free, models=given.fit)
    data, preparation = config.data, None
    if data.folder is not None and data.tokens is not None and not data.folder.exists():
        preparation = preparation_seconds(data.tokens)
    deadline = plan_deadline(spec, device.predict, free, wish, preparation)
    if not given.json:
        print_plan(spec, prediction, rows, findings, fit, deadline, now)
        return 0
    plan = {
        "schema": SCHEMA,
        "gpus": given.gpus,
        "rows": [row.model_dump(mode="json") for row in rows],
        "fit": fit.model_dump(mode="json"),
        "deadline": deadline.model_dump(mode="json"),
        "inconsistencies": [finding.model_dump(mode="json") for finding in findings],
    }
    print(json.dumps(plan, indent=1, ensure_ascii=False))
    return 0


def refuse_no_gpus(gpus: int) -> None:
    """Refuse a number of GPUs that is none.

    Raises:
        BadInput: below 1.
    """
    if gpus < 1:
        raise BadInput("--gpus takes a number of GPUs from 1 on.")


def compare(given: Namespace) -> int:
    """Plan several configurations, each as it would be planned by itself, and print them together.

    Raises:
        BadInput: for one that is broken, naming it, or with a flag that asks about a single run.
    """
    defaults = make_parser()
    for name in ("calibrate", "claims", "fit", "by", "tokens_per_parameter"):
        if getattr(given, name) != defaults.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} belongs to the plan of one run; leave it or --compare out.")
    refuse_no_gpus(given.gpus)
    paths = [path for path in (given.config, *given.compare) if path is not None]
    now = datetime.now().astimezone().replace(microsecond=0)
    start = make_wish(now, given.start, None, TOKENS_PER_PARAMETER).start

    def predicted(spec: RunSpec) -> Prediction:
        return named_device(spec, given.gpu).predict(spec)

    def free_bytes_of(prediction: Prediction) -> int:
        hardware = prediction.hardware
        return memory_to_plan_with(hardware, given.free_vram_gib, prediction.gpus).bytes

    overrides = config_overrides(given)
    plans = plan_all(paths, overrides, predicted, free_bytes_of, start, given.gpus)
    if given.json:
        told = {
            "schema": SCHEMA,
            "gpus": given.gpus,
            "start": start.isoformat(),
            "plans": [plan.model_dump(mode="json") for plan in plans],
        }
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print_plans(plans, given.gpu, given.gpus, now)
    return 0


def doctor(given: Namespace) -> int:
    """Examine the machine that is here; 1 if a run had better not start.

    Raises:
        BadInput: if it is asked for together with a plan.
    """
    defaults = make_parser()
    for name, value in vars(given).items():
        flag = "--" + name.replace("_", "-")
        if "." in name and given.config is None:
            raise BadInput(f"{flag} changes a configuration; give one.")
        of_a_plan = "." not in name and name not in ("config", "doctor", "json")
        if of_a_plan and value != defaults.get_default(name):
            raise BadInput(f"{flag} belongs to a plan; --doctor examines the machine that is here.")
    from nanogauge.doctor.preflight import DEFAULT_RUN, examine, print_checks
    from trainer.calibrate import probe  # imports torch, for which no other plan has to wait
    from trainer.data.dataset import count_training_tokens

    config = load_config(given.config, config_overrides(given)) if given.config else None
    device = probe(config.run if config is not None else DEFAULT_RUN)
    findings = examine(config, device, count_training_tokens)
    verdict = worst(findings)
    if given.json:
        told = {"schema": SCHEMA, "doctor": [asdict(f) for f in findings], "verdict": verdict}
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print_checks(findings)
    return 1 if verdict == "no-go" else 0


@dataclass(frozen=True)
class Device:
    """What to plan for, and what is known of it."""

    hardware: Hardware
    dtype: str
    calibration: Calibration | None
    warning: str | None

    def predict(self, spec: RunSpec) -> Prediction:
        found = predict(spec, self.hardware, self.calibration)
        if self.warning is None:
            return found
        return found.model_copy(update={"notes": [*found.notes, self.warning]})


def named_device(spec: RunSpec, gpu: str | None) -> Device:
    """A card by its name, with what is known of it if it trained or was measured in this machine.

    Raises:
        BadInput: without a name, or for one that has no row.
    """
    if gpu is None:
        raise BadInput(
            "--gpu is missing: name the card to plan for, or measure the device that is here "
            "with --calibrate."
        )
    dtype = resolve_dtype(spec, on_gpu=True)
    hardware = lookup(gpu, dtype)
    return Device(hardware, dtype, *load_calibration(hardware.name, version("torch"), None))


def measured_device(config: Config, gpu: str | None) -> Device:
    """The device that is here, measured now.

    Raises:
        BadInput: if a card is named that is not here, or the device cannot run this.
    """
    from trainer.calibrate import calibrate  # imports torch, for which no other plan has to wait

    return Device(*calibrate(config, gpu))


if __name__ == "__main__":
    run_command(main)

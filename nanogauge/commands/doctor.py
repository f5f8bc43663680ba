"""Check whether this machine, and a run on it, are ready to train."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogauge.cli import Parser, print_json
from nanogauge.config import Config, RunSection, add_config_flags
from nanogauge.doctor.checks import worst
from nanogauge.doctor.preflight import DEFAULT_RUN, Device, device_without_torch, examine, print_checks
from nanogauge.prediction.calibrated import Calibration
from nanogauge.schema import SCHEMA, Hardware
from nanogauge.sinks.mode import obeying_config


@dataclass(frozen=True)
class DeviceTools:
    """Functions that measure the local device with torch; available in a source checkout only."""

    calibrate: Callable[[Config, str | None], tuple[Hardware, str, Calibration, str | None]]
    probe: Callable[[RunSection], Device]
    count_tokens: Callable[[Config], tuple[int, int]]


LoadTools = Callable[[], DeviceTools]
"""Imports the DeviceTools, and with them torch, when a command needs them."""


def main(arguments: Sequence[str], load_tools: LoadTools | None = None) -> int:
    parser = Parser(f"{__doc__}\n\n  %(prog)s\n  %(prog)s configs/demo.toml")
    parser.add_argument("config", type=Path, nargs="?", help="configuration of the run")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    add_config_flags(parser)
    given = parser.parse(arguments)
    return check_machine(obeying_config(given), given.json, load_tools)


def check_machine(config: Config | None, as_json: bool, load_tools: LoadTools | None) -> int:
    """Print the findings on this machine; return 1 if any of them is a no-go."""
    run = config.run if config is not None else DEFAULT_RUN
    if load_tools is None:
        findings = examine(config, device_without_torch(run))
    else:
        tools = load_tools()
        findings = examine(config, tools.probe(run), tools.count_tokens)
    verdict = worst(findings)
    if as_json:
        print_json({"schema": SCHEMA, "doctor": [asdict(f) for f in findings], "verdict": verdict})
    else:
        print_checks(findings)
    return 1 if verdict == "no-go" else 0

"""Compare a run that has finished, died or is still running with its prediction and with claims."""

import sys
from argparse import Namespace, _ActionsContainer
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nanogauge.analysis.report_model import build_report, claims_of, report_schema
from nanogauge.cli import Parser, print_json
from nanogauge.config import add_config_flags, config_overrides, wandb_section
from nanogauge.errors import BadInput
from nanogauge.importers.described import Given
from nanogauge.importers.import_run import import_log
from nanogauge.report.compare_runs import Comparison
from nanogauge.report.html import write_report
from nanogauge.report.terminal import print_report
from nanogauge.runlog.folder import CONFIG_TOML
from nanogauge.sinks.mirror import upload
from nanogauge.sinks.mode import Mode, switched_off

_EXAMPLES = """
  %(prog)s runs/NAME --claims predictions/seed_zh.toml
  %(prog)s runs/ONE runs/OTHER
  %(prog)s --wandb runs/NAME
  %(prog)s --log LOG --gpu "RTX 4070" --out runs/imported
"""
_IMPORT_EXAMPLES = """
  %(prog)s train.log --gpu "RTX 4070" --out runs/imported
  %(prog)s history.csv --config CONFIG --run.device cpu --out runs/imported
"""
_LOG_FLAGS = ("--log", "--nanogpt-log", "--nanochat-log", "--build-nanogpt-log", "--wandb-history")
_OF_A_LOG = ("config", "gpu", "gpus", "out", "run_number")
"""Flags that describe the run of an imported log."""


def _make_parser() -> Parser:
    parser = Parser(f"{__doc__}\n{_EXAMPLES}", usage="%(prog)s [RUN ...] [options]")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--claims", type=Path, help="claims to compare with the run")
    parser.add_argument("--json", action="store_true", help="print only report.json")
    parser.add_argument("--wandb", action="store_true", help="upload the run to W&B")
    parser.add_argument("--schema", action="store_true", help="print the schema of report.json")
    group = parser.add_argument_group("import the log of another program")
    group.add_argument(*_LOG_FLAGS, dest="log", type=Path, metavar="LOG", help="log to import")
    _add_import_flags(group)
    add_config_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    given = _make_parser().parse(arguments)
    if given.schema:
        print_json(report_schema())
        return 0
    if len(given.runs) > 1:
        allowed = {"runs", "json"}
        extra = [n for n, v in vars(given).items() if v not in (None, False, []) and n not in allowed]
        if extra:
            flag = min(extra).replace("_", "-")
            raise BadInput(f"--{flag} does not go together with several runs.")
        return compare(given.runs, given.json)
    folder = given.runs[0] if given.runs else None
    if given.log is not None:
        if folder is not None:
            raise BadInput("give either a run folder or --log, not both.")
        folder = _import(given)
    elif misplaced := [name for name in _OF_A_LOG if getattr(given, name) is not None]:
        flag = misplaced[0].replace("_", "-")
        raise BadInput(f"--{flag} belongs to --log; a run folder has its own.")
    elif config_overrides(given).keys() - ({"wandb"} if given.wandb else set()):
        raise BadInput("a configuration flag belongs to --log; a run folder has its own.")
    if folder is None:
        raise BadInput("give the folder of a run, or a log with --log.")
    destination = _wandb_destination(folder, config_overrides(given)) if given.wandb else None
    report_run(folder, given.claims, given.json)
    if destination is not None:
        place = upload(folder, *destination)
        print(f"W&B has the run: {place}", file=sys.stderr if given.json else sys.stdout)
    return 0


def import_main(arguments: Sequence[str]) -> int:
    """Make a run folder and a report from the log of another program."""
    parser = Parser(f"{import_main.__doc__}\n{_IMPORT_EXAMPLES}", usage="%(prog)s LOG --out FOLDER [options]")
    parser.add_argument("log", type=Path, metavar="LOG", help="log of the run")
    parser.add_argument("--claims", type=Path, help="claims to compare with the run")
    parser.add_argument("--json", action="store_true", help="print only report.json")
    _add_import_flags(parser)
    add_config_flags(parser)
    given = parser.parse(arguments)
    report_run(_import(given), None, given.json)
    return 0


def _add_import_flags(group: _ActionsContainer) -> None:
    group.add_argument("--config", type=Path, help="configuration of that run (default: the log's)")
    group.add_argument("--gpu", help="the GPU it ran on, as in nanogauge/hardware.toml")
    group.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: the log's)")
    group.add_argument("--out", type=Path, help="run folder to write")
    group.add_argument("--run-number", type=int, metavar="K", help="one run of a log of several")


def _import(given: Namespace) -> Path:
    """Write a run folder from a log and return it; nothing is written on bad input."""
    if given.out is None:
        raise BadInput("an imported log also needs --out, the run folder to write.")
    described = Given(given.config, config_overrides(given), given.gpu, given.gpus)
    import_log(given.log, described, given.claims, given.out, given.run_number)
    out: Path = given.out
    return out


def report_run(folder: Path, claims: Path | None, as_json: bool) -> None:
    """Write the report of a run into its folder, and print it as text or JSON."""
    report, run, recorded = build_report(folder, claims_of(folder, claims))
    paths = write_report(report, run, recorded)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report, Console(), paths[-1])


def _wandb_destination(folder: Path, overrides: dict[str, dict[str, object]]) -> tuple[Mode, str]:
    """Return W&B's mode and project for an upload.

    The mode of the run's configuration is ignored: it was about the run, not this upload.
    """
    wandb = wandb_section(folder / CONFIG_TOML, overrides)
    mode = wandb.mode if "mode" in overrides.get("wandb", {}) else "auto"
    if mode == "disabled":
        raise BadInput("--wandb uploads the run and --wandb.mode disabled does not; drop one.")
    if mode == "auto" and (switch := switched_off()) is not None:
        if switch[0] == "disabled":
            raise BadInput(f"W&B is switched off ({switch[1]}); --wandb.mode online overrules that.")
        mode = switch[0]
    return mode, wandb.project


def compare_main(arguments: Sequence[str]) -> int:
    """Compare runs: what changed, by how much, and whether it is more than the noise."""
    parser = Parser(compare_main.__doc__ or "", usage="%(prog)s RUN RUN ... [--json]")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    given = parser.parse(arguments)
    if len(given.runs) < 2:
        raise BadInput("give the folders of two runs or more.")
    return compare(given.runs, given.json)


def compare(runs: Sequence[Path], as_json: bool) -> int:
    comparison = Comparison(runs)
    if as_json:
        print_json(comparison.to_json())
    else:
        comparison.show(Console())
    return 0

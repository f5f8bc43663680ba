"""Make a run folder and a report from the log of another program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanogauge.cli import Parser
from nanogauge.commands.report import report_run
from nanogauge.config import add_config_flags
from nanogauge.importers.command import LOG_FORMATS, add_import_flags, import_as

_EXAMPLES = """
  %(prog)s train.log --config configs/rtx4070_fineweb.toml --gpu "RTX 4070" --out runs/imported
  %(prog)s history.csv --config CONFIG --run.device cpu --out runs/imported
"""


def main(arguments: Sequence[str]) -> int:
    usage = "%(prog)s LOG --config CONFIG --out FOLDER [options]"
    parser = Parser(f"{__doc__}\n{_EXAMPLES}", usage=usage)
    parser.add_argument("log", type=Path, metavar="LOG", help="log of the run")
    parser.add_argument(
        "--format",
        choices=LOG_FORMATS,
        help="format of the log (default: wandb_history for .csv and .parquet, else nanogpt_log)",
    )
    parser.add_argument("--claims", type=Path, help="claims to compare with the run")
    parser.add_argument("--json", action="store_true", help="print only report.json")
    add_import_flags(parser)
    add_config_flags(parser)
    given = parser.parse(arguments)
    is_table = given.log.suffix in (".csv", ".parquet")
    name = given.format or ("wandb_history" if is_table else "nanogpt_log")
    report_run(import_as(given, name, given.log, None), None, given.json)
    return 0

r"""Prediction versus actual of a run that has finished, died, or is still running.

python report.py runs/NAME [--claims predictions/X.toml] [--json]
python report.py --wandb runs/NAME [--wandb.mode offline] [--wandb.project PROJECT]
python report.py runs/ONE runs/OTHER ...    several runs side by side
python report.py --index runs/              a start page for all of them
python report.py --serve runs/NAME          the report at http://127.0.0.1:8642
python report.py --schema                   the JSON Schema of report.json
python report.py --nanogpt-log LOG --config configs/rtx4070_fineweb.toml --gpu "RTX 4070" \
    --claims predictions/seed_zh.toml --out runs/imported
and so with --nanochat-log, --build-nanogpt-log and --wandb-history: docs/importing.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nanogauge.analysis.report_model import build_report, claims_of, report_schema
from nanogauge.cli import Parser, run_command, shipped
from nanogauge.config import add_config_flags, config_overrides, wandb_section
from nanogauge.errors import BadInput
from nanogauge.importers.command import add_import_flags, import_from_flags
from nanogauge.report.html import write_report
from nanogauge.report.terminal import print_report
from nanogauge.report.views import add_view_flags, show_view
from nanogauge.runlog.folder import CONFIG_TOML
from nanogauge.schema import Hardware
from nanogauge.sinks.mirror import Mode, upload


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--claims", type=shipped, help="claims to hold against the run")
    parser.add_argument("--json", action="store_true", help="print report.json, and nothing else")
    parser.add_argument(
        "--wandb", action="store_true", help="upload the run to W&B, report and all"
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of report.json, nothing else"
    )
    add_view_flags(parser)
    add_import_flags(parser)
    add_config_flags(parser)
    given = parser.parse(arguments)
    if given.schema:
        print(json.dumps(report_schema(), indent=1, ensure_ascii=False))
        return 0
    if (status := show_view(given)) is not None:
        return status
    given.run = given.runs[0] if given.runs else None
    allowed = {"wandb"} if given.wandb else set()
    folder = import_from_flags(given, allowed, measure_this_cpu) or given.run
    if folder is None:
        raise BadInput("give the folder of a run, or a log with --nanogpt-log.")
    report, run, recorded = build_report(folder, claims_of(folder, given.claims))
    destination = _where_to(folder, config_overrides(given)) if given.wandb else None
    paths = write_report(report, run, recorded)
    if given.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        print_report(report, Console())
        print(f"\n{paths[-1]}  (also .md and .json)")
    if destination is not None:
        place = upload(folder, *destination)
        print(f"W&B has the run: {place}", file=sys.stderr if given.json else sys.stdout)
    return 0


def measure_this_cpu(dtype: str) -> Hardware:
    from trainer.calibrate import this_processor  # imports torch, which no other report needs

    return this_processor(dtype)


def _where_to(folder: Path, overrides: dict[str, dict[str, object]]) -> tuple[Mode, str]:
    """W&B's mode and project: as given, else auto and that of the run's configuration.

    Who asks for an upload wants one: that the run itself was kept from W&B, or from the network,
    says nothing about later.

    Raises:
        BadInput: if a flag is not understood, or asks for the opposite.
    """
    wandb = wandb_section(folder / CONFIG_TOML, overrides)
    mode = wandb.mode if "mode" in overrides.get("wandb", {}) else "auto"
    if mode == "disabled":
        raise BadInput("--wandb uploads the run and --wandb.mode disabled does not; drop one.")
    return mode, wandb.project


if __name__ == "__main__":
    run_command(main)

r"""Prediction versus actual of a run that has finished, died, or is still running.

python report.py runs/NAME [--claims predictions/X.toml] [--json]
python report.py --nanogpt-log LOG --config configs/rtx4070_fineweb.toml --gpu "RTX 4070" \
    --claims predictions/seed_zh.toml --out runs/imported
and so with --nanochat-log, --build-nanogpt-log and --wandb-history: docs/importing.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nanogauge.cli import Parser, run_command
from nanogauge.config import add_config_flags
from nanogauge.errors import BadInput
from nanogauge.importers.command import add_import_flags, import_given
from nanogauge.report.build import build_report, claims_of
from nanogauge.report.render import print_report, write_report


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument("--claims", type=Path, help="claims to hold against the run")
    parser.add_argument("--json", action="store_true", help="print report.json, and nothing else")
    add_import_flags(parser)
    add_config_flags(parser)
    given = parser.parse(arguments)
    folder = import_given(given) or given.run
    if folder is None:
        raise BadInput("give the folder of a run, or a log with --nanogpt-log.")
    report, run, recorded = build_report(folder, claims_of(folder, given.claims))
    paths = write_report(report, run, recorded)
    if given.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        print_report(report, Console())
        print(f"\n{paths[-1]}  (also .md and .json)")
    return 0


if __name__ == "__main__":
    run_command(main)

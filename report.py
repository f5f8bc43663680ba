r"""Prediction versus actual of a run that has finished, died, or is still running.

python report.py runs/NAME [--claims predictions/X.toml] [--json]
python report.py runs/ONE runs/OTHER ...    several runs side by side
python report.py --index runs/              a start page for all of them
python report.py --serve runs/NAME          the report while the run goes on
python report.py --nanogpt-log LOG --config configs/rtx4070_fineweb.toml --gpu "RTX 4070" \
    --claims predictions/seed_zh.toml --out runs/imported
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nanogauge.claims import load_claims
from nanogauge.cli import Parser, run_command
from nanogauge.config import add_config_flags, config_overrides, load_config
from nanogauge.errors import BadInput
from nanogauge.hardware import lookup
from nanogauge.importers.folder import import_nanogpt_log
from nanogauge.predict.prediction import predict, resolve_dtype
from nanogauge.report.build import build_report, claims_of
from nanogauge.report.render import print_report, write_report
from nanogauge.report.views import add_view_flags, show_view


def main(arguments: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--claims", type=Path, help="claims to hold against the run")
    parser.add_argument("--json", action="store_true", help="print report.json, and nothing else")
    add_view_flags(parser)
    group = parser.add_argument_group("import a log that nanoGPT printed")
    group.add_argument("--nanogpt-log", type=Path, metavar="LOG", help="nanoGPT's output")
    group.add_argument("--config", type=Path, help="configuration of that run")
    group.add_argument("--gpu", help="the GPU it ran on, as in nanogauge/hardware.toml")
    group.add_argument("--out", type=Path, help="run folder to make of it")
    add_config_flags(parser)
    given = parser.parse(arguments)
    if (status := show_view(given)) is not None:
        return status
    given.run = given.runs[0] if given.runs else None
    folder = _import(given) if given.nanogpt_log is not None else given.run
    if folder is None:
        raise BadInput("give the folder of a run, or a log with --nanogpt-log.")
    if given.nanogpt_log is None:
        for flag in ("config", "gpu", "out"):
            if getattr(given, flag) is not None:
                raise BadInput(f"--{flag} belongs to --nanogpt-log; a run folder has its own.")
        if config_overrides(given):
            raise BadInput("configuration flags belong to --nanogpt-log; a run folder has its own.")
    report, run, recorded = build_report(folder, claims_of(folder, given.claims))
    paths = write_report(report, run, recorded)
    if given.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        print_report(report, Console())
        print(f"\n{paths[-1]}  (also .md and .json)")
    return 0


def _import(given: argparse.Namespace) -> Path:
    """Make a run folder of a nanoGPT log; nothing is written before everything was understood."""
    if given.run is not None:
        raise BadInput("give either a run folder or --nanogpt-log, not both.")
    for flag in ("config", "gpu", "out"):
        if getattr(given, flag) is None:
            raise BadInput(f"--nanogpt-log also needs --{flag}.")
    config = load_config(given.config, config_overrides(given))
    claims = load_claims(given.claims) if given.claims is not None else None
    dtype = resolve_dtype(config, "gpu")
    prediction = predict(config, lookup(given.gpu, dtype), dtype)
    out: Path = given.out
    import_nanogpt_log(given.nanogpt_log, config, prediction, claims, given.claims, out)
    return out


if __name__ == "__main__":
    run_command(main)

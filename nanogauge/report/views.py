"""The flags of report.py that show something else than the report of one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from nanogauge.errors import BadInput
from nanogauge.report.compare_runs import (
    common_parent,
    compare_runs,
    print_comparison,
    write_comparison,
)
from nanogauge.report.index import index_json, make_index, write_index
from nanogauge.report.serve import serve

DEFAULT_PORT = 8642
_OURS = {"runs", "index", "serve", "port", "out", "json", "claims"}


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a page about many runs, or a served page")
    group.add_argument("--index", type=Path, metavar="FOLDER", help="start page of all runs in it")
    group.add_argument("--serve", type=Path, metavar="RUN", help="serve the report on this machine")
    group.add_argument("--port", type=int, help=f"of --serve; {DEFAULT_PORT}, or 0 for a free one")


def show_view(given: argparse.Namespace) -> int | None:
    """Do what --index, --serve or several runs ask for; None where nothing of it was given.

    Raises:
        BadInput: if flags are given that do not go together.
    """
    ways = [name for name in ("index", "serve") if getattr(given, name) is not None]
    if given.runs and ways:
        raise BadInput(f"--{ways[0]} takes a folder of its own; give no other run.")
    if len(ways) > 1:
        raise BadInput("give either --index or --serve, not both.")
    if given.serve is None and given.port is not None:
        raise BadInput("--port belongs to --serve.")
    if not ways and len(given.runs) < 2:
        return None
    what = f"--{ways[0]}" if ways else "several runs"
    others = sorted(name for name, value in vars(given).items() if value and name not in _OURS)
    others += ["out"] if given.out is not None and ways else []
    others += ["claims"] if given.claims is not None and given.serve is None else []
    others += ["json"] if given.json and given.serve is not None else []
    if others:
        raise BadInput(f"--{others[0].replace('_', '-')} does not go together with {what}.")
    if given.serve is not None:
        serve(given.serve, given.claims, DEFAULT_PORT if given.port is None else given.port)
        return 0
    return _index(given) if given.index is not None else _side_by_side(given)


def _index(given: argparse.Namespace) -> int:
    entries = make_index(given.index)
    path = write_index(entries, given.index)
    if given.json:
        print(json.dumps(index_json(entries), indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    unreadable = [entry for entry in entries if entry.problem is not None]
    for entry in unreadable:
        print(f"! {entry.folder}: {entry.problem}")
    print(f"{path}  ({len(entries)} runs, {len(unreadable)} of them unreadable)")
    return 0


def _side_by_side(given: argparse.Namespace) -> int:
    """Print the comparison; its files are written beside the runs, or with --json only to --out."""
    comparison = compare_runs(given.runs)
    out = given.out
    if out is None and not given.json:
        out = common_parent(given.runs)
    paths = write_comparison(comparison, out) if out is not None else []
    if given.json:
        print(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print_comparison(comparison, Console())
        print(f"\n{paths[-1]}  (also .json)")
    return 0

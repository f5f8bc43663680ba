"""Command line, result format, table and JSON that the benchmarks share.

Import it before torch and nanogauge: it puts this repository on sys.path and sets torch's threads.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import trainer.step.torch_env  # noqa: E402, F401  before torch

# isort: split
from nanogauge.cli import Parser, run_command  # noqa: E402

Result = dict[str, Any]
"""keys: id, case, value, low, high, n, peer"""
SMALLEST_SHAPE = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32}


def result(name: str, case: str, values: Sequence[float], peer: str | None, value: float | None = None) -> Result:
    """Return a result over several rounds; its value is their median unless given.

    peer names what the figure is compared with; None for an absolute figure.
    """
    return {
        "id": name,
        "case": case,
        "value": statistics.median(values) if value is None and values else value,
        "low": min(values, default=None),
        "high": max(values, default=None),
        "n": len(values),
        "peer": peer,
    }


class Bench(Parser):
    """Command line of a benchmark, with --json and --smallest."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description or "")
        self.add_argument("--json", action="store_true", help="print only JSON")
        self.add_argument("--smallest", action="store_true", help="run in seconds, as a test")
        self._smallest: dict[str, Any] = {}

    def add_size(self, flag: str, default: float, smallest: float, help: str) -> None:
        """Add a number with a second default for --smallest."""
        action = self.add_argument(flag, type=type(default), default=default, help=help)
        self._smallest[action.dest] = smallest

    def run(self, measure: Callable[[Any], Sequence[Result]]) -> NoReturn:
        """Parse the command line, measure, print the results and exit."""

        def main(arguments: Sequence[str]) -> int:
            if "--smallest" in arguments:
                self.set_defaults(**self._smallest)
            args = self.parse(arguments)
            results = measure(args)
            if args.json:
                print(json.dumps({"bench": Path(sys.argv[0]).stem, "results": results}))
            else:
                print_table(results)
            return 0

        run_command(main)


def print_table(results: Sequence[Result]) -> None:
    """Print one line per result: value, lowest, highest, rounds, case and peer."""
    for r in results:
        numbers = ["-" if r[key] is None else f"{r[key]:.4g}" for key in ("value", "low", "high")]
        peer = f" / {r['peer']}" if r["peer"] else ""
        spread = f"({numbers[1]} - {numbers[2]}, n {r['n']})"
        print(f"{r['id']:32} {numbers[0]:>9} {spread:32} {r['case']}{peer}")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def flags_of(settings: Mapping[str, object]) -> list[str]:
    """Return the command-line flags that set these configuration keys."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def case_of(shape: Mapping[str, object]) -> str:
    """Return the name of a result about a model of this shape."""
    return " ".join(f"{key.split('.')[1].replace('_', '-')} {n}" for key, n in shape.items())


def run_script(script: str, *arguments: object, **environment: str) -> str:
    """Run a command of this repository and return its standard output."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout

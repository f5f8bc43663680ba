"""The command `nanogauge`, also `python -m nanogauge`, with its subcommands."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from nanogauge import __version__
from nanogauge.cli import run_command
from nanogauge.errors import BadInput

COMMANDS = {
    "plan": ("plan.main", "predict time, memory, energy, cost and loss of a run"),
    "report": ("report.main", "compare a run with its prediction and with claims"),
    "import": ("report.import_main", "make a run folder and a report from the log of another program"),
    "watch": ("watch.main", "run a program unchanged, measure it and report on it"),
    "compare": ("report.compare_main", "say what changed between runs, beyond the noise"),
    "share": ("share.main", "make an anonymous row of a run, to validate predictions with"),
    "doctor": ("doctor.main", "check whether this machine is ready for a run"),
    "claims": ("claims.main", "draft a claims file from a text, or check one"),
}
"""Subcommand -> its module and function in nanogauge/commands/, and a description."""

HELP = """usage: nanogauge COMMAND ...

Predict a training run before it starts, measure it, and explain every difference.

  nanogauge plan CONFIG --gpu "RTX 4070"
  nanogauge import train.log --config CONFIG --gpu "RTX 4070" --out runs/imported
  nanogauge report runs/imported
"""


def main(arguments: Sequence[str]) -> int:
    sys.argv[0] = "nanogauge"  # __main__.py under python -m; names the command in messages
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:7} {summary}")
        print("\nnanogauge COMMAND --help describes the arguments of a command.")
        return 0
    name = arguments[0]
    if name == "--version":
        print(f"nanogauge {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        raise BadInput(f"unknown command {name}; {hint}")
    sys.argv = [f"nanogauge {name}", *arguments[1:]]
    module, _, function = COMMANDS[name][0].partition(".")
    command = import_module(f"nanogauge.commands.{module}")
    status: int = getattr(command, function)(arguments[1:])
    return status


def run_subcommand() -> NoReturn:
    """Run the subcommand named on the command line, and exit with its status."""
    run_command(main)


if __name__ == "__main__":
    run_subcommand()

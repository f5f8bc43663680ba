"""Shared parts of all command lines: argument parser, exit statuses and background processes."""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import without_keys


class Parser(argparse.ArgumentParser):
    """Argument parser that raises errors as one sentence and suggests the nearest flag."""

    def __init__(self, description: str, add_help: bool = True, usage: str | None = None) -> None:
        name = os.path.basename(sys.argv[0])
        super().__init__(
            prog=f"python {name}" if name.endswith(".py") else name,
            usage=usage,
            description=description,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            flags = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for the existing ones."
            raise BadInput(f"unknown argument {flag}; {hint}")
        return namespace


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run the main function of a command and exit with its status.

    Bad input exits with 2 and a failed run with 1, each with one sentence on stderr. Any other
    exception is a bug and keeps its traceback.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except BadInput as error:
        _print_error(_one_line(error))
        sys.exit(2)
    except RunFailed as error:
        _print_error(_one_line(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _print_error("stopped by Ctrl-C.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout has exited (`| head`); flushing at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_error(sentence: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    """Return an error message on one line, without secrets and control characters."""
    text = "".join(c if c.isprintable() else " " for c in without_keys(str(error)))
    return " ".join(text.split())


def start_module(
    module: str, arguments: Sequence[str], output: IO[bytes] | int, errors: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a module as a background process; its standard input is a pipe from this process.

    Raises:
        OSError: if it cannot be started.
    """
    # The package may be neither installed nor in the current folder.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        start_new_session=True,  # Ctrl-C reaches only the process in the foreground
    )

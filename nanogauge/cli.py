"""What every command line shares: one sentence for an error, and the exit status that fits it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import without_keys


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest flag for a wrong one."""

    def __init__(self, description: str, add_help: bool = True) -> None:
        super().__init__(
            description=description,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, and refuse what is left over.

        Raises:
            BadInput: for an unknown flag, named together with the nearest one that exists.
        """
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for those there are."
            raise BadInput(f"unknown argument {flag}; {hint}")
        return namespace


def shipped(text: str) -> Path:
    """A file that is there; else the one of that name that was installed with the commands.

    configs/demo.toml and examples/demo_claims.toml are thus found from any folder.
    """
    path = Path(text)
    installed = Path(sysconfig.get_path("data"), "share", "nanogauge", path)
    return installed if not path.exists() and installed.is_file() else path


def installed_command() -> NoReturn:
    """Run the command that an installed script is named after: nanogauge-plan runs plan.py's."""
    name = Path(sys.argv[0]).stem.removeprefix("nanogauge-")
    module = importlib.import_module("prepare_fineweb" if name == "prepare" else name)
    run_command(module.main)


def start_module(
    module: str, arguments: Sequence[str], output: IO[bytes] | int, errors: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a module as a background process; its standard input is a pipe from this process.

    Raises:
        OSError: if it cannot be started.
    """
    # The package need not be installed, nor the current folder be the one it lies in.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        start_new_session=True,  # Ctrl-C reaches only the process in the foreground
    )


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command's main function and leave with its exit status.

    Bad input ends with 2 and a failed run with 1, each with one sentence on stderr. Anything else
    that is raised is a mistake of ours and keeps its traceback.
    """
    name = os.path.basename(sys.argv[0])
    try:
        sys.exit(main(sys.argv[1:]))
    except BadInput as error:
        print(f"{name}: {_shown(error)}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"{name}: {_shown(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _shown(error: Exception) -> str:
    """The sentence of an error: on one line, whatever was quoted in it, and without keys."""
    words = "".join(c if c.isprintable() else " " for c in without_keys(str(error)))
    return " ".join(words.split())

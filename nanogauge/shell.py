"""Commands as text for messages: they run as printed, in this environment and the user's shell."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
"""Folder of train.py and the other scripts; only in a checkout are they there."""


def python_command(script: str, *arguments: object) -> str:
    """Return the command that runs a script of the checkout with this interpreter."""
    path = CHECKOUT / script
    shown = from_here(path) if path.exists() else script
    return f"{interpreter()} {shlex.join([shown, *map(str, arguments)])}"


def tool_command(name: str, *arguments: object) -> str:
    """Return the command that runs a program of this environment, such as wandb or torchrun."""
    path = Path(sys.executable).with_name(name)
    shown = from_here(path) if path.exists() and shutil.which(name) != str(path) else name
    return shlex.join([shown, *map(str, arguments)])


def pip_install(*arguments: str) -> str:
    """Return the command that installs packages into the environment of this interpreter."""
    if find_spec("pip") is None and shutil.which("uv") is not None:
        return f"uv pip install --python {interpreter()} {shlex.join(arguments)}"
    return f"{interpreter()} -m pip install {shlex.join(arguments)}"


def interpreter() -> str:
    """Return the shortest quoted name that starts this interpreter: .venv/bin/python, python."""
    names = (name for name in ("python", "python3") if shutil.which(name) == sys.executable)
    return next(names, None) or shlex.quote(from_here(Path(sys.executable or "python")))


def from_here(path: Path) -> str:
    """Return a path relative to the current folder if it lies below it."""
    here = Path(os.getcwd())
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

"""Shared parts of all command lines: argument parser, output, exit statuses, processes."""

import argparse
import codecs
import difflib
import errno
import io
import json
import os
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import package_table, without_keys
from nanogauge.shell import CHECKOUT, from_here, pip_install, python_command


class Parser(argparse.ArgumentParser):
    """Argument parser that raises errors as one sentence and suggests the nearest flag."""

    def __init__(self, description: str, add_help: bool = True, usage: str | None = None) -> None:
        name = os.path.basename(sys.argv[0])
        prog = python_command(name) if name.endswith(".py") else name
        super().__init__(
            prog=prog,
            usage=usage,
            description=description.replace(f"python {name}", prog),
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; --help shows how to call it.")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(list(arguments))
        wrong = [i for i, word in enumerate(unknown) if word.startswith("-") or not i]
        if wrong:
            ends = [*wrong[1:], len(unknown)]
            words = (unknown[i:j] for i, j in zip(wrong, ends, strict=True))
            raise BadInput(" ".join(self._hint(*part) for part in words))
        return namespace

    def _hint(self, word: str, *values: str) -> str:
        """Return a sentence on an unknown argument, with the flag that its name means."""
        from nanogauge.names import meaning_of  # only errors need it

        flag, equals, value = word.partition("=")
        flags = [name for action in self._actions for name in action.option_strings]
        keys = [name[2:] for name in flags if "." in name and "-" not in name[2:]]
        alias = package_table("names.toml")["flags"].get(flag.lstrip("-").replace("-", "_"))
        near = difflib.get_close_matches(flag, [name for name in flags if "." not in name], n=1)
        near = [alias] if alias in flags else near
        meaning = meaning_of(flag, keys, is_exact=bool(near)) if keys else None
        if meaning is None:
            hint = f"did you mean {near[0]}?" if near else "see --help for the existing ones."
            return f"unknown argument {flag}; {hint}"
        key, _, remark = meaning.partition(": ")
        if remark and " " not in remark:  # the value that the name stands for
            values, equals, remark = (remark,), "", ""
        typed = shlex.join([f"--{key.replace('_', '-')}", *([value] if equals else values)])
        meant = f"did you mean {typed} ({key})?" if "." in key else ""
        return " ".join(filter(None, (f"unknown argument {flag};", meant, remark and f"{remark}.")))


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run the main function of a command and exit with its status.

    Bad input exits with 2 and a failed run with 1, each with one sentence on stderr. Any other exception is a bug and
    keeps its traceback.
    """
    codecs.register_error("plain", _plain_characters)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; the next file opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except BadInput as error:
        _print_error(_one_line(error))
        sys.exit(2)
    except RunFailed as error:
        _print_error(_one_line(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _print_error("stopped by Ctrl-C.")
        sys.exit(130)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.EIO, errno.ENOSPC):
            raise
        # The reader of stdout has exited (`| head`), or its disk is full: the flush at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            _print_error("the output is cut: no space is left on its disk.")
        sys.exit(1)


_PLAIN = {
    **{"→": "->", "×": "x", "·": ".", "°": "", "≈": "~", "≤": "<=", "≥": ">=", "■": "#", "▶": ">"},
    **{"✓": "+", "✕": "x", "○": "o", "“": '"', "”": '"', "‘": "'", "’": "'"},
    **dict.fromkeys("–—−─━", "-"),
}


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding of a stream lacks: codecs' error handler "plain"."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    bare = (unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in characters)  # no accents
    return "".join(_PLAIN.get(c) or a or "?" for c, a in zip(characters, bare, strict=True)), error.end


class _LastingOutput(io.FileIO):
    """Raw output that drops what a closed pipe, a closed terminal or a full disk does not take."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_terminal() -> None:
    """Keep this process alive when the reader of its output exits, as a run must be."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            raw = _LastingOutput(stream.fileno(), "wb", closefd=False)
            lasting = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, lasting)


def print_json(value: object) -> None:
    """Print JSON, as ASCII where the output cannot hold all characters."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(json.dumps(value, indent=1, ensure_ascii=not is_unicode, allow_nan=False))


def _explain_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace the traceback of a package that is not installed by one sentence and status 2."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not (isinstance(error, ModuleNotFoundError) and package and find_spec(package) is None):
        sys.__excepthook__(kind, error, trace)
        return
    prepared = from_here(CHECKOUT / ".venv/bin/python")
    _print_error(
        f"this Python has no package {package}; run {shlex.join([prepared, *sys.orig_argv[1:]])} "
        "after make setup, or install into this Python: "
        f"{pip_install('-e', f'{from_here(CHECKOUT)}[train]')}"
    )
    sys.stderr.flush()
    os._exit(2)


if Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).parent in (CHECKOUT, CHECKOUT / "nanogauge"):
    sys.excepthook = _explain_missing_package


def _print_error(sentence: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    """Return an error message on one line, without secrets and control characters."""
    text = "".join(c if c.isprintable() else " " for c in without_keys(str(error)))
    return " ".join(text.split())


def start_module(
    module: str, arguments: Sequence[str], output: IO[bytes] | int, variables: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """Start a module as a background process; its standard input is a pipe from this process.

    `variables` are added to its environment, which other users of the machine cannot read.

    Raises:
        OSError: if it cannot be started.
    """
    # The package may be neither installed nor in the current folder.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only the process in the foreground
    )

"""train.py --supervise: a small process that starts the run again whenever it crashes.

It imports neither torch nor the configuration, and holds nothing of the run: the run goes on from
its newest checkpoint, in a process that begins with a clean memory and a clean device.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nanogauge.cli import Parser
from nanogauge.errors import BadInput

VARIABLE = "NANOGAUGE_RESTART"
"""tells a process that is watched how often it was started again"""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0
MAX_RESTARTS = 10
LOOK_SECONDS = 300.0
"""for reading the log of a long run on a slow disk"""
_ASKED = [n for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]
_BAD_INPUT = 2
_ENDS_ON_PURPOSE = (0, *(128 + getattr(signal, name) for name in _ASKED))
"""done, stopped: neither would go better a second time"""


def restart_number() -> int | None:
    """How often --supervise has started this run again; None in a process that is not watched."""
    text = os.environ.get(VARIABLE)
    return None if text is None else int(text)


@dataclass(frozen=True)
class Seen:
    """What the log of a run holds at one moment."""

    starts: int = 0
    ends: int = 0
    steps: int = 0
    """the last step that is logged, plus 1"""
    restartable: bool = False
    """whether its last end line says that another attempt may help"""


def wait_seconds(attempt: int) -> float:
    """Before the attempt-th start in a row (from 1) without progress: 5, 10, 20 ... 300 s."""
    return min(FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 10), LONGEST_WAIT_SECONDS)


class Supervisor:
    """Runs a command until it ends on purpose.

    Args:
        command: what starts the run.
        look: what its log holds; None where that cannot be told.
        max_restarts: after so many restarts in a row without a new step it gives up.
        say: where a line for people goes.
        sleep: waits for so many seconds, less if a signal comes.
    """

    def __init__(
        self,
        command: Sequence[str],
        look: Callable[[], Seen | None],
        max_restarts: int,
        say: Callable[[str], None],
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._command, self._look, self._say = list(command), look, say
        self._max_restarts = max_restarts
        self._sleep = sleep if sleep is not None else self._sleep_unless_asked
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def listen(self) -> None:
        """Take over the signals that ask to stop; those that are ignored (nohup) stay so.

        Also the terminal's pause (Ctrl-Z), which pauses the run as well.
        """
        for name in _ASKED:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if sys.platform != "win32":
            signal.signal(signal.SIGTSTP, self._on_pause)

    def run(self) -> int:
        """Start the command, again where that may help; returns the exit status of the last one."""
        first = before = self._look() or Seen()
        most_steps, in_row, restart = first.steps, 0, 0
        while True:
            if self._asked is not None:
                return 128 + self._asked
            began = time.monotonic()
            begun = before.starts > first.starts
            resume = ["--resume", "auto"] if begun else []
            status = self._run_once([*self._command, *resume], restart)
            code = status if status >= 0 else 128 - status
            # What was once taken may be taken again: memory that another program holds, a disk.
            refused = code == _BAD_INPUT and not begun
            if self._asked is not None or code in _ENDS_ON_PURPOSE or refused:
                return code
            how = f"the run {_told(status)} after {time.monotonic() - began:.0f} s"
            now = self._look() or before
            if now.ends > before.ends and not now.restartable:
                self._say(f"{how}, and its log says that it would only fail again.")
                return code
            in_row = 1 if now.steps > most_steps else in_row + 1
            most_steps = max(most_steps, now.steps)
            if in_row > self._max_restarts:
                self._say(f"{how}; given up after {in_row - 1} restarts without a new step.")
                return code
            wait, restart, before = wait_seconds(in_row), restart + 1, now
            self._say(f"{how}, at step {now.steps:,}; restart {restart} follows in {wait:.0f} s.")
            self._sleep(wait)

    def _run_once(self, command: list[str], restart: int) -> int:
        """Run one process to its end; its status, negative for the signal that it died of.

        It is a process group of its own, so that Ctrl-C in a terminal comes here alone, from where
        it is passed on, once. (Windows has no such signals to pass on: there both get Ctrl-C.)
        """
        self._child = subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: str(restart)},
            stdin=subprocess.DEVNULL,  # who reads a terminal in the background is stopped by it
            process_group=0 if os.name == "posix" else None,
        )
        if self._asked is not None:
            self._pass_on(self._asked)  # it came before there was a child to hear it
        try:
            return self._child.wait()
        finally:
            self._child = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        self._pass_on(number)

    def _on_pause(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._pass_on(signal.SIGCONT)

    def _pass_on(self, number: int) -> None:
        child = self._child
        if child is not None and os.name == "posix":
            child.send_signal(number)

    def _sleep_unless_asked(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._asked is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def _told(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    name = {each.value: each.name for each in signal.Signals}.get(-status, f"signal {-status}")
    hint = ", which the system sends when memory runs out," if name == "SIGKILL" else ""
    return f"died of {name}{hint}"


def _look_back(arguments: Sequence[str]) -> Seen | None:
    """What the log of the run holds that train.py's arguments name; None if it can't be read.

    The run itself then says what is wrong.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer.run.lookback", *arguments],
            env={**os.environ, "PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LOOK_SECONDS,
            start_new_session=True,  # Ctrl-C is not for it
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Seen(**json.loads(done.stdout))


def _python_path() -> str:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def supervise(arguments: Sequence[str]) -> int:
    """Run this very command without --supervise, and again when it crashes.

    Args:
        arguments: those of the command line, sys.argv[1:].

    Raises:
        BadInput: if --max-restarts is no number from 0 on.
    """
    parser = Parser("", add_help=False)
    parser.add_argument("--supervise", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=MAX_RESTARTS)
    given, others = parser.parse_known_args(list(arguments))
    if given.max_restarts < 0:
        raise BadInput("--max-restarts takes a number from 0 on.")
    interpreter = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    supervisor = Supervisor(
        [sys.executable, *interpreter, *others],
        lambda: _look_back(others),
        given.max_restarts,
        lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True),
    )
    supervisor.listen()
    return supervisor.run()

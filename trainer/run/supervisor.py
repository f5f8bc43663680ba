"""train.py --supervise: a small process that restarts the run whenever it crashes.

It imports neither torch nor the configuration and holds no state of the run: the run resumes from its newest
checkpoint, in a process with clean memory and a clean device.

    python -m trainer.run.supervisor ARGUMENTS OF TRAIN.PY    # print what the run's log holds

This second form runs in a process of its own, because reading a log takes tens of megabytes, which the supervisor would
keep for the rest of the run.
"""

import dataclasses
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

from nanogauge.cli import Parser, outlive_terminal, run_command
from nanogauge.errors import BadInput

VARIABLE = "NANOGAUGE_RESTART"
"""Environment variable of a supervised process: the number of its restarts."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0
MAX_RESTARTS = 10
READ_SECONDS = 300.0
"""Time limit for reading the log of a long run on a slow disk."""
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
_BAD_INPUT = 2
_INTENDED_ENDS = (0, *(128 + getattr(signal, name) for name in _STOP_SIGNALS))
"""Exit statuses of a finished run or one that the user stopped, which is not restarted."""


def restart_number() -> int | None:
    """Return the number of restarts by --supervise, or None in an unsupervised process."""
    text = os.environ.get(VARIABLE)
    return None if text is None else int(text)


@dataclass(frozen=True)
class LogState:
    """Counts read from the log of a run, to see whether a restart makes progress."""

    starts: int = 0
    ends: int = 0
    steps: int = 0
    """Number of steps made."""
    restartable: bool = False
    """Whether the last end line says that a restart may help."""


def wait_seconds(attempt: int) -> float:
    """Return the exponential backoff before restart `attempt` (from 1) in a row: 5, 10 ... 300."""
    return min(FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 10), LONGEST_WAIT_SECONDS)


class Supervisor:
    """Runs a command, and restarts it until it finishes, is stopped or fails too often.

    Args:
        command: starts the run.
        read_log: returns the state of the run's log; None if the log cannot be read. max_restarts: number of restarts
        in a row without a new step after which to give up.
        say: prints a line for the user.
        sleep: waits for a number of seconds, less if a signal arrives.
    """

    def __init__(
        self,
        command: Sequence[str],
        read_log: Callable[[], LogState | None],
        max_restarts: int,
        say: Callable[[str], None],
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._command, self._read_log, self._say = list(command), read_log, say
        self._max_restarts = max_restarts
        self._sleep = sleep if sleep is not None else self._sleep_until_signal
        self._child: subprocess.Popen[bytes] | None = None
        self._received: int | None = None

    def listen(self) -> None:
        """Forward stop signals, except ignored ones (nohup), and the terminal's Ctrl-Z."""
        for name in _STOP_SIGNALS:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        signal.signal(signal.SIGTSTP, self._on_pause)

    def run(self) -> int:
        """Start the command and restart it while that may help; return its last exit status."""
        first = before = self._read_log() or LogState()
        most_steps, in_row, restart = first.steps, 0, 0
        while True:
            if self._received is not None:
                return 128 + self._received
            began = time.monotonic()
            has_begun = before.starts > first.starts
            resume = ["--resume", "auto"] if has_begun else []
            status = self._run_once([*self._command, *resume], restart)
            code = status if status >= 0 else 128 - status
            # Once a start was accepted, a refusal may be temporary: memory held by another
            # program, a full disk.
            refused = code == _BAD_INPUT and not has_begun
            if self._received is not None or code in _INTENDED_ENDS or refused:
                return code
            how = f"the run {_describe_exit(status)} after {time.monotonic() - began:.0f} s"
            now = self._read_log() or before
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
        """Run the command; return its exit status, negative for the signal that killed it.

        The child has its own process group, so that the terminal's Ctrl-C reaches this process only, which forwards it
        once.
        """
        self._child = subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: str(restart)},
            stdin=subprocess.DEVNULL,  # reading a terminal from the background stops a process
            process_group=0,
        )
        if self._received is not None:
            self._forward(self._received)  # it arrived before the child existed
        try:
            return self._child.wait()
        finally:
            self._child = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._forward(number)

    def _on_pause(self, number: int, frame: FrameType | None) -> None:
        self._forward(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._forward(signal.SIGCONT)

    def _forward(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    def _sleep_until_signal(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._received is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    name = {each.value: each.name for each in signal.Signals}.get(-status, f"signal {-status}")
    hint = ", which the system sends when memory runs out," if name == "SIGKILL" else ""
    return f"died of {name}{hint}"


def read_in_subprocess(arguments: Sequence[str]) -> LogState | None:
    """Return the state of the run's log, read by a subprocess; None if it cannot be read.

    Errors are not reported here, as the run itself reports them.

    Args:
        arguments: command-line arguments of train.py.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer.run.supervisor", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=READ_SECONDS,
            start_new_session=True,  # Ctrl-C is not for it
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return LogState(**json.loads(done.stdout))


def print_log_state(arguments: Sequence[str]) -> int:
    """Print the LogState of a run as JSON; return the exit status.

    Raises:
        BadInput: if the arguments are wrong or the log is damaged.
    """
    from nanogauge.config import config_overrides, load_config
    from nanogauge.runlog.reader import has_begun, read_log
    from trainer.run.flags import train_parser

    given = train_parser("").parse(arguments)
    folder = load_config(given.config, config_overrides(given)).folder
    state = LogState()
    if has_begun(folder):
        recorded = read_log(folder)
        ends = recorded.ends
        state = LogState(
            starts=len(recorded.starts),
            ends=len(ends),
            steps=recorded.steps_done,
            restartable=bool(ends and ends[-1].restartable),
        )
    print(json.dumps(dataclasses.asdict(state)))
    return 0


def supervise(arguments: Sequence[str]) -> int:
    """Run train.py without --supervise and restart it when it crashes; return its exit status.

    Args:
        arguments: command-line arguments, sys.argv[1:].

    Raises:
        BadInput: if --max-restarts is negative.
    """
    outlive_terminal()
    parser = Parser("", add_help=False)
    parser.add_argument("--supervise", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=MAX_RESTARTS)
    given, others = parser.parse_known_args(list(arguments))
    if given.max_restarts < 0:
        raise BadInput("--max-restarts takes a number from 0 on.")
    interpreter = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    supervisor = Supervisor(
        [sys.executable, *interpreter, *others],
        lambda: read_in_subprocess(others),
        given.max_restarts,
        lambda text: print(f"supervise: {text}", file=sys.stderr, flush=True),
    )
    supervisor.listen()
    return supervisor.run()


if __name__ == "__main__":
    run_command(print_log_state)

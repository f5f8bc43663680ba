"""A program as a child process: its output, its signals and its exit status pass through this process."""

import os
import signal
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

from nanogauge.errors import BadInput

_AWAITED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
_DRAIN_SECONDS = 2.0
"""Longest wait for output after the program's end: a background process may hold its pipes."""


def block_signals() -> None:
    """Block the signals that Child waits for; call it before any library starts threads, which inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)


class Child:
    """A program with this process's environment, standard input and terminal, and with unbuffered output (Linux).

    Each of its outputs is a pseudo-terminal where ours is a terminal, else a pipe.

    Args:
        command: the program and its arguments.
        receive: called by a thread with 1 or 2 for stdout or stderr, and each piece of output.

    Raises:
        BadInput: if it cannot be started.
    """

    def __init__(self, command: Sequence[str], receive: Callable[[int, bytes], None]) -> None:
        self._receive = receive
        outputs = {number: _terminal(number) if os.isatty(number) else os.pipe() for number in (1, 2)}
        try:
            self.pid = os.posix_spawnp(
                command[0],
                list(command),
                {**os.environ, "PYTHONUNBUFFERED": "1"},
                file_actions=[(os.POSIX_SPAWN_DUP2, childs, number) for number, (_, childs) in outputs.items()],
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores
            )
        except OSError as error:
            raise BadInput(f"cannot run {command[0]}: {error.strerror}.") from None
        self._threads = [Thread(target=self._pass_on, args=(n, ours), daemon=True) for n, (ours, _) in outputs.items()]
        for thread, (_, childs) in zip(self._threads, outputs.values(), strict=True):
            os.close(childs)
            thread.start()

    def wait(self) -> tuple[int, float]:
        """Pass signals on until the program ends; return its exit status, 128 + a signal's, and its CPU seconds."""
        pid = 0
        while not pid:
            info = signal.sigwaitinfo(_AWAITED)
            if info.si_signo == signal.SIGCHLD:
                pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            elif info.si_code <= 0:  # from a process; the terminal has sent its own to the program too
                os.kill(self.pid, info.si_signo)
        for thread in self._threads:
            thread.join(_DRAIN_SECONDS)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code, usage.ru_utime + usage.ru_stime

    def _pass_on(self, number: int, source: int) -> None:
        with suppress(OSError):  # the program's terminal has no writer, or ours no reader
            while data := os.read(source, 2**16):
                self._receive(number, data)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(number, rest) :]
        os.close(source)  # so that the program's writes fail as they would without this process


def _terminal(number: int) -> tuple[int, int]:
    """Return both ends of a pseudo-terminal as large as ours, which changes no byte of the output."""
    ours, childs = os.openpty()
    modes = termios.tcgetattr(childs)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(childs, termios.TCSANOW, modes)
    termios.tcsetwinsize(ours, termios.tcgetwinsize(number))
    return ours, childs

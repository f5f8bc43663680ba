"""Another power limit of a card for a while: the one before comes back, however the process ends.

    with PowerLimit(device) as limit:
        limit.set_watts(150)

A child that outlives this process sets the old limit too, as soon as this process is gone: after a
crash, kill -9 or Ctrl-C nothing is left changed. Only a machine that stops at once keeps it, and a
limit does not survive its restart.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from nanogauge.measure.nvml import find_handle

ROOT = Path(__file__).parents[2]


class LimitRefused(Exception):
    """The limit of this card cannot be read or set; the message is the reason."""


class PowerLimit:
    """The power limit of one card; a context manager.

    Args:
        device: as nvml.Driver names it.

    Raises:
        LimitRefused: on entering, if there is no such card, or no right to set its limit.
    """

    def __init__(self, device: str | int) -> None:
        self._device = device
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PowerLimit:
        try:
            import pynvml
        except ImportError:
            raise LimitRefused("the Python package nvidia-ml-py is not installed") from None
        self._nvml: ModuleType = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = find_handle(pynvml, self._device)
            self._before = int(pynvml.nvmlDeviceGetPowerManagementLimit(self._handle))
            least, most = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(self._handle)
            self._set(self._before)  # changes nothing, and tells whether it may be set
        except pynvml.NVMLError_NoPermission:
            raise LimitRefused("setting a power limit needs the rights of root (sudo)") from None
        except pynvml.NVMLError as error:
            raise LimitRefused(f"the driver does not let the limit be set: {error}") from None
        self.before_watts = self._before / 1000
        """what is restored"""
        self.range_watts = (least / 1000, most / 1000)
        """what the card lets be set"""
        self._guard = self._start_guard()
        return self

    def set_watts(self, watts: float) -> None:
        """Set the limit from now on.

        Raises:
            LimitRefused: if the driver does not take it.
        """
        try:
            self._set(round(1000 * watts))
        except self._nvml.NVMLError as error:
            raise LimitRefused(f"the driver does not set {watts:g} W: {error}") from None

    def _set(self, milliwatts: int) -> None:
        self._nvml.nvmlDeviceSetPowerManagementLimit(self._handle, milliwatts)

    def _start_guard(self) -> subprocess.Popen[bytes]:
        """The child that restores the limit when its standard input ends, as it does with us."""
        guard = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._device), str(self._before)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert guard.stdout is not None
        if guard.stdout.readline() != b"ready\n":
            guard.kill()
            guard.wait()
            raise LimitRefused("the process that would restore the limit did not start")
        return guard

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._guard is not None and self._guard.stdin is not None
        try:
            self._set(self._before)
        finally:
            self._guard.stdin.close()
            self._guard.wait()
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()


def guard(device: str, milliwatts: int) -> None:
    """Wait for the end of standard input, and set the limit."""
    import pynvml

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pynvml.nvmlInit()
    handle = find_handle(pynvml, int(device) if device.isdecimal() else device)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, milliwatts)


if __name__ == "__main__":
    guard(sys.argv[1], int(sys.argv[2]))

"""One GPU's driver (NVML), asked one number at a time.

A number the driver does not give is None, and the absences say why. What it does not support is
not asked for again; after any other error it is asked again some seconds later.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Change:
    """Something that is not measured any more, or again."""

    field: str
    """of the Sensor line, or energy_counter; gpu is the whole card, driver its whole driver"""
    text: str
    """one sentence: since when, in seconds since the process began, and why"""
    midway: bool
    """false for what was not there from the very start"""


class Absences:
    """The fields that are not measured. Any thread may tell it and ask it; nobody waits long.

    Args:
        whose: what of several it is that lacks them: "card 1"; empty where there is only one.
    """

    def __init__(self, whose: str = "") -> None:
        self._whose = whose
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._seen: set[str] = set()
        self._changes: list[Change] = []

    def missing(self, field: str, now: float, what: str, error: object = None) -> None:
        """A field could not be measured at `now` seconds; said again it is no news."""
        with self._lock:
            if field in self._reasons:
                return
            midway = field in self._seen
            because = "" if error is None else f": {error}"
            reason = f"{what} from {now:.1f} s on{because}" if midway else f"{what}{because}"
            if self._whose:
                reason = f"{self._whose}: {reason}"
            self._reasons[field] = reason
            start = "" if midway else " from the start"
            self._changes.append(Change(field, f"{field} is not measured{start}: {reason}", midway))

    def present(self, field: str, now: float) -> None:
        """A field was measured at `now` seconds."""
        if field in self._seen and field not in self._reasons:
            return
        with self._lock:
            self._seen.add(field)
            if self._reasons.pop(field, None) is not None:
                of = f" of {self._whose}" if self._whose else ""
                text = f"{field}{of} is measured from {now:.1f} s on"
                self._changes.append(Change(field, text, midway=True))

    def reasons(self) -> dict[str, str]:
        """Why what is absent now is absent, by the name of the field."""
        with self._lock:
            return dict(self._reasons)

    def drain(self) -> list[Change]:
        """What changed since the last call, in the order in which it did."""
        with self._lock:
            drained, self._changes = self._changes, []
        return drained


RETRY_SECONDS = 10.0
"""after an error, a number is not asked for again for so long"""
REOPEN_SECONDS = 3.0
"""how often a driver that lost the GPU is opened anew"""

_THROTTLE_WORDS = {
    # nvml.h, nvmlClocksEventReasons. Idle (0x1) and clocks set by an application (0x2) are what
    # somebody wanted, not throttling.
    0x4: "power cap",
    0x8: "hardware slow-down",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability",
}
_NO_THROTTLE = 0x1 | 0x2

_COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"
_GRAPHICS = "nvmlDeviceGetGraphicsRunningProcesses_v3"
_OLDER_NAMES = {
    "nvmlDeviceGetCurrentClocksEventReasons": "nvmlDeviceGetCurrentClocksThrottleReasons",
    _COMPUTE: "nvmlDeviceGetComputeRunningProcesses_v2",
    _GRAPHICS: "nvmlDeviceGetGraphicsRunningProcesses_v2",
}
"""what older drivers call the same number"""


class NoDriver(Exception):
    """There is no driver, or it does not know the device; the message is the reason."""


class Driver:
    """One GPU. `now` is when a number is asked for, in seconds on the caller's clock.

    `device` is the GPU's UUID (with or without "GPU-"), its PCI bus id, or its index as the driver
    counts, which CUDA_VISIBLE_DEVICES does not change: torch's index 0 may be another card, its
    UUID never is. `pid` is the process whose memory process_used_bytes tells; this one if not
    given.

    Raises:
        NoDriver: if there is no driver, or no such device.
    """

    def __init__(self, device: str | int, absences: Absences, pid: int | None = None) -> None:
        try:
            import pynvml
        except ImportError:
            raise NoDriver("the Python package nvidia-ml-py is not installed") from None
        self._nvml: ModuleType = pynvml
        self._absences = absences
        self._retry_at: dict[str, float] = {}  # by field; infinity: never
        self._given: set[str] = set()
        self._pid = os.getpid() if pid is None else pid
        self.lost = False
        self._unheard = True  # no number was given since the driver was opened
        self._reopen_at = 0.0
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise NoDriver("no NVIDIA driver: its library NVML was not found") from None
        except pynvml.NVMLError as error:
            raise NoDriver(f"no NVIDIA driver that answers: {error}") from None
        try:
            self._handle = find_handle(pynvml, device)
            self._uuid: str = pynvml.nvmlDeviceGetUUID(self._handle)
        except pynvml.NVMLError as error:
            self.close()
            raise NoDriver(f"the NVIDIA driver has no device {device}: {error}") from None

    def close(self) -> None:
        """Let the driver go; one that lost the GPU is left alone."""
        if not self.lost:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def lose(self, now: float, error: object = None) -> None:
        """No number can be expected until the driver has been opened anew."""
        self.lost = True
        self._reopen_at = now + REOPEN_SECONDS
        what = "the driver gives no number" if error is None else "the driver lost the GPU"
        self._absences.missing("gpu", now, what, error)

    def reopen(self, now: float) -> bool:
        """Open a driver that lost the GPU anew, if it is time to; whether the GPU was found.

        It counts as back only when it gives a number.
        """
        if not self.lost or now < self._reopen_at:
            return False
        self._reopen_at = now + REOPEN_SECONDS
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
        try:
            self._nvml.nvmlInit()
            self._handle = find_handle(self._nvml, self._uuid)
        except self._nvml.NVMLError:
            return False
        self._retry_at = {f: at for f, at in self._retry_at.items() if f not in self._given}
        self.lost, self._unheard = False, True
        return True

    def power_watts(self, now: float) -> float | None:
        return self._scaled("power_watts", now, "nvmlDeviceGetPowerUsage", scale=1e-3)

    def energy_counter_joules(self, now: float) -> float | None:
        """Joules since the driver was loaded."""
        function = "nvmlDeviceGetTotalEnergyConsumption"
        return self._scaled("energy_counter", now, function, scale=1e-3)

    def power_limit_watts(self, now: float) -> float | None:
        """What is enforced now."""
        function = "nvmlDeviceGetEnforcedPowerLimit"
        return self._scaled("power_limit_watts", now, function, scale=1e-3)

    def power_limit_default_watts(self, now: float) -> float | None:
        """The limit the board is shipped with."""
        function = "nvmlDeviceGetPowerManagementDefaultLimit"
        return self._scaled("power_limit_default_watts", now, function, scale=1e-3)

    def temperature_celsius(self, now: float) -> float | None:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return self._scaled("temperature_celsius", now, "nvmlDeviceGetTemperature", sensor)

    def slowdown_celsius(self, now: float) -> float | None:
        """From which temperature on the hardware lowers its clocks."""
        threshold = self._nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        function = "nvmlDeviceGetTemperatureThreshold"
        return self._scaled("slowdown_celsius", now, function, threshold)

    def fan(self, now: float) -> float | None:
        """Intended speed of the fan as a share of the highest; some cards go above 1."""
        return self._scaled("fan", now, "nvmlDeviceGetFanSpeed", scale=1e-2)

    def sm_clock_hz(self, now: float) -> float | None:
        clock = self._nvml.NVML_CLOCK_SM
        return self._scaled("sm_clock_hz", now, "nvmlDeviceGetClockInfo", clock, scale=1e6)

    def memory_clock_hz(self, now: float) -> float | None:
        clock = self._nvml.NVML_CLOCK_MEM
        return self._scaled("memory_clock_hz", now, "nvmlDeviceGetClockInfo", clock, scale=1e6)

    def max_sm_clock_hz(self, now: float) -> float | None:
        """The highest the card may be set to, above the boost clock of its datasheet."""
        clock = self._nvml.NVML_CLOCK_SM
        return self._scaled("max_sm_clock_hz", now, "nvmlDeviceGetMaxClockInfo", clock, scale=1e6)

    def utilization(self, now: float) -> float | None:
        """The share of the driver's last sampling period in which a kernel ran."""
        rates = self._ask("utilization", now, "nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def throttle(self, now: float) -> list[str] | None:
        """Why the clocks are lower than they could be, in words; empty if they are not."""
        bits = self._ask("throttle", now, "nvmlDeviceGetCurrentClocksEventReasons")
        return None if bits is None else throttle_words(bits)

    def pcie_generation(self, now: float) -> int | None:
        """Of the link as it is; an idle card lowers it."""
        return self._whole("pcie_generation", now, "nvmlDeviceGetCurrPcieLinkGeneration")

    def pcie_width(self, now: float) -> int | None:
        """Lanes of the link as it is."""
        return self._whole("pcie_width", now, "nvmlDeviceGetCurrPcieLinkWidth")

    def max_pcie_generation(self, now: float) -> int | None:
        """The best that card and machine can do together."""
        return self._whole("max_pcie_generation", now, "nvmlDeviceGetMaxPcieLinkGeneration")

    def max_pcie_width(self, now: float) -> int | None:
        """Lanes that card and machine can use together."""
        return self._whole("max_pcie_width", now, "nvmlDeviceGetMaxPcieLinkWidth")

    def device_used_bytes(self, now: float) -> int | None:
        """By all processes, and by the driver for itself."""
        memory = self._ask("device_used_bytes", now, "nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def total_bytes(self, now: float) -> int | None:
        memory = self._ask("total_bytes", now, "nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def process_used_bytes(self, now: float) -> int | None:
        """By the process; None, for a while or for good, where the driver does not list it."""
        field = "process_used_bytes"
        compute = self._ask(field, now, _COMPUTE, tells=False)
        if compute is None:
            return None
        used = _by_pid(compute)
        if self._pid not in used:
            with contextlib.suppress(self._nvml.NVMLError):
                used = _by_pid(getattr(self._nvml, _GRAPHICS)(self._handle))
        own = used.get(self._pid)
        if own is None:
            # Not final: the process is listed from its first use of the GPU on.
            why = (
                f"the driver does not say what process {self._pid} uses: it has not used the "
                "GPU yet, or runs in a container that hides its number"
            )
            self._absences.missing(field, now, why)
            return None
        self._absences.present(field, now)
        return own

    def others(self, now: float) -> dict[str, int] | None:
        """Bytes that other processes hold, by the name of their program.

        A program that runs more than once is counted as one. In a container the driver may give
        numbers of processes that are none, or others, in there.
        """
        compute = self._ask("others", now, _COMPUTE)
        graphics = self._ask("others", now, _GRAPHICS)
        if compute is None or graphics is None:
            return None
        # A process that computes and draws is in both lists, each time with all that it holds.
        used = _by_pid(graphics) | _by_pid(compute)
        used.pop(self._pid, None)
        names: dict[str, int] = {}
        for pid, size in used.items():
            name = self._process_name(pid)
            if size is None:
                self._absences.missing("others", now, f"the driver does not say what {name} uses")
                return None
            names[name] = names.get(name, 0) + size
        return names

    def name(self, now: float) -> str | None:
        name = self._ask("name", now, "nvmlDeviceGetName")
        return None if name is None else str(name)

    def driver_version(self, now: float) -> str | None:
        version = self._ask("driver_version", now, "nvmlSystemGetDriverVersion", of_device=False)
        return None if version is None else str(version)

    def cuda_version(self, now: float) -> tuple[int, int] | None:
        """The newest CUDA that the driver can run."""
        function = "nvmlSystemGetCudaDriverVersion_v2"
        number = self._ask("cuda_version", now, function, of_device=False)  # 12040 is 12.4
        return None if number is None else (number // 1000, number % 1000 // 10)

    def _process_name(self, pid: int) -> str:
        name = ""
        # Of another machine's view of the processes, or just gone; a name may be any bytes.
        with contextlib.suppress(OSError, ValueError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        if not name:
            with contextlib.suppress(self._nvml.NVMLError, ValueError):
                name = re.split(r"[/\\]", str(self._nvml.nvmlSystemGetProcessName(pid)))[-1]
        return name or f"process {pid}"

    def _scaled(
        self, field: str, now: float, function: str, *arguments: object, scale: float = 1.0
    ) -> float | None:
        answer = self._ask(field, now, function, *arguments)
        return None if answer is None else answer * scale

    def _whole(self, field: str, now: float, function: str) -> int | None:
        answer = self._ask(field, now, function)
        return None if answer is None else int(answer)

    def _ask(
        self,
        field: str,
        now: float,
        function: str,
        *arguments: object,
        of_device: bool = True,
        tells: bool = True,
    ) -> Any:
        """What NVML's function says; None while it gives no answer.

        Args:
            tells: whether an answer holds the field for certain.
        """
        if self.lost or now < self._retry_at.get(field, now):
            return None
        try:
            call = getattr(self._nvml, function)
            answer = call(self._handle, *arguments) if of_device else call(*arguments)
        except self._nvml.NVMLError as error:
            older = _OLDER_NAMES.get(function)
            if older is not None and error.value == self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                return self._ask(field, now, older, *arguments, tells=tells)
            if error.value in _fatal(self._nvml):
                self.lose(now, error)
                return None
            final = (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            self._retry_at[field] = float("inf") if error.value in final else now + RETRY_SECONDS
            self._absences.missing(field, now, "the driver does not give it", error)
            return None
        if self._unheard:
            self._unheard = False
            self._absences.present("gpu", now)
        self._given.add(field)
        if tells:
            self._absences.present(field, now)
        return answer


def throttle_words(bits: int) -> list[str]:
    """NVML's reasons for lower clocks in words; a bit it did not have yet keeps its number."""
    bits &= ~_NO_THROTTLE
    words = [word for bit, word in _THROTTLE_WORDS.items() if bits & bit]
    unknown = bits & ~sum(_THROTTLE_WORDS)
    return words + ([f"reason {unknown:#x}"] if unknown else [])


def _by_pid(processes: Iterable[Any]) -> dict[int, int | None]:
    """Bytes by process; one that holds several parts of the card is listed for each."""
    used: dict[int, int | None] = {}
    for process in processes:
        before, more = used.get(process.pid, 0), process.usedGpuMemory
        used[process.pid] = None if before is None or more is None else before + int(more)
    return used


def _fatal(nvml: ModuleType) -> tuple[int, ...]:
    """The errors after which no other number can be expected either."""
    return (
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_GPU_IS_LOST,
        nvml.NVML_ERROR_RESET_REQUIRED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    )


def find_handle(nvml: ModuleType, device: str | int) -> Any:
    """NVML's handle of a device that is named as in Driver.

    Raises:
        NVMLError: if there is none.
    """
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    if re.fullmatch(r"([0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]", device):
        return nvml.nvmlDeviceGetHandleByPciBusId(device)
    # torch leaves out the prefix that NVML asks for.
    uuid = device if device.startswith(("GPU-", "MIG-")) else f"GPU-{device}"
    return nvml.nvmlDeviceGetHandleByUUID(uuid)

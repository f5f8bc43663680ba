"""One GPU's measurements from its driver (NVML), each of which may be absent.

A measurement that the driver does not give is None, and its reason is kept. One that the driver does not support is not
requested again; after any other error it is, some seconds later. A driver that lost the GPU is not asked again.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nanogauge.measure.host import process_tree


@dataclass(frozen=True)
class Change:
    """A measurement that became absent, or became available."""

    field: str
    """Field of the Sensor line, or energy_counter, gpu (one GPU), driver (all of them)."""
    text: str
    """One sentence: since when, in seconds since the process began, and why."""
    midway: bool
    """False for a field that was absent from the start."""


class Absences:
    """Measurements that are absent, with the reasons. Thread-safe.

    Args:
        gpu: label of one of several GPUs in the texts ("GPU 1"); empty if there is only one.
    """

    def __init__(self, gpu: str = "") -> None:
        self._gpu = gpu
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._measured: set[str] = set()
        self._changes: list[Change] = []

    def missing(self, field: str, now: float, what: str, error: object = None) -> None:
        """Record that a field could not be measured at `now` seconds."""
        with self._lock:
            if field in self._reasons:
                return
            midway = field in self._measured
            because = "" if error is None else f": {error}"
            reason = f"{what} from {now:.1f} s on{because}" if midway else f"{what}{because}"
            if self._gpu:
                reason = f"{self._gpu}: {reason}"
            self._reasons[field] = reason
            start = "" if midway else " from the start"
            self._changes.append(Change(field, f"{field} is not measured{start}: {reason}", midway))

    def present(self, field: str, now: float) -> None:
        """Record that a field was measured at `now` seconds."""
        if field in self._measured and field not in self._reasons:
            return
        with self._lock:
            self._measured.add(field)
            if self._reasons.pop(field, None) is not None:
                of = f" of {self._gpu}" if self._gpu else ""
                self._changes.append(Change(field, f"{field}{of} is measured from {now:.1f} s on", midway=True))

    def reasons(self) -> dict[str, str]:
        """Return the reasons of the fields that are absent now."""
        with self._lock:
            return dict(self._reasons)

    def drain(self) -> list[Change]:
        """Return the changes since the last call in order."""
        with self._lock:
            drained, self._changes = self._changes, []
        return drained


RETRY_SECONDS = 10.0
"""Time after an error in which a field is not requested."""

_THROTTLE_WORDS = {
    # nvml.h, nvmlClocksEventReasons. Idle (0x1) and clocks set by an application (0x2) are
    # intended, so they are not throttling.
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


def throttle_words(bits: int) -> list[str]:
    """Name NVML's throttle reasons; unknown bits are given as a number."""
    bits &= ~_NO_THROTTLE
    words = [word for bit, word in _THROTTLE_WORDS.items() if bits & bit]
    unknown = bits & ~sum(_THROTTLE_WORDS)
    return words + ([f"reason {unknown:#x}"] if unknown else [])


_FIELDS: dict[str, tuple[str, str | None, float | Callable[[Any], Any]]] = {
    "power_watts": ("nvmlDeviceGetPowerUsage", None, 1e-3),
    "energy_counter": ("nvmlDeviceGetTotalEnergyConsumption", None, 1e-3),
    "power_limit_watts": ("nvmlDeviceGetEnforcedPowerLimit", None, 1e-3),
    "power_limit_default_watts": ("nvmlDeviceGetPowerManagementDefaultLimit", None, 1e-3),
    "temperature_celsius": ("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU", 1.0),
    "slowdown_celsius": ("nvmlDeviceGetTemperatureThreshold", "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", 1.0),
    "fan": ("nvmlDeviceGetFanSpeed", None, 1e-2),
    "sm_clock_hz": ("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM", 1e6),
    "memory_clock_hz": ("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM", 1e6),
    "max_sm_clock_hz": ("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM", 1e6),
    "pcie_generation": ("nvmlDeviceGetCurrPcieLinkGeneration", None, 1),
    "pcie_width": ("nvmlDeviceGetCurrPcieLinkWidth", None, 1),
    # A share of the driver's last sampling period, in which a kernel ran.
    "utilization": ("nvmlDeviceGetUtilizationRates", None, lambda rates: rates.gpu / 100),
    "throttle": ("nvmlDeviceGetCurrentClocksEventReasons", None, throttle_words),
    # By all processes and the driver itself.
    "device_used_bytes": ("nvmlDeviceGetMemoryInfo", None, lambda memory: int(memory.used)),
    "total_bytes": ("nvmlDeviceGetMemoryInfo", None, lambda memory: int(memory.total)),
    "name": ("nvmlDeviceGetName", None, str),
    "driver_version": ("nvmlSystemGetDriverVersion", None, str),
    # 12040 is 12.4, the newest CUDA version that the driver supports.
    "cuda_version": ("nvmlSystemGetCudaDriverVersion_v2", None, lambda n: (n // 1000, n % 1000 // 10)),
}
"""Field -> NVML function, the constant it takes, and the factor, or the function, to the field's unit."""

_FATAL = ("UNINITIALIZED", "DRIVER_NOT_LOADED", "GPU_IS_LOST", "RESET_REQUIRED", "LIB_RM_VERSION_MISMATCH")
"""Errors after which no other call can succeed."""
_COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"
_GRAPHICS = "nvmlDeviceGetGraphicsRunningProcesses_v3"


class NoDriver(Exception):
    """No driver, or none that knows the device; the message is the reason."""


class Driver:
    """The driver's view of one GPU.

    `now` is the time of a measurement in seconds on the caller's clock.

    Args:
        device: UUID (with or without "GPU-"), PCI bus id, or index in the driver's order. The index ignores
            CUDA_VISIBLE_DEVICES, so torch's index 0 may be another GPU; its UUID never is.
        absences: records what cannot be measured.
        pid: process of process_used_bytes; this one by default.

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
        self._pid = os.getpid() if pid is None else pid
        self._lost = False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise NoDriver("no NVIDIA driver: its library NVML was not found") from None
        except pynvml.NVMLError as error:
            raise NoDriver(f"no NVIDIA driver that answers: {error}") from None
        try:
            self._handle = _find_handle(pynvml, device)
        except pynvml.NVMLError as error:
            self.close()
            raise NoDriver(f"the NVIDIA driver has no device {device}: {error}") from None

    def close(self) -> None:
        """Shut the driver down, unless it lost the GPU."""
        if not self._lost:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def read(self, field: str, now: float) -> Any:
        """Return the value of a field of _FIELDS; None while the driver gives none."""
        function, constant, unit = _FIELDS[field]
        arguments = () if constant is None else (getattr(self._nvml, constant),)
        answer = self._call(field, now, function, *arguments)
        if answer is None:
            return None
        return unit(answer) if callable(unit) else answer * unit

    def process_used_bytes(self, now: float) -> int | None:
        """Return the memory in use by the process, or else by its descendants; None while neither is listed."""
        field = "process_used_bytes"
        compute = self._call(field, now, _COMPUTE, certain=False)
        if compute is None:
            return None
        used = _by_pid(compute)
        pids = [self._pid] if self._pid in used else process_tree(self._pid)
        own = [size for pid in pids if (size := used.get(pid)) is not None]
        if not own:
            # Not final: a process is listed from its first use of the GPU on.
            why = (
                f"the driver does not report the memory of process {self._pid}: it has not used "
                "the GPU yet, or runs in a container that hides its number"
            )
            self._absences.missing(field, now, why)
            return None
        self._absences.present(field, now)
        return sum(own)

    def others(self, now: float) -> dict[str, int] | None:
        """Return the memory that other processes use, summed by the name of their program.

        In a container the driver may report process numbers that are not valid there.
        """
        compute = self._call("others", now, _COMPUTE)
        graphics = self._call("others", now, _GRAPHICS)
        if compute is None or graphics is None:
            return None
        # A process that computes and draws is in both lists, each time with all its memory.
        used = _by_pid(graphics) | _by_pid(compute)
        used.pop(self._pid, None)
        names: dict[str, int] = {}
        for pid, size in used.items():
            name = _process_name(pid)
            if size is None:
                self._absences.missing("others", now, f"the driver does not report the memory of {name}")
                return None
            names[name] = names.get(name, 0) + size
        return names

    def _call(self, field: str, now: float, function: str, *arguments: object, certain: bool = True) -> Any:
        """Call an NVML function; return None while it gives no answer.

        Args:
            certain: an answer always contains the field.
        """
        if self._lost or now < self._retry_at.get(field, now):
            return None
        device = () if function.startswith("nvmlSystem") else (self._handle,)
        try:
            answer = getattr(self._nvml, function)(*device, *arguments)
        except self._nvml.NVMLError as error:
            if error.value in (getattr(self._nvml, f"NVML_ERROR_{name}") for name in _FATAL):
                self._lost = True
                self._absences.missing("gpu", now, "the driver lost the GPU", error)
                return None
            final = (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            self._retry_at[field] = float("inf") if error.value in final else now + RETRY_SECONDS
            self._absences.missing(field, now, "the driver does not give it", error)
            return None
        self._absences.present("gpu", now)
        if certain:
            self._absences.present(field, now)
        return answer


def _process_name(pid: int) -> str:
    # The process may be of another PID namespace or have ended; a name may be any bytes.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return f"process {pid}"


def _by_pid(processes: Iterable[Any]) -> dict[int, int | None]:
    return {process.pid: process.usedGpuMemory for process in processes}


def _find_handle(nvml: ModuleType, device: str | int) -> Any:
    """Return NVML's handle of a device that is named as in Driver, or raise NVMLError."""
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    if re.fullmatch(r"([0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]", device):
        return nvml.nvmlDeviceGetHandleByPciBusId(device)
    # torch omits the prefix that NVML requires.
    uuid = device if device.startswith(("GPU-", "MIG-")) else f"GPU-{device}"
    return nvml.nvmlDeviceGetHandleByUUID(uuid)

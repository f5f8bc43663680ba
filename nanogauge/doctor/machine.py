"""Facts about this machine, from system files, short commands, packages and NVML.

Nothing is written. What cannot be read is None, False or empty. `root` is the folder of the system's files.
"""

import netrc
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from nanogauge import __version__
from nanogauge.errors import BadInput
from nanogauge.files import without_secrets
from nanogauge.hardware import find_gpu, usually_free_bytes
from nanogauge.measure.host import available_bytes, cpu_name, process_bytes, total_memory_bytes
from nanogauge.measure.sensors import DriverInfo, driver_info
from nanogauge.schema import FreeMemory, Hardware, TimeZone

ROOT = Path("/")
COMMAND_SECONDS = 2.0
"""Longest wait for a command."""
PACKAGES = ("torch", "numpy", "triton", "tiktoken", "datasets", "wandb", "nvidia-ml-py")
"""Packages whose versions are stored in machine.json."""
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Hosts under which `wandb login` stores its key, depending on its version."""

Runner = Callable[[Sequence[str]], str | None]
"""Runs a command and returns its output; None if it is missing, fails or hangs."""


def command_output(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | None:
    """Return the output of a command; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def capture_environment(device: str, driver: DriverInfo | None, torch_threads: int, folder: Path) -> dict[str, object]:
    """Return the content of machine.json: names and versions, without host, user or home folder.

    `driver` describes the GPU; None if the run uses no NVIDIA GPU. `folder` is that of the program that trains.
    """
    status = _git(folder, "status", "--porcelain")
    return {
        "device": device,
        "gpu_driver": driver.driver_version if driver is not None else None,
        "gpu_memory_bytes": driver.total_bytes if driver is not None else None,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch_threads,
        "memory_bytes": total_memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "time_zone": local_time_zone().model_dump(),
        "python": platform.python_version(),
        "nanogauge": __version__,
        **{package: _version(package) for package in PACKAGES},
        "git_commit": _git(folder, "rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": without_secrets(" ".join(sys.argv)),
    }


def local_time_zone() -> TimeZone:
    """Return the time zone of this machine with its present offset."""
    now = time.localtime()
    return TimeZone(name=now.tm_zone, utc_offset_seconds=now.tm_gmtoff)


def _git(folder: Path, *arguments: str) -> str | None:
    """Run git in a folder; None outside of a checkout."""
    return command_output(["git", "-C", str(folder), *arguments], seconds=10)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def is_wsl(root: Path = ROOT) -> bool:
    """Return True on Linux inside Windows (WSL)."""
    return "microsoft" in _read(root / "proc/version").lower()


def python_headers() -> Path | None:
    """Return the folder with Python.h; None if it is not installed."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


def wandb_key_from(environment: Mapping[str, str], home: Path) -> str | None:
    """Return where W&B would find its key, in words and without the key; None if nowhere.

    The search is wandb's, without importing it: the environment, else netrc.
    """
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environment.get(name):
            return name
    named = environment.get("NETRC")
    usual = (path for path in (home / ".netrc", home / "_netrc") if path.exists())
    path = Path(named).expanduser() if named else next(usual, None)
    if path is None:
        return None
    try:
        hosts = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return None
    server = urlsplit(environment.get("WANDB_BASE_URL", "")).netloc
    entries = (hosts.authenticators(host) for host in ([server] if server else WANDB_HOSTS))
    return path.name if any(entry is not None and entry[2] for entry in entries) else None


def free_memory(
    hardware: Hardware, cards: Sequence[DriverInfo] | None = None, gpus: int = 1, processes: int = 1
) -> FreeMemory | None:
    """Return the memory that a training process can use; None if unknown.

    On a GPU the driver reports it, else it is the GPU's memory less a desktop's share. Of several GPUs the fullest
    counts. `cards` are the GPUs; None for those of this name in this machine. `processes` of the run share the memory
    of a CPU.
    """
    usual = usually_free_bytes(hardware)
    if hardware.kind == "cpu":
        available, own = available_bytes(), process_bytes()
        if available is not None and own is not None:
            free = available // processes + own
            return FreeMemory(bytes=free, source="what this machine has free now")
        source = "all of this machine's memory"
        return None if usual is None else FreeMemory(bytes=usual, source=source)
    free_of_each = [
        card.total_bytes - card.used_by_others_bytes
        for card in (_cards_named(hardware) if cards is None else cards)
        if card.total_bytes is not None and card.used_by_others_bytes is not None
    ]
    if len(free_of_each) >= gpus:
        return FreeMemory(bytes=min(free_of_each[:gpus]), source="as the driver says")
    if usual is None or hardware.memory_bytes is None:
        return None
    if usual == hardware.memory_bytes:
        return FreeMemory(bytes=usual, source="the whole card")
    source = f"the card's {hardware.memory_bytes / 2**30:.4g} GiB less 1 for a desktop"
    return FreeMemory(bytes=usual, source=source)


def memory_to_plan_with(hardware: Hardware, given_gib: float | None, gpus: int) -> FreeMemory:
    """Return the free memory given by the user, or else the result of free_memory."""
    if given_gib is not None:
        if not 0 < given_gib < 1e6:
            raise BadInput("--free-vram-gib must be above 0, and a size that memory has.")
        return FreeMemory(bytes=int(given_gib * 2**30), source="as --free-vram-gib says")
    found = free_memory(hardware, gpus=gpus)
    if found is None:
        raise BadInput(f"the memory of {hardware.name} varies; say what is free with --free-vram-gib.")
    return found


def _cards_named(hardware: Hardware) -> list[DriverInfo]:
    """Return the GPUs of this name in this machine, in the driver's order."""
    cards = []
    for index in count():
        info = driver_info(index)
        if info.name is None:
            break
        row = find_gpu(info.name, info.total_bytes)
        if row is not None and row.name == hardware.name:
            cards.append(info)
    return cards

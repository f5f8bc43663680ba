"""Facts about this machine, from system files, short commands, packages and NVML.

Nothing is written. What cannot be read is None, False or empty. `root` is the folder of the
system's files.
"""

from __future__ import annotations

import netrc
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
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


def capture_environment(
    device: str, driver: DriverInfo | None, torch_threads: int
) -> dict[str, object]:
    """Return the content of machine.json: names and versions, without host, user or home folder.

    `driver` describes the GPU; None if the run uses no NVIDIA GPU.
    """
    status = _git("status", "--porcelain")
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
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": without_secrets(" ".join(sys.argv)),
    }


def local_time_zone() -> TimeZone:
    """Return the time zone of this machine with its present offset."""
    now = time.localtime()
    return TimeZone(name=now.tm_zone, utc_offset_seconds=now.tm_gmtoff)


def _git(*arguments: str) -> str | None:
    """Run git in the checkout of this file; None outside of one."""
    return command_output(["git", "-C", str(Path(__file__).parent), *arguments], seconds=10)


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


def _list(folder: Path, pattern: str = "*") -> list[Path]:
    """List a folder; empty if it may not be read, as in some containers."""
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


def is_wsl(root: Path = ROOT) -> bool:
    """Return True on Linux inside Windows (WSL)."""
    return "microsoft" in _read(root / "proc/version").lower()


def is_container(root: Path, environment: Mapping[str, str]) -> bool:
    marks = (".dockerenv", "run/.containerenv", "run/systemd/container")
    return (
        "container" in environment
        or "KUBERNETES_SERVICE_HOST" in environment
        or any((root / mark).exists() for mark in marks)
    )


@dataclass(frozen=True)
class SleepSettings:
    """What can suspend this machine."""

    system: str = "Linux"
    """As from platform.system()."""
    wsl: bool = False
    container: bool = False
    on_battery: bool = False
    masked: bool = False
    """Sleep is masked in systemd."""
    blocked: frozenset[str] = frozenset()
    """What inhibitors block now: sleep, idle, handle-lid-switch."""
    idle_action: str = "ignore"
    """logind's IdleAction."""
    lid_action: str | None = None
    """logind's action on a closed lid; None without a lid."""
    desktop: str | None = None
    """Name of the desktop or its display manager; None without a graphical login."""
    desktop_action: str | None = None
    """The desktop's action on an idle machine; None if unknown."""
    desktop_seconds: int = 0
    """Idle time before that action; 0 for never."""


def sleep_settings(root: Path, environment: Mapping[str, str], run: Runner) -> SleepSettings:
    logind = _logind(root)
    lid = logind.get("HandleLidSwitch", "suspend")
    desktop = _desktop(root, environment)
    action, seconds = _gnome(run) if desktop is not None and _is_gnome(desktop) else (None, 0)
    masks = [
        root / folder / unit
        for folder in ("etc/systemd/system", "run/systemd/system")
        for unit in ("sleep.target", "suspend.target")
    ]
    return SleepSettings(
        system=platform.system(),
        wsl=is_wsl(root),
        container=is_container(root, environment),
        on_battery=_on_battery(root),
        masked=any(m.is_symlink() and m.readlink() == Path("/dev/null") for m in masks),
        blocked=_blocked(run),
        idle_action=logind.get("IdleAction", "ignore"),
        lid_action=logind.get("HandleLidSwitchExternalPower", lid)
        if _list(root / "proc/acpi/button/lid")
        else None,
        desktop=desktop,
        desktop_action=action,
        desktop_seconds=seconds,
    )


def _logind(root: Path) -> dict[str, str]:
    """Read the [Login] section of logind's files in order of precedence; see logind.conf(5)."""
    places = [root / name / "systemd" for name in ("usr/lib", "usr/local/lib", "run", "etc")]
    main = next((f for p in reversed(places) if (f := p / "logind.conf").exists()), None)
    # A drop-in in /etc replaces those of the same name elsewhere; then they are sorted by name.
    drop_ins = {f.name: f for p in places for f in _list(p / "logind.conf.d", "*.conf")}
    values: dict[str, str] = {}
    for file in [*([main] if main else []), *(drop_ins[name] for name in sorted(drop_ins))]:
        section = ""
        for line in map(str.strip, _read(file).splitlines()):
            if line.startswith("["):
                section = line
            elif section == "[Login]" and "=" in line and not line.startswith(("#", ";")):
                key, _, value = (part.strip() for part in line.partition("="))
                values[key] = value
    return {key: value for key, value in values.items() if value}  # empty resets to the default


def _on_battery(root: Path) -> bool:
    return any(
        _read(supply / "type") == "Battery"
        and _read(supply / "status") == "Discharging"
        and _read(supply / "scope") != "Device"  # the battery of a mouse
        for supply in _list(root / "sys/class/power_supply")
    )


def _blocked(run: Runner) -> frozenset[str]:
    """Return what systemd's inhibitors block now; busctl prints it as `s "idle:sleep"`."""
    name = "org.freedesktop.login1"
    manager = [name, "/org/freedesktop/login1", f"{name}.Manager"]
    output = run(["busctl", "get-property", *manager, "BlockInhibited"]) or ""
    return frozenset(output.removeprefix("s ").strip('"').split(":")) - {""}


def _desktop(root: Path, environment: Mapping[str, str]) -> str | None:
    if named := environment.get("XDG_CURRENT_DESKTOP"):
        return named
    # Not set over ssh; but a login screen can also suspend the machine.
    manager = root / "etc/systemd/system/display-manager.service"
    return manager.readlink().stem if manager.is_symlink() else None


def _is_gnome(desktop: str) -> bool:
    return bool({"gnome", "ubuntu", "unity"} & set(desktop.lower().split(":")))


def _gnome(run: Runner) -> tuple[str | None, int]:
    """Return GNOME's action on an idle machine on mains power, and the idle time before it."""
    get = ["gsettings", "get", "org.gnome.settings-daemon.plugins.power"]
    action = run([*get, "sleep-inactive-ac-type"])
    seconds = run([*get, "sleep-inactive-ac-timeout"])
    if action is None or seconds is None or not (number := re.search(r"\d+$", seconds)):
        return None, 0
    return action.strip("'"), int(number[0])


def python_headers() -> Path | None:
    """Return the folder with Python.h; None if it is not installed."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


def required_version(package: str, of: str) -> str | None:
    """Return the version of a package that the installed package `of` requires with ==."""
    try:
        requirements = metadata.requires(of) or []
    except metadata.PackageNotFoundError:
        return None
    matches = (re.match(rf"{package}\s*\(?==\s*([\w.]+)", line) for line in requirements)
    return next((match[1] for match in matches if match), None)


def imported_version(package: str) -> tuple[str | None, str | None]:
    """Return the version of an installed package, and the error if it cannot be imported."""
    version = _version(package)
    if version is None:
        return None, None
    try:
        import_module(package)
    except Exception as error:  # a broken library can raise anything
        first_line = str(error).partition("\n")[0]
        return version, f"{type(error).__name__}: {first_line}"
    return version, None


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

    On a GPU the driver reports it, else it is the GPU's memory less a desktop's share. Of several
    GPUs the fullest counts. `cards` are the GPUs; None for those of this name in this machine.
    `processes` of the run share the memory of a CPU.
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
        raise BadInput(
            f"the memory of {hardware.name} varies; say what is free with --free-vram-gib."
        )
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

"""Facts of this machine that the doctor judges: system files, short commands, packages, NVML.

Everything here reads, and nothing writes; what cannot be read is None, False or empty. `root` is
the folder in which the system's files lie.
"""

from __future__ import annotations

import netrc
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from nanogauge.errors import BadInput
from nanogauge.hardware import find_gpu, usually_free_bytes
from nanogauge.measure.host import available_bytes, process_bytes
from nanogauge.measure.sensors import DriverInfo, driver_info
from nanogauge.schema import FreeMemory, Hardware

ROOT = Path("/")
COMMAND_SECONDS = 2.0
"""a command that has not answered by then is taken for one that does not answer"""
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""under either of which `wandb login` of some version writes its key"""

Ask = Callable[[Sequence[str]], str | None]
"""runs a command and gives what it printed; None where it is missing, fails or hangs"""


def ask(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _inside(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder; nothing where it may not be looked into, as in some containers."""
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


def is_wsl(root: Path = ROOT) -> bool:
    """Whether this Linux is the one inside Windows."""
    return "microsoft" in _read(root / "proc/version").lower()


def is_container(root: Path, environment: Mapping[str, str]) -> bool:
    marks = (".dockerenv", "run/.containerenv", "run/systemd/container")
    return (
        "container" in environment
        or "KUBERNETES_SERVICE_HOST" in environment
        or any((root / mark).exists() for mark in marks)
    )


@dataclass(frozen=True)
class Sleep:
    """What can put this machine to sleep."""

    system: str = "Linux"
    """as platform.system() has it"""
    wsl: bool = False
    container: bool = False
    on_battery: bool = False
    masked: bool = False
    """systemd was told never to sleep"""
    blocked: frozenset[str] = frozenset()
    """what inhibitors block now: sleep, idle, handle-lid-switch"""
    idle_action: str = "ignore"
    """of logind"""
    lid_action: str | None = None
    """of logind; None without a lid"""
    desktop: str | None = None
    """its name, or that of its display manager; None where nobody can log in on a screen"""
    desktop_action: str | None = None
    """what the desktop does to an idle machine; None where that is not known"""
    desktop_seconds: int = 0
    """after which it does that; 0 is never"""


def sleep_facts(root: Path, environment: Mapping[str, str], ask: Ask) -> Sleep:
    logind = _logind(root)
    lid = logind.get("HandleLidSwitch", "suspend")
    desktop = _desktop(root, environment)
    action, seconds = _gnome(ask) if desktop is not None and _is_gnome(desktop) else (None, 0)
    masks = ("etc/systemd/system", "run/systemd/system")
    return Sleep(
        system=platform.system(),
        wsl=is_wsl(root),
        container=is_container(root, environment),
        on_battery=_on_battery(root),
        masked=any(
            (root / folder / unit).is_symlink()
            and (root / folder / unit).readlink() == Path("/dev/null")
            for folder in masks
            for unit in ("sleep.target", "suspend.target")
        ),
        blocked=_blocked(ask),
        idle_action=logind.get("IdleAction", "ignore"),
        lid_action=logind.get("HandleLidSwitchExternalPower", lid)
        if _inside(root / "proc/acpi/button/lid")
        else None,
        desktop=desktop,
        desktop_action=action,
        desktop_seconds=seconds,
    )


def _logind(root: Path) -> dict[str, str]:
    """The [Login] section of logind's files, the later over the earlier; see logind.conf(5)."""
    places = [root / name / "systemd" for name in ("usr/lib", "usr/local/lib", "run", "etc")]
    main = next((f for p in reversed(places) if (f := p / "logind.conf").exists()), None)
    # Of drop-ins with the same name the one in /etc stands for all; then they go by name.
    drop_ins = {f.name: f for p in places for f in _inside(p / "logind.conf.d", "*.conf")}
    values: dict[str, str] = {}
    for file in [*([main] if main else []), *(drop_ins[name] for name in sorted(drop_ins))]:
        section = ""
        for line in map(str.strip, _read(file).splitlines()):
            if line.startswith("["):
                section = line
            elif section == "[Login]" and "=" in line and not line.startswith(("#", ";")):
                key, _, value = (part.strip() for part in line.partition("="))
                values[key] = value
    return {key: value for key, value in values.items() if value}  # empty: the default again


def _on_battery(root: Path) -> bool:
    for supply in _inside(root / "sys/class/power_supply"):
        of_a_mouse = _read(supply / "scope") == "Device"
        discharging = _read(supply / "status") == "Discharging"
        if _read(supply / "type") == "Battery" and discharging and not of_a_mouse:
            return True
    return False


def _blocked(ask: Ask) -> frozenset[str]:
    """What systemd's inhibitors block at this moment; its answer is `s "idle:sleep"`."""
    name = "org.freedesktop.login1"
    manager = [name, "/org/freedesktop/login1", f"{name}.Manager"]
    told = ask(["busctl", "get-property", *manager, "BlockInhibited"]) or ""
    return frozenset(told.removeprefix("s ").strip('"').split(":")) - {""}


def _desktop(root: Path, environment: Mapping[str, str]) -> str | None:
    if named := environment.get("XDG_CURRENT_DESKTOP"):
        return named
    # Over ssh no variable tells; a greeter that waits for a log-in can send the machine to sleep.
    manager = root / "etc/systemd/system/display-manager.service"
    return manager.readlink().stem if manager.is_symlink() else None


def _is_gnome(desktop: str) -> bool:
    return bool({"gnome", "ubuntu", "unity"} & set(desktop.lower().split(":")))


def _gnome(ask: Ask) -> tuple[str | None, int]:
    """What GNOME does to an idle machine on mains, and after how many seconds."""
    get = ["gsettings", "get", "org.gnome.settings-daemon.plugins.power"]
    action = ask([*get, "sleep-inactive-ac-type"])
    seconds = ask([*get, "sleep-inactive-ac-timeout"])
    if action is None or seconds is None or not (number := re.search(r"\d+$", seconds)):
        return None, 0
    return action.strip("'"), int(number[0])


def first_found(names: Sequence[str]) -> str | None:
    """The first of these programs that is there."""
    return next((name for name in names if shutil.which(name) is not None), None)


def python_headers() -> Path | None:
    """The folder with Python.h; None where it is not installed."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


def required_version(package: str, of: str) -> str | None:
    """The version of a package that another, which is installed, asks for with ==."""
    try:
        asked = metadata.requires(of) or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(rf"{package}\s*\(?==\s*([\w.]+)", line) for line in asked)
    return next((match[1] for match in found if match), None)


def imported_version(package: str) -> tuple[str | None, str | None]:
    """The version of a package, if it can be imported; and why it cannot, where it is there."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None, None
    try:
        import_module(package)
    except Exception as error:  # a broken library can raise anything
        return (
            version,
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
    return version, None


def wandb_key_from(environment: Mapping[str, str], home: Path) -> str | None:
    """Where W&B would find its key, in words; None where it has none. The key itself stays there.

    As wandb looks for it, without importing it: the environment, else netrc.
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
        known = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return None
    server = urlsplit(environment.get("WANDB_BASE_URL", "")).netloc
    entries = (known.authenticators(host) for host in ([server] if server else WANDB_HOSTS))
    return path.name if any(entry is not None and entry[2] for entry in entries) else None


def free_memory(
    hardware: Hardware,
    cards: Sequence[DriverInfo] | None = None,
    gpus: int = 1,
    processes: int = 1,
) -> FreeMemory | None:
    """Return the memory that a training process can use; None where its size is not known.

    On a GPU this is what the driver reports of it, else the card less a desktop's share.

    Args:
        hardware: the device of the run.
        cards: the devices, as the driver describes them; None for those of this name.
        gpus: devices of the run, of which the fullest counts.
        processes: those of the run that share the memory of this machine.
    """
    usual = usually_free_bytes(hardware)
    if hardware.kind == "cpu":
        available, held = available_bytes(), process_bytes()
        if available is not None and held is not None:
            free = available // processes + held
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
    """Return the free memory as given by the user, else as found by free_memory.

    Raises:
        BadInput: if what is given is no size of a memory, or nothing is given or found.
    """
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
    """Return the cards of this name in this machine, in the driver's order."""
    present = []
    for index in count():
        info = driver_info(index)
        if info.name is None:
            break
        row = find_gpu(info.name, info.total_bytes)
        if row is not None and row.name == hardware.name:
            present.append(info)
    return present

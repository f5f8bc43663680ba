"""Check that nothing suspends this machine during a run."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanogauge.doctor.checks import Finding
from nanogauge.doctor.machine import Runner, is_wsl
from nanogauge.quantities import format_seconds
from nanogauge.shell import python_command

_SUSPENDS = frozenset(("suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate", "poweroff", "halt", "reboot"))
_LOGIND = "org.freedesktop.login1"
_PROPERTIES = ("IdleAction", "HandleLidSwitch", "HandleLidSwitchExternalPower", "OnExternalPower", "BlockInhibited")


def check_sleep(root: Path, environment: Mapping[str, str], run: Runner, system: str) -> Finding:
    """Check the power settings of the system, its desktop, the lid and the battery.

    Args:
        root: folder of the system's files.
        environment: environment variables.
        run: runs a command.
        system: result of platform.system().
    """
    start = f"{python_command('train.py')} ..."
    if is_wsl(root):
        text = "not known: Windows' power plan decides when it sleeps"
        return Finding("sleep", "warn", text, "in Windows: powercfg /change standby-timeout-ac 0")
    if system == "Darwin":
        text = "not known: macOS decides when it sleeps"
        return Finding("sleep", "warn", text, f"start it as: caffeinate -i {start}")
    logind = _logind(run)
    masks = (root / f"{top}/systemd/system/{unit}.target" for top in ("etc", "run") for unit in ("sleep", "suspend"))
    excuse = None
    if _is_container(root, environment):
        excuse = "not known: this is a container, and its host decides"
    elif any(m.is_symlink() and m.readlink() == Path("/dev/null") for m in masks):
        excuse = "sleep is switched off (masked in systemd)"
    causes = [] if excuse else list(_suspensions(root, environment, run, logind))
    keep_awake = f"start it as: systemd-inhibit --what=idle:sleep:handle-lid-switch {start}"
    remedies = [keep_awake] if causes else []
    if logind.get("OnExternalPower") == "false":
        causes.append("it runs on its battery")
        remedies.append("plug it in")
    if causes:
        return Finding("sleep", "warn", "; ".join(causes), "; ".join(remedies))
    if "sleep" in logind.get("BlockInhibited", "").split(":"):
        excuse = excuse or "sleep is blocked as long as an inhibitor is active"
    return Finding("sleep", "go", excuse or "no setting suspends an idle machine")


def _suspensions(root: Path, environment: Mapping[str, str], run: Runner, logind: Mapping[str, str]) -> Iterator[str]:
    """Yield what would suspend this Linux machine."""
    blocked = logind.get("BlockInhibited", "").split(":")
    if "sleep" not in blocked:
        idle = logind.get("IdleAction")
        if idle in _SUSPENDS:
            yield f"logind does {idle} without input (IdleAction)"
        desktop = _desktop(root, environment)
        is_gnome = bool({"gnome", "ubuntu", "unity"} & set(desktop.lower().split(":")))
        action, seconds = _gnome(run) if is_gnome else (None, 0)
        if action in _SUSPENDS and seconds:
            yield f"GNOME does {action} after {format_seconds(seconds)} without input"
        if desktop and action is None:
            yield f"not known: when {desktop} suspends an idle machine"
    lid = logind.get("HandleLidSwitchExternalPower") or logind.get("HandleLidSwitch", "suspend")
    if lid in _SUSPENDS and _has_lid(root) and "handle-lid-switch" not in blocked:
        yield f"closing the lid does {lid}"


def _logind(run: Runner) -> dict[str, str]:
    """Return systemd-logind's properties; busctl prints one a line, such as `s "idle:sleep"`."""
    manager = [_LOGIND, "/org/freedesktop/login1", f"{_LOGIND}.Manager"]
    lines = (run(["busctl", "get-property", *manager, *_PROPERTIES]) or "").splitlines()
    values = (line.partition(" ")[2].strip('"') for line in lines)
    return dict(zip(_PROPERTIES, values, strict=False))


def _is_container(root: Path, environment: Mapping[str, str]) -> bool:
    variables = {"container", "KUBERNETES_SERVICE_HOST"} & environment.keys()
    marks = (".dockerenv", "run/.containerenv", "run/systemd/container")
    return bool(variables) or any((root / mark).exists() for mark in marks)


def _has_lid(root: Path) -> bool:
    try:
        return any((root / "proc/acpi/button/lid").glob("*"))
    except OSError:  # some containers hide it
        return False


def _desktop(root: Path, environment: Mapping[str, str]) -> str:
    """Return the name of the desktop or its display manager; empty without a graphical login."""
    # The variable is not set over ssh; but a login screen can also suspend the machine.
    manager = root / "etc/systemd/system/display-manager.service"
    named = environment.get("XDG_CURRENT_DESKTOP", "")
    return named or (manager.readlink().stem if manager.is_symlink() else "")


def _gnome(run: Runner) -> tuple[str | None, int]:
    """Return GNOME's action on an idle machine on mains power, and the idle time before it."""
    get = ["gsettings", "get", "org.gnome.settings-daemon.plugins.power"]
    action = run([*get, "sleep-inactive-ac-type"])
    seconds = run([*get, "sleep-inactive-ac-timeout"])
    if action is None or seconds is None or not (number := re.search(r"\d+$", seconds)):
        return None, 0
    return action.strip("'"), int(number[0])

"""The doctor's judgement: go, warn or no-go on what a night of training stands on.

Each check takes plain facts and knows no configuration and no prediction; measure/machine.py reads
the facts, preflight.py brings both together. What is not known is said not to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogauge.doctor.machine import Sleep
from nanogauge.quantities import Interval, format_seconds, format_value

CheckVerdict = Literal["go", "warn", "no-go"]

GOOD_PASSES = 4
"""Muennighoff et al. 2023, Scaling Data-Constrained Language Models: up to four passes over the
data are nearly as good as new data"""
KEEP_AWAKE = "start it as: systemd-inhibit --what=idle:sleep:handle-lid-switch python train.py ..."
_NAMED_PROGRAMS = 4


@dataclass(frozen=True)
class Finding:
    """One check's result; a warning and a no-go have a remedy."""

    check: str
    verdict: CheckVerdict
    text: str
    remedy: str | None = None


def worst(findings: list[Finding]) -> CheckVerdict:
    """The verdict of all checks together."""
    verdicts = {finding.verdict for finding in findings}
    return "no-go" if "no-go" in verdicts else "warn" if "warn" in verdicts else "go"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def check_memory(
    place: str,
    free: int | None,
    total: int | None,
    others: Mapping[str, int] | None,
    need: Interval | None,
    fit: Literal["fits", "doubtful", "does not fit"] | None,
    smaller: str | None,
) -> Finding:
    """What is free on the device against the predicted peak, and who holds the rest.

    Args:
        place: what kind of memory it is.
        free: bytes that this process can come to hold; None where nobody tells.
        total: bytes of the device.
        others: bytes that other programs hold, by name.
        need: peak of this process; None without a run.
        fit: what follows from need and free.
        smaller: the flags of a micro-batch that fits.
    """
    if free is None or total is None:
        return Finding("memory", "go", f"not known: nobody tells what {place} is free")
    largest = sorted((others or {}).items(), key=lambda item: -item[1])[:_NAMED_PROGRAMS]
    held = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    text = f"{_gib(free)} of {_gib(total)} GiB {place} free" + (f" ({held} GiB)" if held else "")
    if need is None or fit is None:
        return Finding("memory", "go", text)
    low, expected, high = map(_gib, (need.low, need.expected, need.high))
    text = f"the run peaks at {expected} GiB ({low} to {high}), {text}"
    if fit == "fits":
        return Finding("memory", "go", text)
    ways = [f"close {largest[0][0]}"] if largest else ["free some"]
    ways += [smaller] if smaller is not None else ["make the model smaller (--model.n-layer, ...)"]
    verdict: CheckVerdict = "warn" if fit == "doubtful" else "no-go"
    return Finding("memory", verdict, f"{fit}: {text}", " or ".join(ways))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@dataclass(frozen=True)
class Writes:
    """What a run will still write, in bytes."""

    checkpoint: int
    """one of them"""
    copies: int
    """as many as lie there at once, the one that is being written among them"""
    there: int
    """what is there already of those"""
    log: int

    @property
    def total(self) -> int:
        """A resumed run needs room for one more checkpoint, even where the older ones are there."""
        return max(self.checkpoint * self.copies - self.there, self.checkpoint) + self.log


def check_disk(folder: Path, obstacle: str | None, free: int, writes: Writes | None) -> Finding:
    """Whether the run folder can be written, and has room for what is to come.

    Args:
        folder: the run folder, whether it is there or not.
        obstacle: why it cannot be made or written, if so.
        free: bytes on its disk.
        writes: what the run will add to it; None without a run.
    """
    if obstacle is not None:
        remedy = "choose another with --run.out"
        return Finding("disk", "no-go", f"cannot make the folder {folder}: {obstacle}", remedy)
    if writes is None:
        return Finding("disk", "go", f"{_gb(free)} free for {folder}")
    text = (
        f"{_gb(free)} free, the run needs up to {_gb(writes.total)}: {writes.copies} checkpoints "
        f"of {_gb(writes.checkpoint)}, log {_gb(writes.log)}"
    )
    if writes.total > free:
        remedy = f"free {_gb(writes.total - free)} there, or take another disk with --run.out"
        return Finding("disk", "no-go", text, remedy)
    if free < 2 * writes.total:
        remedy = "free some: what else is written in the night may fill the disk"
        return Finding("disk", "warn", text, remedy)
    return Finding("disk", "go", text)


def check_data(
    steps: int, run_tokens: int, found: int, planned: int | None, where: str, fixed: bool
) -> Finding:
    """Whether there are as many tokens as planned, and how often the run passes over them.

    Args:
        steps: optimizer steps of the run.
        run_tokens: tokens that they read.
        found: training tokens that are there.
        planned: training tokens of the plan.
        where: their name or folder.
        fixed: whether there can be no more of them.
    """
    passes = run_tokens / found
    tokens = format_value("tokens_total", found)
    text = f"{tokens} training tokens in {where}: {passes:.3g} passes"
    if fixed:
        return Finding("data", "go", text)
    prepare = "python prepare_fineweb.py --tokens {} --out ANOTHER_FOLDER"
    if planned is not None and found < 0.99 * planned:
        intended = format_value("tokens_total", planned)
        text += f", not the {run_tokens / planned:.3g} over the {intended} of data.tokens"
        remedy = f"{prepare.format(planned)}, or plan with --data.tokens {found}"
        return Finding("data", "warn", text, remedy)
    if passes > GOOD_PASSES:
        text += f"; beyond {GOOD_PASSES}, repeated tokens teach less and less"
        enough, fewer = math.ceil(run_tokens / GOOD_PASSES), int(steps * GOOD_PASSES / passes)
        remedy = f"{prepare.format(enough)}, or --train.max-steps {max(fewer, 1)}"
        return Finding("data", "warn", text, remedy)
    return Finding("data", "go", text)


_SUSPENDS = frozenset(
    ("suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate", "poweroff", "halt", "reboot")
)


def check_sleep(facts: Sleep) -> Finding:
    """Whether something puts the machine to sleep in the middle of the night."""
    causes: list[str] = []
    remedies: list[str] = []
    if facts.on_battery:
        causes.append("it runs on its battery")
        remedies.append("plug it in")
    if facts.wsl or facts.system == "Windows":
        causes.append("not known: Windows' power plan decides when it sleeps")
        remedies.append("in Windows: powercfg /change standby-timeout-ac 0")
    elif facts.system == "Darwin":
        causes.append("not known: macOS decides when it sleeps")
        remedies.append("start it as: caffeinate -i python train.py ...")
    elif sleepers := _sleepers(facts):
        causes += sleepers
        remedies.append(KEEP_AWAKE)
    if causes:
        return Finding("sleep", "warn", "; ".join(causes), "; ".join(remedies))
    if facts.container:
        return Finding("sleep", "go", "not known: this is a container, and its host decides")
    if facts.masked:
        return Finding("sleep", "go", "sleep is switched off (masked in systemd)")
    if "sleep" in facts.blocked:
        return Finding("sleep", "go", "sleep is blocked as long as an inhibitor is held")
    return Finding("sleep", "go", "nothing was found that suspends an idle machine")


def _sleepers(facts: Sleep) -> list[str]:
    """What sends a Linux of its own to sleep."""
    if facts.container or facts.masked:
        return []
    causes = []
    if "sleep" not in facts.blocked:
        if facts.idle_action in _SUSPENDS:
            causes.append(f"logind does {facts.idle_action} when nobody types (IdleAction)")
        if facts.desktop_action in _SUSPENDS and facts.desktop_seconds:
            after = format_seconds(facts.desktop_seconds)
            causes.append(f"GNOME does {facts.desktop_action} after {after} without input")
        if facts.desktop is not None and facts.desktop_action is None:
            causes.append(f"not known: when {facts.desktop} suspends an idle machine")
    if facts.lid_action in _SUSPENDS and "handle-lid-switch" not in facts.blocked:
        causes.append(f"closing the lid does {facts.lid_action}")
    return causes


def check_wsl(wsl: bool, system: str, on_gpu: bool) -> Finding:
    """Whether the driver may put into system memory what does not fit on the card.

    Source: microsoft/WSL#11050 (the policy is not always honoured), #8447 (pinned memory).
    """
    where = "WSL" if wsl else "Windows"
    if not wsl and system != "Windows":
        return Finding("wsl", "go", "not WSL")
    if not on_gpu:
        return Finding("wsl", "go", f"{where}, but the run uses no GPU")
    return Finding(
        "wsl",
        "warn",
        f"{where}'s driver may move what does not fit on the card into system memory, many times "
        "slower, instead of running out of memory; pinned memory is scarce",
        'NVIDIA Control Panel: "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"; it '
        "is not always honoured, so leave a micro-batch of room",
    )


def check_power(limit: float | None, default: float | None, datasheet: float | None) -> Finding:
    """Whether the board may draw what it was made for; all in watts, None where not known."""
    if limit is None:
        return Finding("power", "go", "not known: no power limit is told here")
    longer = "steps may take longer than predicted"
    if default is not None and limit < default - 0.5:
        text = f"limited to {limit:g} W where {default:g} W is this card's default: {longer}"
        return Finding(
            "power", "warn", text, f"sudo nvidia-smi -pl {default:g}, unless it is meant"
        )
    if datasheet is not None and limit < datasheet - 0.5:
        text = f"limited to {limit:g} W where the datasheet has {datasheet:g} W: {longer}"
        remedy = "python plan.py CONFIG --calibrate measures what it does with that"
        return Finding("power", "warn", text, remedy)
    return Finding("power", "go", f"{limit:g} W" + (", the default" if limit == default else ""))


def check_wandb(mode: str, installed: bool, key_from: str | None) -> Finding:
    """Whether the dashboard will be there.

    Args:
        mode: wandb.mode.
        installed: whether the package is there.
        key_from: where W&B finds its key; never the key.
    """
    if mode == "disabled":
        return Finding("wandb", "go", "off: wandb.mode is disabled")
    if not installed:
        text = "the package wandb is not installed: the run is not mirrored"
        return Finding("wandb", "warn", text, "pip install wandb, or --wandb.mode disabled")
    if mode == "offline":
        return Finding("wandb", "go", "offline: wandb sync uploads the run later")
    if key_from is not None:
        return Finding("wandb", "go", f"online, with the key from {key_from}")
    if mode == "auto":
        return Finding("wandb", "go", "offline: no key is known; wandb login makes it online")
    text = "wandb.mode is online, and no key is known: the run is mirrored offline"
    return Finding("wandb", "warn", text, "wandb login, or --wandb.mode offline")

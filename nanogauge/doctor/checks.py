"""Checks of a machine before a run, each with a verdict: go, warn or no-go.

Each check takes plain facts, from machine.py, and knows no configuration and no prediction; preflight.py brings both
together. Facts that are not known do not fail a check.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nanogauge.measure.sensors import DriverInfo
from nanogauge.quantities import Interval, format_value
from nanogauge.shell import pip_install, python_command, tool_command

CheckVerdict = Literal["go", "warn", "no-go"]

DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""Oldest driver of each CUDA major version. Source: NVIDIA, CUDA compatibility, table 1."""
GOOD_EPOCHS = 4
"""Passes over the data that are nearly as good as new data. Source: Muennighoff et al. 2023, Scaling Data-Constrained
Language Models."""
_NAMED_PROGRAMS = 4


@dataclass(frozen=True)
class Finding:
    """Result of one check; a warning and a no-go have a remedy."""

    check: str
    verdict: CheckVerdict
    text: str
    remedy: str | None = None


def worst(findings: list[Finding]) -> CheckVerdict:
    """Return the overall verdict."""
    verdicts = {finding.verdict for finding in findings}
    return "no-go" if "no-go" in verdicts else "warn" if "warn" in verdicts else "go"


@dataclass(frozen=True)
class TorchBuild:
    """Properties of the installed torch build, and the device that it would train on."""

    version: str
    device: str | None
    """cuda, mps or cpu; None if the device of the configuration is absent."""
    cuda: str | None = None
    """CUDA version of the build; None for a build without CUDA."""
    gpu: str | None = None
    """Name of the device if it is a CUDA GPU."""
    capability: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()
    """GPU architectures that the build has code for: sm_89, compute_90, ..."""


def check_gpu(
    wanted: str, torch: TorchBuild, driver: DriverInfo, visible: str | None, system: str = "Linux"
) -> Finding:
    """Check that the GPU, its driver and torch agree.

    `wanted` is run.device, `visible` CUDA_VISIBLE_DEVICES, None if not set, and `system` is the result of
    platform.system().
    """
    build = f"torch {torch.version}"
    if wanted == "cpu":
        unused = f"; {driver.name} stays unused" if driver.name is not None else ""
        return Finding("gpu", "go", f"run.device is cpu, {build}{unused}")
    if torch.device == "mps":
        return Finding("gpu", "go", f"Apple's GPU, {build}")
    if wanted == "mps":
        remedy = "choose --run.device auto or cpu"
        return Finding("gpu", "no-go", "torch has no mps device here", remedy)
    if torch.gpu is None:
        return _unusable_gpu(wanted, torch, driver, visible, system)
    if torch.capability is not None and not _has_code(torch.capability, torch.architectures):
        major, minor = torch.capability
        text = (
            f"{build} has no code for {torch.gpu}, compute capability {major}.{minor}: it is built "
            f"for {', '.join(torch.architectures)}"
        )
        return Finding("gpu", "no-go", text, _other_build(torch))
    if torch.cuda is not None and driver.name is None:
        text = f"{torch.gpu} trains, but its sensors are absent: {driver.absent['name']}"
        remedy = "power and temperature will not be measured; check that nvidia-smi works"
        return Finding("gpu", "warn", text, remedy)
    version = f", driver {driver.driver_version}" if driver.driver_version is not None else ""
    cuda = f" (CUDA {torch.cuda})" if torch.cuda is not None else ""
    return Finding("gpu", "go", f"{torch.gpu}{version}, {build}{cuda}")


def _other_build(torch: TorchBuild) -> str:
    """Return what to do about a GPU that the installed build of torch has no code for."""
    assert torch.capability is not None
    processor = "train on the processor: --run.device cpu"
    for index, (lowest, highest) in remedies()["wheels"].items():
        if tuple(lowest) <= torch.capability <= tuple(highest):
            install = pip_install("--force-reinstall", f"torch=={_public(torch.version)}", "--index-url", index)
            eager = "; train with --run.compile false" if torch.capability < (7, 0) else ""
            return f"that build has it: {install}{eager}; or {processor}"
    return f"no current build of torch has code for it, so the card cannot train; {processor}"


@cache
def remedies() -> dict[str, Any]:
    """Return the tables of systems.toml."""
    return tomllib.loads(Path(__file__).with_name("systems.toml").read_text(encoding="utf-8"))


def _unusable_gpu(wanted: str, torch: TorchBuild, driver: DriverInfo, visible: str | None, system: str) -> Finding:
    """Explain why torch has no CUDA GPU."""
    build, card = f"torch {torch.version}", driver.name
    if torch.cuda is None and card is not None:
        text = f"{build} is a CPU build but there is an NVIDIA GPU, {card}"
        # The Python package index has CUDA builds for Linux alone.
        index = [] if system == "Linux" else ["--index-url", list(remedies()["wheels"])[-1]]
        install = pip_install("--force-reinstall", f"torch=={_public(torch.version)}", *index)
        remedy = f"install a CUDA build: {install}; or train on the processor: --run.device cpu"
        if system == "Darwin":
            remedy = "macOS has no CUDA; choose --run.device mps or cpu"
        return Finding("gpu", "no-go", text, remedy)
    known, built = driver.cuda_version, int((torch.cuda or "0").partition(".")[0])
    if known is not None and known[0] < built:
        needed = f"{DRIVER_OF_CUDA[built]} or newer" if built in DRIVER_OF_CUDA else "a newer one"
        text = (
            f"driver {driver.driver_version} knows CUDA up to {known[0]}.{known[1]}, and {build} "
            f"is built for CUDA {torch.cuda}"
        )
        oldest = next(iter(remedies()["wheels"]))
        other = pip_install("--force-reinstall", f"torch=={_public(torch.version)}", "--index-url", oldest)
        remedy = f"install the NVIDIA driver {needed}, or a torch for CUDA 12: {other}"
        return Finding("gpu", "no-go", text, remedy)
    if card is None and wanted == "cuda":
        text = f"no CUDA GPU is visible to torch ({driver.absent['name']})"
        remedy = "check nvidia-smi and the driver, or try the processor: --run.device cpu"
        return Finding("gpu", "no-go", text, remedy)
    if card is None:
        text = f"none ({driver.absent['name']}): {build} trains on the processor"
        return Finding("gpu", "go", text)
    if visible is not None:
        verdict: CheckVerdict = "no-go" if wanted == "cuda" else "warn"
        remedy = "unset CUDA_VISIBLE_DEVICES, or train on the processor with --run.device cpu"
        return Finding("gpu", verdict, f"CUDA_VISIBLE_DEVICES={visible} hides {card}", remedy)
    text = f"the driver shows {card}, and torch cannot use it"
    reload = "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm"
    return Finding("gpu", "no-go", text, f"after a suspend: {reload}; else restart the machine")


def _public(version: str) -> str:
    """Remove the local part of a version: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]


def _has_code(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Return True if a build runs on a GPU of this compute capability.

    Machine code (sm) runs on the same major and a later minor version, PTX (compute) on all later ones. Unknown names
    count as code for it.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            return True
        code, exact = (int(match[2]), int(match[3])), match[4] == "a"
        later = code < capability and not exact
        if code == capability or (later and (match[1] == "compute" or code[0] == capability[0])):
            return True
    return not architectures


def check_compiler(
    language: str, tried: tuple[str, ...], compiler: str | None, headers: Path | None, install: str
) -> Finding:
    """Check that Inductor (C++ on a CPU) or Triton (C on a GPU) can build its generated code.

    `compiler` is the one of `tried` that is installed; `headers` is the folder of Python.h; `install` is the command
    that installs both.
    """
    missing = [] if compiler is not None else [f"no {language} compiler ({' or '.join(tried)})"]
    missing += [] if headers is not None else ["no Python.h"]
    if not missing:
        return Finding("compiler", "go", f"{compiler}, and Python.h")
    return Finding(
        "compiler",
        "warn",
        f"{' and '.join(missing)}: training runs uncompiled, slower",
        f"{install}; --run.compile false if that is meant",
    )


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
    """Compare the free memory of the device with the predicted peak.

    Of `total` bytes this process can use `free`, and `others` are used by other programs, by name. `need` is the
    predicted peak, None without a run; `smaller` are flags of a micro-batch that fits.
    """
    if free is None or total is None:
        return Finding("memory", "go", f"not known: how much {place} is free")
    largest = sorted((others or {}).items(), key=lambda item: -item[1])[:_NAMED_PROGRAMS]
    used = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    text = f"{_gib(free)} of {_gib(total)} GiB {place} free" + (f" ({used} GiB)" if used else "")
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
class DiskUse:
    """Bytes that a run writes."""

    checkpoint: int
    """Size of one checkpoint in bytes."""
    copies: int
    """Checkpoints that exist at once, including the one being written."""
    existing: int
    """Bytes of checkpoints that exist already."""
    log: int

    @property
    def total(self) -> int:
        """Bytes still to write; a resumed run needs room for at least one more checkpoint."""
        return max(self.checkpoint * self.copies - self.existing, self.checkpoint) + self.log


def check_disk(folder: Path, obstacle: str | None, free: int, use: DiskUse | None) -> Finding:
    """Check that the run folder is writable, and that its disk has room for what a run writes.

    `obstacle` says why it cannot be created or written; None if it can.
    """
    if obstacle is not None:
        remedy = "choose another with --run.out"
        return Finding("disk", "no-go", f"cannot make the folder {folder}: {obstacle}", remedy)
    if use is None:
        return Finding("disk", "go", f"{_gb(free)} free for {folder}")
    text = (
        f"{_gb(free)} free, the run needs up to {_gb(use.total)}: {use.copies} checkpoints "
        f"of {_gb(use.checkpoint)}, log {_gb(use.log)}"
    )
    if use.total > free:
        remedy = f"free {_gb(use.total - free)} there, or take another disk with --run.out"
        return Finding("disk", "no-go", text, remedy)
    if free < 2 * use.total:
        remedy = "free some: other programs may fill the disk during the night"
        return Finding("disk", "warn", text, remedy)
    return Finding("disk", "go", text)


def check_data(steps: int, run_tokens: int, available: int, planned: int | None, where: str, fixed: bool) -> Finding:
    """Check that the planned tokens are available, and how many epochs the run takes.

    `where` names the data set; `fixed` is True if it cannot be enlarged.
    """
    epochs = run_tokens / available
    tokens = format_value("tokens_total", available)
    text = f"{tokens} training tokens in {where}: {epochs:.3g} passes"
    if fixed:
        return Finding("data", "go", text)
    prepare = python_command("prepare_fineweb.py", "--out", "ANOTHER_FOLDER", "--tokens")
    if planned is not None and available < 0.99 * planned:
        intended = format_value("tokens_total", planned)
        text += f", not the {run_tokens / planned:.3g} over the {intended} of data.tokens"
        remedy = f"{prepare} {planned}, or plan with --data.tokens {available}"
        return Finding("data", "warn", text, remedy)
    if epochs > GOOD_EPOCHS:
        text += f"; beyond {GOOD_EPOCHS}, repeated tokens teach less and less"
        enough, fewer = math.ceil(run_tokens / GOOD_EPOCHS), int(steps * GOOD_EPOCHS / epochs)
        remedy = f"{prepare} {enough}, or --train.max-steps {max(fewer, 1)}"
        return Finding("data", "warn", text, remedy)
    return Finding("data", "go", text)


def warn_of_wsl() -> Finding:
    """Warn that the driver may move GPU memory to system memory, as it does on Windows.

    Source: microsoft/WSL#11050 (the policy is not always honoured), #8447 (pinned memory).
    """
    return Finding(
        "wsl",
        "warn",
        "WSL's driver may move what does not fit on the card into system memory, many times "
        "slower, instead of running out of memory; pinned memory is scarce",
        'NVIDIA Control Panel: "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"; it '
        "is not always honoured, so leave a micro-batch of room",
    )


def check_power(limit: float | None, default: float | None) -> Finding:
    """Compare the power limit with the board's default, in watts."""
    if limit is None:
        return Finding("power", "go", "not known: the driver reports no power limit")
    if default is not None and limit < default - 0.5:
        text = f"limited to {limit:g} W where {default:g} W is this card's default"
        return Finding("power", "warn", text, f"sudo nvidia-smi -pl {default:g}, unless it is meant")
    return Finding("power", "go", f"{limit:g} W" + (", the default" if limit == default else ""))


def check_wandb(mode: str, installed: bool, key_from: str | None, switch: tuple[str, str] | None = None) -> Finding:
    """Check that the run will be mirrored to W&B.

    `key_from` says where W&B finds its key; `switch` is one of W&B's own, and the mode it demands.
    """
    why = switch[1] if switch is not None and switch[0] == mode else f"wandb.mode is {mode}"
    if mode == "disabled":
        return Finding("wandb", "go", f"off: {why}")
    if not installed:
        text = "the package wandb is not installed: the run is not mirrored"
        return Finding("wandb", "warn", text, f"{pip_install('wandb')}, or --wandb.mode disabled")
    if mode == "offline":
        sync = tool_command("wandb", "sync")
        return Finding("wandb", "go", f"offline: {why}; {sync} uploads the run later")
    login = tool_command("wandb", "login")
    if key_from is not None:
        return Finding("wandb", "go", f"online, with the key from {key_from}")
    if mode == "auto":
        return Finding("wandb", "go", f"offline: there is no key; {login} makes it online")
    text = "wandb.mode is online, and there is no key: the run is mirrored offline"
    return Finding("wandb", "warn", text, f"{login}, or --wandb.mode offline")

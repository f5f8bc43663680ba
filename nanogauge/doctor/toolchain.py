"""The doctor's judgement of what has to agree: GPU, driver, torch, Triton and compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nanogauge.doctor.checks import Finding

DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""the oldest driver of each major version. Source: NVIDIA, CUDA compatibility, table 1"""


@dataclass(frozen=True)
class Torch:
    """What torch was built for, and the device that it would train on."""

    version: str
    device: str | None
    """cuda, mps or cpu; None where the device that was asked for is not there"""
    cuda: str | None = None
    """the CUDA it was built for; None in a build without"""
    gpu: str | None = None
    """the name of the device where it is cuda"""
    capability: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()
    """sm_89, compute_90, ...: what it has code for"""


@dataclass(frozen=True)
class Card:
    """The first NVIDIA GPU as the driver describes it, or the one that torch has."""

    name: str | None
    driver_version: str | None
    reason: str | None
    """why there is no name"""
    cuda_version: tuple[int, int] | None = None
    """the newest CUDA that the driver can run"""


def check_gpu(wanted: str, torch: Torch, card: Card, visible: str | None) -> Finding:
    """Whether the GPU, its driver and torch agree.

    Args:
        wanted: run.device.
        torch: what torch says.
        card: what the driver says.
        visible: CUDA_VISIBLE_DEVICES, where it is set.
    """
    there = f"torch {torch.version}"
    if wanted == "cpu":
        alone = f"; {card.name} stays unused" if card.name is not None else ""
        return Finding("gpu", "go", f"run.device is cpu, {there}{alone}")
    if torch.device == "mps":
        return Finding("gpu", "go", f"Apple's GPU, {there}")
    if wanted == "mps":
        remedy = "choose --run.device auto or cpu"
        return Finding("gpu", "no-go", "torch has no mps device here", remedy)
    if torch.cuda is None and torch.gpu is None and card.name is not None:
        return Finding(
            "gpu",
            "no-go",
            f"{there} is a CPU build but there is an NVIDIA GPU, {card.name}",
            "install a CUDA build: pip install --force-reinstall "
            f"torch=={_plain(torch.version)}; or train on the processor with --run.device cpu",
        )
    known, built = card.cuda_version, _major(torch.cuda)
    if torch.gpu is None and known is not None and built is not None and known[0] < built:
        driver = f"{DRIVER_OF_CUDA[built]} or newer" if built in DRIVER_OF_CUDA else "a newer one"
        return Finding(
            "gpu",
            "no-go",
            f"driver {card.driver_version} knows CUDA up to {known[0]}.{known[1]}, and {there} "
            f"is built for CUDA {torch.cuda}",
            f"install the NVIDIA driver {driver}, or a torch that is built for CUDA {known[0]}",
        )
    if torch.gpu is None:
        return _unseen(wanted, there, card, visible)
    if torch.capability is not None and not _has_code(torch.capability, torch.architectures):
        major, minor = torch.capability
        return Finding(
            "gpu",
            "no-go",
            f"{there} has no code for {torch.gpu}, compute capability {major}.{minor}: it is built "
            f"for {', '.join(torch.architectures)}",
            f"install a torch whose build has sm_{major}{minor}",
        )
    if torch.cuda is not None and card.name is None:
        return Finding(
            "gpu",
            "warn",
            f"{torch.gpu} trains, but its sensors are not there: {card.reason}",
            "power and temperature will not be measured; see whether nvidia-smi works",
        )
    driver = f", driver {card.driver_version}" if card.driver_version is not None else ""
    cuda = f" (CUDA {torch.cuda})" if torch.cuda is not None else ""
    return Finding("gpu", "go", f"{torch.gpu}{driver}, {there}{cuda}")


def _unseen(wanted: str, there: str, card: Card, visible: str | None) -> Finding:
    if card.name is None and wanted == "cuda":
        return Finding(
            "gpu",
            "no-go",
            f"no CUDA GPU is visible to torch ({card.reason})",
            "check nvidia-smi and the driver, or try the run on the processor with "
            "--run.device cpu",
        )
    if card.name is None:
        return Finding("gpu", "go", f"none ({card.reason}): {there} trains on the processor")
    if visible is not None:
        return Finding(
            "gpu",
            "no-go" if wanted == "cuda" else "warn",
            f"CUDA_VISIBLE_DEVICES={visible} hides {card.name}",
            "unset CUDA_VISIBLE_DEVICES, or train on the processor with --run.device cpu",
        )
    return Finding(
        "gpu",
        "no-go",
        f"the driver shows {card.name}, and torch cannot use it",
        "after a suspend: sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm; else restart "
        "the machine",
    )


def _plain(version: str) -> str:
    return version.partition("+")[0]


def _major(version: str | None) -> int | None:
    return None if version is None else int(version.partition(".")[0])


def _has_code(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Machine code runs on the same major and a later minor version, PTX on all later ones."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            return True  # a way of naming that is not known here is no reason to refuse
        has, exact = (int(found[2]), int(found[3])), found[4] == "a"
        if has == capability or (has < capability and not exact and found[1] == "compute"):
            return True
        if has[0] == capability[0] and has < capability and not exact:
            return True
    return not architectures


def check_triton(
    unneeded: str | None, wanted: str | None, found: str | None, error: str | None, system: str
) -> Finding:
    """Whether torch.compile finds the Triton that it was made for.

    Args:
        unneeded: why no Triton is needed, where none is.
        wanted: the version that torch asks for.
        found: the version that is there.
        error: why it cannot be imported.
        system: as platform.system() has it.
    """
    if unneeded is not None:
        return Finding("triton", "go", f"not needed: {unneeded}")
    package = "triton-windows" if system == "Windows" else "triton"
    install = f"pip install {package}" + (f"=={wanted}" if wanted is not None else "")
    slower = "training goes on uncompiled, slower"
    if found is None:
        return Finding("triton", "warn", f"Triton is not installed: {slower}", install)
    if error is not None:
        text = f"Triton {found} cannot be imported ({error}): {slower}"
        return Finding("triton", "warn", text, f"{install} --force-reinstall")
    if wanted is not None and _plain(found) != wanted:
        text = f"Triton {found} is there, and torch wants {wanted}: it may not compile"
        return Finding("triton", "warn", text, install)
    return Finding("triton", "go", f"{found}" + (", as torch wants" if wanted is not None else ""))


def check_compiler(
    unneeded: str | None,
    language: str,
    tried: tuple[str, ...],
    compiler: str | None,
    headers: Path | None,
) -> Finding:
    """Whether inductor (C++ on a CPU) or Triton (C on a GPU) can build what it generates.

    Args:
        unneeded: why neither is needed, where none is.
        language: of the compiler.
        tried: the programs that would be taken.
        compiler: the one of them that is there.
        headers: the folder of Python.h, where it is there.
    """
    if unneeded is not None:
        return Finding("compiler", "go", f"not needed: {unneeded}")
    missing = []
    if compiler is None:
        missing.append(f"no {language} compiler ({' or '.join(tried)})")
    if headers is None:
        missing.append("no Python.h")
    if not missing:
        return Finding("compiler", "go", f"{compiler}, and Python.h")
    return Finding(
        "compiler",
        "warn",
        f"{' and '.join(missing)}: training goes on uncompiled, slower",
        "sudo apt install build-essential python3-dev, or what your system calls them; "
        "--run.compile false if that is meant",
    )
